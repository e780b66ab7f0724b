"""What reaches schedules: right, a step late, free where nobody asks, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.schedules import Schedule
from fastpeft.signals import BLOCK_SUMS, Need
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.probes.hooks import NO_PROBES, NoProbes, Probes, make_probes
from fastpeft.trainer.probes.transfer import Transfer
from fastpeft.trainer.step import forward_backward, train_step
from tests.support.probe_runs import (
    CURVATURE,
    PRODUCT_STEP,
    ReadsAll,
    Recorder,
    Steps,
    StopAfter,
    all_but,
    assert_near,
    figures,
    needs_with,
    pairs_run,
    problem_run,
    put_in,
)
from tests.support.tiny_runs import assert_same_outcome, assert_same_weights, strict_events, tiny_run, weights

# ---- figures -----------------------------------------------------------------------------------


def test_scalars_come_a_step_late_and_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, frozenset({Need.LOSS}))
    run = Steps(pairs_run(tmp_path)).take(4).finish()
    assert run.job.schedule.seen[0] is None
    assert [m.step for m in run.job.schedule.seen[1:]] == [1, 2, 3]
    for number, (measured, signals) in enumerate(zip(run.measured, run.signals), start=1):
        assert measured.loss == float(signals.loss)
        assert measured.grad_norm == float(signals.grad_norm)
        assert measured.num_tokens == signals.num_tokens
        assert (measured.step, measured.progress, measured.elapsed_s) == (number, number / 100, number)
        assert measured.lr == run.job.schedule.emitted[number - 1].lr
        assert not measured.skipped
        optional = (measured.blocks, measured.secant, measured.answer_fisher, measured.lens_entropy, measured.entropy)
        assert optional == (None,) * 5
        assert measured.answer_grad_sq_K is None


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_blocks_equal_sums_over_parameters(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clipping, decays, a faster head and a rate for each matrix; AdaLoRA's masks act after the step."""
    put_in(monkeypatch, Recorder, BLOCK_SUMS)
    run = Steps(pairs_run(tmp_path, method=method)).take(5).finish()
    clipped = [float(s.grad_norm) > run.job.run.optimizer.max_grad_norm for s in run.signals]
    assert any(clipped)
    assert not run.measured[0].blocks.descent_U.any()
    for number, measured in enumerate(run.measured, start=1):
        blocks, (mean, second) = measured.blocks, run.moments[number - 1]
        assert_near(blocks.grad_sq_U, run.sums(run.grad(number).square()), 0)
        assert_near(blocks.mean_sq_U, run.sums(mean.square()), 0)
        assert_near(blocks.second_U, run.sums(second), 0)
        if number > 1:
            direction, rate_U = -run.change(number - 1), run.rate(number - 1)
            scale = run.sums((run.grad(number) * direction).abs()) / rate_U
            assert_near(blocks.descent_U, run.sums(run.grad(number) * direction) / rate_U, scale, 1e-4)


