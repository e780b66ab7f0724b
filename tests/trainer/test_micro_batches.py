"""Out of memory, by a model that refuses passes over so many tokens: the run goes on, and comes out the same."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fastpeft.device_memory import OutOfMemory, TokenLimits, is_out_of_memory
from fastpeft.errors import UserError
from fastpeft.signals import Need
from fastpeft.trainer import StopRequest, build, train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from fastpeft.trainer.optim import FlatAdamW
from tests.support.probe_runs import STAND_IN, Recorder, put_in
from tests.support.tiny_runs import BATCH_SIZE, Listener, strict_events, tiny_run, weights, write_run

CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB\nmore lines"


@dataclasses.dataclass
class SmallDevice:
    """Passes over more than these padded tokens fail; in training, all but the first `after_passes`.

    While memory is planned, none fails and none is counted.
    """

    training: int = 10**9
    evaluation: int = 10**9
    in_backward: bool = False
    unlucky: tuple[int, ...] = ()
    """Training passes, from 1, that fail however small."""
    after_passes: int = 0
    error: type[RuntimeError] = torch.OutOfMemoryError
    text: str = CUDA_SAYS
    passes: int = 0
    rng: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """The state of the generator at the start of each training pass."""
    areas: list[int] = dataclasses.field(default_factory=list)
    is_planned: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> SmallDevice:
        model = transformers.BertForSequenceClassification
        original = model.forward

        @functools.wraps(original)
        def forward(module, input_ids, **inputs):
            if self.is_planned:
                return original(module, input_ids, **inputs)
            if module.training:
                self.rng.append(torch.get_rng_state())
                self.areas.append(input_ids.numel())
                self.passes += 1
            limit = self.training if module.training else self.evaluation
            fails = input_ids.numel() > limit and (not module.training or self.passes > self.after_passes)
            fails |= module.training and self.passes in self.unlucky
            if fails and not (self.in_backward and module.training):
                raise self.error(self.text)
            output = original(module, input_ids, **inputs)
            if fails:
                output.logits.register_hook(self.fail)
            return output

        @functools.wraps(build.make_plan)
        def make_plan(*args):
            self.is_planned = True
            try:
                return plan(*args)
            finally:
                self.is_planned = False

        plan = build.make_plan
        monkeypatch.setattr(model, "forward", forward)
        monkeypatch.setattr(build, "make_plan", make_plan)
        return self

    def fail(self, grad: torch.Tensor) -> None:
        raise self.error(self.text)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Without dropout, which micro-batches of another shape draw otherwise."""
    write_run(tmp_path, num_dev=100)
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(settings))
    return tmp_path


def run_in(files: Path, name: str, **sections):
    sections.setdefault("budget", "16steps")
    run = tiny_run(files, **{"adapter": {"dropout": 0.0}, **sections})
    listener = Listener()
    return train(run, results_dir=files, name=name, reporter=listener), listener


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in strict_events(folder) if event["type"] == "step"]


def assert_close_runs(files: Path, a: str, b: str) -> None:
    assert losses(files / a) == pytest.approx(losses(files / b), rel=1e-3)
    left, right = weights(files / a), weights(files / b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("method", "in_backward"), [("lora", False), ("lora", True), ("iw_lora", True)])
