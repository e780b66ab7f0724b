"""Captured steps: that they can be replayed, that they do what launched ones do, and who has none."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpeft
from fastpeft.config import RunConfig
from fastpeft.trainer import graphs as graphs_module
from fastpeft.trainer.buckets import StaticBatch
from fastpeft.trainer.build import build_job
from fastpeft.trainer.graph_choice import are_wanted
from fastpeft.trainer.graphs import capture_steps, everything_restored
from fastpeft.trainer.interrupt import StopRequest
from fastpeft.trainer.loop import take_step
from fastpeft.trainer.micro_batches import MicroBatches
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.graphed_jobs import (
    after_steps_on_a_gpu,
    batches_of,
    collated,
    graphed_job,
    state_of,
    train_with,
    want_graphs,
)
from tests.support.step_recorder import NotReplayable, Rerun, check_replayable
from tests.support.tiny_runs import assert_same_weights, strict_events, tiny_run, weights

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {},
    "iw_lora": {"regulariser": {"online": False}},
    "iw_lora decoupled": {"regulariser": {"online": False, "decoupled": True}},
    "iw_lora factors": {"regulariser": {"online": False, "penalty": "factors"}},
    "full": {},
    "sat_lora": {"sat_lora": {"max_extra_flops": 100.0}},
}
"""Methods whose step is captured, by name and what is set beside it."""


def method_run(folder: Path, kind: str, method: str, **sections: Any) -> RunConfig:
    merged = copy.deepcopy(SETTINGS[method])
    for section, value in sections.items():
        merged[section] = merged.get(section, {}) | value if isinstance(value, dict) else value
    return run_of_kind(folder, kind, method=method.split()[0], **merged)


# ---- replayable ------------------------------------------------------------------------------


def check_bucket(config: RunConfig, patch: pytest.MonkeyPatch) -> list[Any]:
    """The operations of the widest bucket's step; raises NotReplayable."""
    job, graphs, _ = graphed_job(config, patch)
    bucket, found = next(iter(graphs.steps.items()))

    def fill(number: int, rows: Any) -> None:
        graphs.fill(found.inputs, *collated(job, rows), 1e-3 / number)

    fills = [lambda n=n, rows=rows: fill(n, rows) for n, rows in enumerate(batches_of(job, bucket, 4), 1)]
    return check_replayable(found.step, fills)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_step_of_every_kind_of_task_is_replayable(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = check_bucket(method_run(tmp_path, kind, "lora"), monkeypatch)
    names = {operation.name for operation in operations}
    assert len(operations) > 200
    assert "aten._fused_adamw_.tensor_lr" in names


@pytest.mark.parametrize("kind", ["classification", "word-problems"])
@pytest.mark.parametrize("method", SETTINGS)
def test_the_step_of_a_method_is_replayable(
    method: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_bucket(method_run(tmp_path, kind, method), monkeypatch)


def test_a_fault_in_a_real_step_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.adapters.lora import Lora

    def after_step(self: Any, signals: Any, rates: Any, progress: float) -> None:
        self.seen = float(signals.loss)

    monkeypatch.setattr(Lora, "after_step", after_step)
    monkeypatch.setattr(Lora, "host_work", lambda self: None)
    with pytest.raises(NotReplayable, match="waits for the device"):
        check_bucket(method_run(tmp_path, "classification", "lora"), monkeypatch)


# ---- the same step ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_padding_to_a_bucket_changes_neither_loss_nor_gradient(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders in float64, but for their norms; encoders, whose trained head PEFT keeps in fp32, in that."""
    is_wide = kind in ("word-problems", "chat")
    tolerance = 1e-6 if is_wide else 1e-4
    monkeypatch.setattr("fastpeft.trainer.buckets.MOST_WIDTHS", 1)
    model = {"check": False, "fast_layers": False}  # which compute in fp32 where a CPU does
    config = method_run(tmp_path, kind, "lora", adapter={"dropout": 0.0}, model=model)
    job, graphs, _ = graphed_job(config, monkeypatch)
    model_alone = copy.deepcopy(job.adapter.model).to(torch.float64 if is_wide else torch.float32).eval()
    bucket = next(iter(graphs.steps))

    def loss_and_gradient(batch: Any, num_items: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = job.task.loss(model_alone, batch, num_items).loss
        wanted = [p for p in model_alone.parameters() if p.requires_grad]
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])

    narrower = 0
    for rows in batches_of(job, bucket, 3):
        batch, num_items = collated(job, rows)
        static = StaticBatch(bucket, batch)
        static.fill(batch, num_items)
        padded, own = static.batch(), copy.copy(job.task)
        own.train = plain_rows(job.task.train)
        plain = own.collate(rows, job.device)
        narrower += plain.inputs["input_ids"].shape[1] < bucket.shape[1]
        loss, gradient = loss_and_gradient(plain, num_items)
        own_loss, own_gradient = loss_and_gradient(padded, static.num_items)
        torch.testing.assert_close(own_loss, loss, rtol=tolerance, atol=0)
        assert float((own_gradient - gradient).norm()) <= tolerance * float(gradient.norm())
    assert narrower


def plain_rows(rows: Any) -> Any:
    return replace(rows, only_widths=())


@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_with_captured_steps_computes_the_bits_of_one_without(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is on. There are short batches, evaluations and checkpoints between the steps."""
    training = {"batch_size": 9, "checkpoint_steps": 4}
    config = method_run(tmp_path, "classification", method, training=training, budget="24steps")
    rerun, found = Rerun(), {}
    for name, capture in (("captured", rerun), ("launched", None)):
        with monkeypatch.context() as patch:
            train_with(patch, capture)
            assert fastpeft.train(config, results_dir=tmp_path, name=name).status == "done"
        folder = tmp_path / name
        saved = "model" if method == "full" else "adapter"
        steps = [e for e in strict_events(folder) if e["type"] == "step"]
        found[name] = weights(folder, saved), [{k: v for k, v in e.items() if k not in WALL} for e in steps]
    assert 15 < rerun.num_replays < 24 + rerun.num_captured, "the first step and the short ones are launched"
    assert_same_weights(found["captured"][0], found["launched"][0])
    assert found["captured"][1] == found["launched"][1]


WALL = {"elapsed_s", "time_s", "energy_j"}


@pytest.mark.parametrize("kind", ["word-problems", "token-classification"])
def test_where_labels_are_counted_a_run_is_the_same_up_to_rounding(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over other numbers of rows round otherwise."""
    config, losses = method_run(tmp_path, kind, "iw_lora", budget="8steps"), {}
    for name, capture in (("captured", Rerun()), ("launched", None)):
        with monkeypatch.context() as patch:
            train_with(patch, capture)
            fastpeft.train(config, results_dir=tmp_path, name=name)
        events = strict_events(tmp_path / name)
        losses[name] = [event["loss"] for event in events if event["type"] == "step"]
    assert losses["captured"] == pytest.approx(losses["launched"], rel=1e-3)


def test_a_resumed_run_computes_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = method_run(tmp_path, "classification", "iw_lora", budget="14steps", training={"checkpoint_steps": 5})
    train_with(monkeypatch, Rerun())
    fastpeft.train(config, results_dir=tmp_path, name="whole")
    stop = StopAfter(7)
    cut = fastpeft.train(config, results_dir=tmp_path, name="cut", reporter=stop, stop=stop.request)
    assert cut.status == "stopped"
    assert fastpeft.train(None, results_dir=tmp_path, name="cut", resume=True).status == "done"
    assert_same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


class StopAfter:
    """A Reporter that asks for the end of the run behind a step."""

    def __init__(self, step: int) -> None:
        self.request, self._step = StopRequest(), step

    def say(self, message: str) -> None: ...

    def on_event(self, event: dict[str, Any]) -> None:
        if event["type"] == "step" and event["step"] >= self._step:
            self.request.signal = signal.SIGINT


# ---- before the clock ------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_capturing_leaves_every_bit_as_it_was(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want_graphs(monkeypatch)
    job = build_job(method_run(tmp_path, "classification", method))
    before, rerun = state_of(job), Rerun()
    graphs = capture_steps(job, lambda device: rerun)
    assert graphs is not None
    assert rerun.num_captured == len(graphs.steps) > 1
    after = state_of(job)
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]


def test_a_step_within_everything_restored_changes_and_is_taken_back(tmp_path: Path) -> None:
    job = build_job(method_run(tmp_path, "classification", "iw_lora"))
    before = state_of(job)
    with everything_restored(job):
        take_step(job, MicroBatches(job, 0, "here", pytest.fail), 0.5, 0.0)
        during = state_of(job)
    changed = {name for name in before if not torch.equal(before[name], during[name])}
    assert {"step", "exp_avg", "summed", "rng"} <= changed
    after = state_of(job)
    assert not [name for name in before if not torch.equal(before[name], after[name])]


# ---- which steps are replayed ----------------------------------------------------------------


def test_only_whole_batches_of_a_bucket_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, graphs, _ = graphed_job(tiny_run(tmp_path, method="lora", training={"batch_size": 9}), monkeypatch)
    taken = []
    for position in range(len(job.batches)):
        batches = MicroBatches(job, position, "here", pytest.fail)
        bucket = graphs.bucket_of(batches)
        taken.append((len(batches.batch), None if bucket is None else bucket.shape[1]))
        if bucket is not None:
            assert job.batches.encoded.shape(batches.rows) == bucket.shape
    assert {rows for rows, width in taken if width is None} == {96 % 9}
    job.limits.training = 20
    assert graphs.bucket_of(MicroBatches(job, 0, "here", pytest.fail)) is None


def test_there_are_few_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft.trainer.buckets.MOST_WIDTHS", 3)
    job, graphs, _ = graphed_job(tiny_run(tmp_path, method="lora"), monkeypatch)
    assert len(job.task.train.only_widths) == 3
    assert {bucket.shape[1] for bucket in graphs.steps} <= set(job.task.train.only_widths)
    assert max(job.task.train.only_widths) == job.task.train.lengths.max()
    assert any("a step is one CUDA graph, for batches of 8 rows padded to " in note for note in job.notes)


# ---- who has none ----------------------------------------------------------------------------

INLINE = {"online": False, "calibration": "inline", "estimator": "sketch"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adalora": ({"method": "adalora"}, "method adalora: which ranks are pruned, and when, is decided on the host"),
    "online": ({"method": "iw_lora", "regulariser": {"online": True}}, "method iw_lora: regulariser.online weighs"),
    "inline": (
        {"method": "iw_lora", "regulariser": INLINE, "schedule": {"warmup_steps": 2}},
        "method iw_lora: regulariser.calibration inline counts",
    ),
    "unihyperlora": (
        {"method": "unihyperlora", "unihyperlora": {"max_extra_flops": 100.0}},
        "method unihyperlora: its hooks are not known",
    ),
    "schedule": ({"schedule": {"name": "fot"}}, "schedule fot reads on the host"),
    "schedule_free": (
        {"optimizer": {"name": "schedule_free"}, "schedule": {"name": "constant"}},
        "optimizer schedule_free: its package counts steps",
    ),
    "checkpointed": ({"training": {"checkpoint_layers": True}}, "layers that are computed again"),
    "micro-batches": ({"training": {"micro_batch_tokens": 16}}, "of the batches are several micro-batches"),
    "few batches": ({"training": {"batch_size": 512}}, "100% of the batches are several micro-batches, or fewer rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_captured_says_why_once_and_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = REFUSED[name]
    merged = {"method": "lora"} | settings
    rerun = Rerun()
    train_with(monkeypatch, rerun)
    config = run_of_kind(tmp_path, "classification", **merged, budget="3steps")
    assert fastpeft.train(config, results_dir=tmp_path, name="run").steps == 3
    notes = next(event for event in strict_events(tmp_path / "run") if event["type"] == "run")["notes"]
    told = [note for note in notes if "CUDA graph" in note]
    assert len(told) == 1
    assert told[0].startswith(f"no CUDA graphs: {said}") or said in told[0]
    assert rerun.num_replays == 0


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_a_cpu_captures_nothing_and_says_nothing(setting: str, tmp_path: Path) -> None:
    job = build_job(tiny_run(tmp_path, method="lora", training={"cuda_graphs": setting}))
    assert capture_steps(job) is None
    assert job.task.train.only_widths == ()
    assert not [note for note in job.notes if "graph" in note]


@pytest.mark.parametrize(
    ("setting", "wanted"), [({}, False), ({"cuda_graphs": False}, False), ({"cuda_graphs": "auto"}, True)]
)
def test_they_are_wanted_where_they_are_asked_for_and_there_is_a_gpu(setting, wanted, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, method="lora", training=setting)
    assert are_wanted(run, torch.device("cuda")) == wanted
    assert not are_wanted(run, torch.device("cpu"))


class Faulty(Rerun):
    """A capture that goes wrong in the way that a test names."""

    def __init__(self, fault: str, job: Any) -> None:
        super().__init__()
        self._fault, self._job = fault, job

    def __call__(self, step: Any) -> Any:
        if self._fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self._fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        found = super().__call__(step)

        def replay() -> None:
            torch.rand(1)  # other random numbers than the launched step has
            step()

        found.replay = replay
        return found


FAULTS = {
    "memory": "the memory is too short to keep a captured step",
    "capture": "capturing it failed: operation not permitted when stream is capturing",
    "replay": "a replayed step gives another gradient",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_capture_that_fails_leaves_a_run_as_it_was(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want_graphs(monkeypatch)
    job = build_job(tiny_run(tmp_path, method="lora"))
    before, way = state_of(job), job.backbone.model.config._attn_implementation
    assert capture_steps(job, lambda device: Faulty(fault, job)) is None
    assert [note for note in job.notes if "CUDA graph" in note] == [
        note for note in job.notes if note.startswith(f"no CUDA graphs: {FAULTS[fault]}")
    ]
    after = state_of(job)
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert job.task.train.only_widths == job.batches.encoded.only_widths == ()
    assert job.backbone.model.config._attn_implementation == way


def test_infinite_gradients_in_the_same_places_are_alike() -> None:
    a = torch.tensor([1.0, float("inf"), float("nan")])
    assert graphs_module._alike(a, a.clone())
    assert not graphs_module._alike(a, torch.tensor([1.0, 2.0, float("nan")]))
    assert not graphs_module._alike(a, torch.tensor([1.1, float("inf"), float("nan")]))


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["classification", "word-problems"])
@pytest.mark.parametrize("method", ["lora", "iw_lora", "iw_lora decoupled"])
def test_on_a_gpu_twenty_replayed_steps_are_twenty_launched_ones(
    method: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, dropout on."""
    want_graphs(monkeypatch)
    replayed, launched = (
        after_steps_on_a_gpu(method_run(tmp_path, kind, method, budget="20steps"), captured)
        for captured in (True, False)
    )
    assert torch.equal(replayed, launched)