@pytest.mark.parametrize("kind", [Need.SECANT, Need.PLAIN_SECANT])
def test_secants_equal_those_of_stored_gradients(kind: Need, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dg along the change of one step before, and of the last; None until these steps have been taken."""
    put_in(monkeypatch, Recorder, frozenset({kind}))
    run = Steps(pairs_run(tmp_path)).take(7).finish()
    first = 3 if kind == Need.SECANT else 2
    assert [m.secant is not None for m in run.measured] == [number >= first for number in range(1, 8)]
    for number in range(first, 8):
        last = run.change(number - 1)
        along = run.change(number - 2) if kind == Need.SECANT else last
        root = run.moments[number - 2][1].sqrt()
        scale = run.sums(((run.grad(number).abs() + run.grad(number - 1).abs()) * along).abs())
        found = run.measured[number - 1].secant
        assert_near(found.change_U, run.sums((run.grad(number) - run.grad(number - 1)) * along), scale)
        assert_near(found.square_U, run.sums(last * root * along), run.sums((last * root * along).abs()))


@pytest.mark.parametrize("kind", CURVATURE)
def test_a_skipped_step_says_so_and_spoils_no_other(
    kind: Need, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in(monkeypatch, Recorder, BLOCK_SUMS | {Need.ANSWER_GRADIENT, kind})
    bad = PRODUCT_STEP - 1 if kind == Need.PRODUCT else 5
    run = Steps(pairs_run(tmp_path), bad=(bad,)).take(bad + 4).finish()
    assert [m.step for m in run.measured if m.skipped] == [bad]
    skipped = run.measured[bad - 1]
    assert (skipped.blocks, skipped.secant, skipped.answer_grad_sq_K) == (None, None, None)
    assert torch.equal(run.thetas[bad - 1], run.thetas[bad])
    after = run.measured[bad].blocks  # its u is that of the last step that was taken, with that step's rate
    direction = -run.change(bad - 1)
    want = run.sums(run.grad(bad + 1) * direction) / run.rate(bad - 1)
    assert_near(after.descent_U, want, np.abs(want).max(), 1e-4)
    missing = {Need.SECANT: [5, 6, 7], Need.PLAIN_SECANT: [5, 6]}.get(kind, list(range(2, bad + 4 + 1)))
    assert [m.step for m in run.measured[2:] if m.secant is None] == [n for n in missing if n > 2]
    for measured in run.measured:
        finite = [np.isfinite(v).all() for v in figures(measured).values()]
        assert all(finite) or measured.skipped


# ---- what it costs -------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_schedule_that_needs_nothing_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an operation more than the bare step, and nothing is sent."""
    monkeypatch.setattr(Transfer, "launch", None)
    job = build_job(tiny_run(tmp_path, method="lora", schedule={"name": "linear"}))
    adapter, rows = job.adapter, job.batches.rows(0)
    batch = job.task.collate(rows, job.device)
    probes = make_probes(job.schedule.needs, adapter, job.optimizer)
    assert probes is job.probes is NO_PROBES

    def bare() -> None:
        signals = forward_backward(adapter, job.task.loss, [batch], len(rows))
        adapter.after_backward(signals, 0.5)
        rates = job.schedule.rates(None, 0.5)
        job.optimizer.clip_guard_and_update(signals, rates)
        adapter.after_step(signals, rates, 0.5)

    def whole() -> None:
        probes.begin(1, 0.5, 1.0)
        train_step(adapter, job.schedule, job.optimizer, job.task.loss, [batch], len(rows), 0.5, probes)

    counted = []
    for step in (bare, whole):
        with Operations() as operations:
            step()
        counted.append(operations.names)
    assert len(counted[0]) > 100
    assert counted[0] == counted[1]
    assert probes.state_dict() == {}
    assert probes.take_measured() is None
    assert all(block.module.watch is None for block in adapter.blocks)


def test_where_nothing_is_probed_every_hook_is_there() -> None:
    def hooks(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert hooks(NoProbes) == hooks(Probes) - {"before_update", "after_update"}  # those are around_update's halves


def test_a_step_is_read_after_the_next_ones_passes_and_before_its_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU has work while the host waits."""
    put_in(monkeypatch, Recorder, BLOCK_SUMS)
    run, order = Steps(pairs_run(tmp_path)), []

    def told(name: str, original: Any) -> Any:
        return lambda *args: order.append(name) or original(*args)

    monkeypatch.setattr(Transfer, "wait", told("read", Transfer.wait))
    monkeypatch.setattr(torch.Tensor, "backward", told("backward", torch.Tensor.backward))
    monkeypatch.setattr(run.job.schedule, "rates", told("rates", run.job.schedule.rates))
    monkeypatch.setattr(Probes, "before_update", told("update", Probes.before_update))
    run.take(3)
    assert order == ["backward", "rates", "update", *["backward", "read", "rates", "update"] * 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_all_figures_come_in_one_copy_that_waits_for_nothing() -> None:
    tensors = {"a": torch.tensor(2.5), "b": torch.arange(6.0).view(2, 3), "c": torch.tensor([1e-9], dtype=torch.double)}
    on_device = {name: tensor.cuda() for name, tensor in tensors.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        transfer = Transfer.launch(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        for name, found in transfer.wait().items():
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, tensors[name].numpy())


def test_what_is_dear_is_measured_every_sixteen_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, all_but(*CURVATURE))
    run = Steps(problem_run(tmp_path)).take(18).finish()
    assert [m.step for m in run.measured if m.prompt_fisher is not None] == [1, 17]
    assert [m.step for m in run.measured if m.answer_grad_sq_K is not None] == [1, 17]
    assert all(m.lens_entropy is not None and m.entropy is not None for m in run.measured)


# ---- whole runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("pairs", Need.SECANT),
        ("pairs", Need.PRODUCT),
        ("problems", Need.PLAIN_SECANT),
        ("problems", Need.PRODUCT),
    ],
)
def test_a_resumed_run_measures_and_trains_the_same_bits(
    task: str, kind: Need, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between a step and the reading of its figures, one step before an exact product."""
    put_in(monkeypatch, ReadsAll, needs_with(kind))
    if task == "pairs":
        run = pairs_run(tmp_path, budget="21steps", evaluation={"every": "end"}, training={"checkpoint_steps": 16})
    else:
        run = problem_run(tmp_path)
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    assert unbroken.status == "done"
    stop = StopAfter(16)
    monkeypatch.setattr(Probes, "after_update", stop.counting(Probes.after_update))
    train(run, results_dir=tmp_path, name="r", stop=stop)
    monkeypatch.undo()
    put_in(monkeypatch, ReadsAll, needs_with(kind))
    schedules: list[Schedule] = []
    monkeypatch.setattr(ReadsAll, "finish", lambda self, progress: schedules.append(self))
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert_same_outcome(result, unbroken)
    assert_same_weights(weights(tmp_path / "r"), weights(tmp_path / "unbroken"))
    rates = [[e["lr"] for e in strict_events(tmp_path / n) if e["type"] == "step"] for n in ("r", "unbroken")]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == len(rates[0])
    (schedule,) = schedules
    wanted = {"loss", "grad_norm", "change_U", "square_U", "descent_U", "answer_fisher", "entropy", "lens_entropy"}
    wanted |= {"answer_grad_sq_K"} | ({"prompt_fisher"} if task == "problems" else set())
    assert wanted <= schedule.found


def test_rates_are_logged_now_and_then_in_the_steps_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, Recorder, frozenset({Need.LOSS}))
    train(pairs_run(tmp_path, budget="40steps"), results_dir=tmp_path, name="r")
    events = strict_events(tmp_path / "r")
    found = [e for e in events if e["type"] == "rates"]
    assert [e["step"] for e in found] == [0, 32]
    job = build_job(pairs_run(tmp_path))
    blocks = job.adapter.flat.blocks
    for event in found:
        assert event["names"] == list(blocks.names)
        assert event["layer"] == list(blocks.layers)
        assert event["projection"] == list(blocks.projections)
        want = 1 + 0.5 * np.sin(event["step"] + 1 + np.arange(len(blocks)))
        assert event["multipliers"] == pytest.approx(want.tolist())
    numbers = [e["step"] for e in events if e["type"] in ("step", "rates")]
    assert numbers == sorted(numbers)
    assert {e["lr"] for e in events if e["type"] == "step"} <= {
        1e-2 * (1 + 0.3 * np.cos(number)) for number in range(1, 41)
    }


def test_a_schedule_hears_of_the_end_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step and before the final evaluation, though that one is interrupted and begins again."""

    class Tells(Recorder):
        def finish(self, progress: float) -> None:
            self.tell("schedule", finished_at=progress)

    put_in(monkeypatch, Tells, frozenset())
    run = pairs_run(tmp_path, budget="3steps", evaluation={"every": "end"})
    stop = StopAfter(1)
    original = Tells.finish

    def then_stops(self: Tells, progress: float) -> None:
        original(self, progress)
        stop.left = 0

    monkeypatch.setattr(Tells, "finish", then_stops)
    assert train(run, results_dir=tmp_path, name="r", stop=stop).status == "stopped"
    assert train(None, results_dir=tmp_path, name="r", resume=True).status == "done"
    events = strict_events(tmp_path / "r")
    (said,) = [e for e in events if e["type"] == "schedule"]
    assert (said["finished_at"], said["step"]) == (1.0, 3)
    assert events.index(said) < [e["type"] for e in events].index("eval")