def test_a_step_that_does_not_fit_is_taken_again_in_smaller_parts(
    method: str, in_backward: bool, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": method, "regulariser": {"calibration": "inline", "warmup_steps": 4}}
    whole, _ = run_in(files, "whole", **settings)
    device = SmallDevice(training=70, in_backward=in_backward).install(monkeypatch)
    split, listener = run_in(files, "split", **settings)
    assert split.status == "done"
    assert (split.tokens, split.steps) == (whole.tokens, whole.steps)
    assert_close_runs(files, "split", "whole")
    told = [w for w in listener.warnings() if "out of memory" in w]
    assert told
    assert told[0].startswith("out of memory at step 0: micro-batches of at most ")
    assert told[0].endswith(f"tokens instead of 16,384; the batch of {BATCH_SIZE} rows stays")
    assert len(told) <= 3  # it stays small for the rest of the run
    assert len([area for area in device.areas if area > 70]) == len(told)
    tokens = [[e["tokens"] for e in strict_events(files / n) if e["type"] == "step"] for n in ("whole", "split")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("in_backward", "regulariser"),
    [
        (False, {"estimator": "exact"}),
        (True, {"estimator": "exact"}),
        (True, {"estimator": "sketch"}),
        (True, {"estimator": "lora_a", "warmup_learning_rate": 0.1}),
    ],
)
def test_calibration_that_does_not_fit_measures_the_same(
    in_backward: bool, regulariser: dict, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part of the first batch fails, so its first part begins again: nothing is counted twice."""
    settings = {"regulariser": regulariser | {"warmup_steps": 6, "online": False}, "budget": "4steps"}
    run_in(files, "whole", **settings, training={"micro_batch_tokens": 100})
    SmallDevice(unlucky=(2,), in_backward=in_backward).install(monkeypatch)
    _, listener = run_in(files, "split", **settings, training={"micro_batch_tokens": 100})
    assert any(w.startswith("out of memory in calibration: micro-batches of at most ") for w in listener.warnings())
    importances = [[e for e in strict_events(files / n) if e["type"] == "importance"] for n in ("whole", "split")]
    assert len(importances[0]) == len(importances[1]) == 1
    a, b = importances[0][0], importances[1][0]
    assert a["num_batches"] == b["num_batches"] == 6
    assert b["sensitivity"] == pytest.approx(a["sensitivity"], rel=1e-4)
    assert max(a["weights"]) > 1.2 * min(a["weights"])
    assert_close_runs(files, "split", "whole")


def test_evaluation_that_does_not_fit_gives_the_same_metric(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(files, "whole", method="lora")
    SmallDevice(evaluation=300).install(monkeypatch)
    _, listener = run_in(files, "split", method="lora")
    evaluations = [[e for e in strict_events(files / n) if e["type"] == "eval"] for n in ("whole", "split")]
    assert len(evaluations[0]) == len(evaluations[1]) == 2
    for a, b in zip(*evaluations):
        assert (a["value"], a["num"], a["step"]) == (b["value"], b["num"], b["step"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert losses(files / "split") == losses(files / "whole")
    told = [w for w in listener.warnings() if "out of memory" in w]
    assert told
    assert all(w.startswith("out of memory in the evaluation at step 10: evaluation batches of at most") for w in told)


def test_the_evaluation_that_is_timed_beforehand_shrinks_too(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallDevice(evaluation=300).install(monkeypatch)
    job = build_job(tiny_run(files, budget="100s"))
    assert 16 < job.limits.evaluation <= 300
    assert job.clock.final_s > 0
    assert any(note.startswith("out of memory while an evaluation was timed: evaluation") for note in job.notes)
    assert job.adapter.model.training


def test_dropout_is_drawn_alike_when_a_step_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SmallDevice(training=70, in_backward=True).install(monkeypatch)  # the forward pass has drawn
    run = tiny_run(tmp_path, method="lora", budget="4steps", training={"micro_batch_tokens": 10**6})
    assert train(run, results_dir=tmp_path, name="r").status == "done"
    failed = [i for i, area in enumerate(device.areas) if area > 70]
    assert failed[0] == 0
    for i in failed:  # each batch is a single pass until it fails
        assert torch.equal(device.rng[i], device.rng[i + 1])
    assert not torch.equal(device.rng[-1], device.rng[-2])


@pytest.mark.parametrize("unlucky", [17, 18, 19])
def test_a_product_is_of_passes_that_may_be_taken_again(
    unlucky: int, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seventeenth step takes three passes, two of them for the product. Nothing else is done twice."""
    put_in(monkeypatch, Recorder, frozenset({Need.PRODUCT}))
    schedules: list[Recorder] = []
    monkeypatch.setattr(Recorder, "finish", lambda self, progress: schedules.append(self))
    settings = {"method": "lora", "budget": "19steps", "schedule": {"name": STAND_IN}, "evaluation": {"every": "end"}}
    run_in(files, "whole", **settings)
    SmallDevice(unlucky=(unlucky,)).install(monkeypatch)
    _, listener = run_in(files, "split", **settings)
    assert any(w.startswith("out of memory at step 16: micro-batches of at most") for w in listener.warnings())
    assert_close_runs(files, "split", "whole")
    assert [len(schedule.seen) for schedule in schedules] == [19, 19]
    whole, split = (next(m.secant for m in s.seen if m is not None and m.secant is not None) for s in schedules)
    assert split.change_U == pytest.approx(whole.change_U, rel=1e-2, abs=1e-2 * abs(whole.change_U).max())


def test_the_smaller_parts_survive_a_resume(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SmallDevice(training=70, evaluation=200).install(monkeypatch)
    stop = StopRequest()
    listener = Listener(lambda e: e["step"] >= 12 and setattr(stop, "signal", signal.SIGTERM))
    run = tiny_run(files, method="lora", budget="30steps", evaluation={"every": "5steps"})
    assert train(run, results_dir=files, name="r", reporter=listener, stop=stop).status == "stopped"
    assert sum("out of memory" in w for w in listener.warnings()) >= 2
    checkpoint, _ = newest_checkpoint(files / "r" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.parts["limits"]["training"] <= 70
    assert checkpoint.parts["limits"]["evaluation"] <= 200
    before = len(device.areas)
    listener = Listener()
    assert train(None, results_dir=files, name="r", resume=True, reporter=listener).status == "done"
    assert not any("out of memory" in w for w in listener.warnings())
    assert max(device.areas[before:]) <= 70


def test_a_single_row_that_does_not_fit_ends_the_run_with_advice_and_a_checkpoint(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "lora", "training": {"checkpoint_steps": 100}}
    run_in(files, "whole", **settings)
    with monkeypatch.context() as patch:
        SmallDevice(training=1, after_passes=5).install(patch)
        with pytest.raises(
            UserError, match=r"out of memory at step 5: a single row of \d+ tokens does not fit"
        ) as caught:
            run_in(files, "r", **settings)
    assert caught.value.exit_code == 2
    for key in ("dataset.max_length", "adapter.rank", "training.precision"):
        assert key in str(caught.value)
    end = strict_events(files / "r")[-1]
    assert (end["type"], end["status"]) == ("end", "failed")
    checkpoint, _ = newest_checkpoint(files / "r" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 5
    train(None, results_dir=files, name="r", resume=True)  # on a larger device
    assert_close_runs(files, "r", "whole")


@pytest.mark.parametrize("phase", ["calibration", "evaluation"])
def test_a_single_row_too_many_elsewhere(phase: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SmallDevice(training=1) if phase == "calibration" else SmallDevice(evaluation=1)
    device.install(monkeypatch)
    with pytest.raises(OutOfMemory, match=f"out of memory in .*{phase}.*: a single row of"):
        run_in(files, "r")


def test_out_of_memory_where_smaller_parts_do_not_help_is_told(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def step(self, *args):
        calls.append(None)
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(FlatAdamW, "clip_guard_and_update", step)
    with pytest.raises(OutOfMemory, match=r"outside of the passes over a micro-batch: CUDA out of memory.*Set dataset"):
        run_in(files, "r")
    assert len(calls) == 1
    assert strict_events(files / "r")[-1]["error"].startswith("OutOfMemoryError: CUDA out of memory")


def test_other_errors_are_not_taken_for_it(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallDevice(training=70, error=RuntimeError, text="shapes do not match").install(monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        run_in(files, "r")
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), True),
        (torch.cuda.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 64 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("?"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, meant: bool) -> None:
    assert is_out_of_memory(error) == meant


def test_limits_halve_what_failed_down_to_a_row() -> None:
    limits = TokenLimits(training=16384, evaluation=4096)
    told = limits.halve_training(32, 64, "at step 3")
    assert told == "out of memory at step 3: micro-batches of at most 1,024 tokens instead of 16,384"
    assert limits == TokenLimits(training=1024, evaluation=4096)
    assert "instead of 4,096" in limits.halve_evaluation(3, 50, "here")
    assert limits.evaluation == 75
    fails: list[Callable[[int, int, str], str]] = [limits.halve_training, limits.halve_evaluation]
    for halve in fails:
        with pytest.raises(OutOfMemory):
            halve(1, 64, "here")
    assert limits == TokenLimits(training=1024, evaluation=75)
