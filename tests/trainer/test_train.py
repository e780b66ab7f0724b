"""`train` as a function: the same run again, what it refuses, and runs that are stopped and resumed."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpeft.budget import energy
from fastpeft.errors import UserError
from fastpeft.tasks.sequences import task as task_module
from fastpeft.trainer import StopRequest, checkpoint_files, train
from fastpeft.trainer import calibrate as calibrate_module
from fastpeft.trainer import loop as loop_module
from fastpeft.trainer.build import build_job
from fastpeft.trainer.checkpoint_files import Checkpoint, newest_checkpoint
from tests.support.tiny_runs import (
    STEPS_PER_EPOCH,
    Listener,
    assert_same_outcome,
    assert_same_weights,
    steps_logged,
    strict_events,
    tiny_run,
    weights,
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- the same again --------------------------------------------------------------------------


def test_twice_in_one_process_is_bit_identical_and_leaves_the_caller_as_it_was(tmp_path: Path, seed: int) -> None:
    run = tiny_run(tmp_path, training={"seed": seed})
    threads = torch.get_num_threads()
    torch.manual_seed(seed + 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)

    def caller() -> tuple:
        rng = torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())
        return *rng, torch.get_num_threads(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    torch.set_num_threads(2)
    try:
        before = caller()
        train(run, results_dir=tmp_path, name="a")
        assert caller() == before
        torch.rand(7)
        train(run, results_dir=tmp_path, name="b")
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(tmp_path / "a", adapter), weights(tmp_path / "b", adapter))
    losses = [[e["loss"] for e in strict_events(tmp_path / n) if e["type"] == "step"] for n in "ab"]
    assert losses[0] == losses[1]


def test_caller_is_left_alone_by_a_resume_and_by_an_error(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(None, results_dir=tmp_path, name="r", resume=True)
    (tmp_path / "pairs" / "dev.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError):
        train(tiny_run(tmp_path), results_dir=tmp_path)
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train(tiny_run(tmp_path, budget="3steps", training={"seed": seed}), results_dir=tmp_path, name=name)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "regulariser",
    [
        {"estimator": "exact"},
        {"estimator": "sketch"},
        {"estimator": "lora_a", "warmup_learning_rate": 1e-2},
        {"calibration": "inline"},
        {"decoupled": True, "decoupled_alpha": 0.0},
        {"penalty": "factors", "normalise": "max", "online": False},
    ],
    ids=lambda r: "-".join(map(str, r.values())),
)
@pytest.mark.soak
def test_alpha_zero_is_lora_bit_for_bit(regulariser: dict, tmp_path: Path) -> None:
    train(tiny_run(tmp_path, method="lora"), results_dir=tmp_path, name="lora")
    train(tiny_run(tmp_path, regulariser={"alpha": 0.0, **regulariser}), results_dir=tmp_path, name="iw")
    assert_same_weights(weights(tmp_path / "lora"), weights(tmp_path / "iw"))


def test_a_penalty_changes_the_weights(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, method="lora"), results_dir=tmp_path, name="lora")
    train(tiny_run(tmp_path, regulariser={"alpha": 1e-2}), results_dir=tmp_path, name="iw")
    a, b = weights(tmp_path / "lora"), weights(tmp_path / "iw")
    assert any(not torch.equal(a[name], b[name]) for name in a)


# ---- refusals --------------------------------------------------------------------------------


def test_a_name_that_exists_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, budget="2steps")
    train(run, results_dir=tmp_path, name="r")
    before = tree(tmp_path / "r")
    with pytest.raises(UserError, match=r"choose another --name, or continue it with --resume"):
        train(run, results_dir=tmp_path, name="r")
    assert tree(tmp_path / "r") == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is in the way"):
        train(run, results_dir=tmp_path, name="mine")
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("name", ["../r", "a/b", ".hidden", "a b", "x" * 129])
def test_a_name_that_is_no_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        train(tiny_run(tmp_path), results_dir=tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "pairs" / "train.jsonl").write_text("{}\n"), "train.jsonl"),
        (lambda f: (f / "pairs" / "dev.jsonl").write_text(""), "dev.jsonl"),
        (lambda f: (f / "model" / "model.safetensors").write_bytes(b"broken"), "model"),
        (lambda f: (f / "model" / "config.json").unlink(), "config.json"),
    ],
    ids=["train data", "validation data", "weights", "no model"],
)
def test_a_set_up_that_fails_leaves_no_folder(damage: Callable, message: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        train(run, results_dir=tmp_path / "out", name="r")
    assert not (tmp_path / "out" / "r").exists()


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("0.001s", "the final evaluation and save alone would take"),
        ("5kJ", "needs an energy meter, and none can be read here: there is no meter in this test. Give"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    budget: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "open_source", lambda *_: (None, "there is no meter in this test"))
    with pytest.raises(UserError, match=reason) as caught:
        train(tiny_run(tmp_path, budget=budget), results_dir=tmp_path / "out", name="r")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "r").exists()


# ---- stopping and resuming -------------------------------------------------------------------

TOTAL_STEPS = 30


def stopped_run(files: Path, phase: str, monkeypatch: pytest.MonkeyPatch | None = None) -> Listener:
    """A run `r` that was asked to stop in `phase`."""
    stop = StopRequest()

    def request() -> None:
        stop.signal = signal.SIGTERM

    def on(event: dict) -> None:
        if phase == "training" and event["type"] == "step" and event["step"] == 13:
            request()

    if monkeypatch is not None and phase == "calibration":
        original = calibrate_module.forward_backward
        seen = []

        def third_asks(*args, **kwargs):
            seen.append(None)
            if len(seen) == 3:
                request()
            return original(*args, **kwargs)

        monkeypatch.setattr(calibrate_module, "forward_backward", third_asks)
    if monkeypatch is not None and phase in ("evaluation", "final evaluation"):
        answer_rows = task_module.answer_rows
        at = {"evaluation": 2, "final evaluation": 3}[phase]
        calls = []

        def asks(*args, **kwargs):
            calls.append(None)
            if len(calls) == at:
                request()
            return answer_rows(*args, **kwargs)

        monkeypatch.setattr(task_module, "answer_rows", asks)
    listener = Listener(on)
    run = tiny_run(files, budget=f"{TOTAL_STEPS}steps", regulariser={"warmup_steps": 6})
    result = train(run, results_dir=files, name="r", reporter=listener, stop=stop)
    assert result.status == "stopped"
    if monkeypatch is not None:
        monkeypatch.undo()
    return listener


def unbroken(files: Path):
    run = tiny_run(files, budget=f"{TOTAL_STEPS}steps", regulariser={"warmup_steps": 6})
    return train(run, results_dir=files, name="unbroken")


@pytest.mark.parametrize(
    ("phase", "steps"), [("calibration", 0), ("training", None), ("evaluation", 20), ("final evaluation", 30)]
)
def test_a_stop_request_saves_and_a_resume_ends_as_if_nothing_had_been(
    phase: str, steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = stopped_run(tmp_path, phase, monkeypatch)
    folder = tmp_path / "r"
    checkpoint, skipped = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert skipped == []
    assert steps is None or checkpoint.step == steps
    assert 14 <= checkpoint.step <= TOTAL_STEPS or phase == "calibration"
    assert steps_logged(folder) == list(range(checkpoint.step))
    assert listener.events[-1]["status"] == "stopped"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    result = train(None, results_dir=tmp_path, name="r", resume=True)
    expected = unbroken(tmp_path)
    if phase == "calibration":
        assert result.tokens > expected.tokens  # what the first calibration took has been spent
        result.tokens = expected.tokens
    assert_same_outcome(result, expected)
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(folder, adapter), weights(tmp_path / "unbroken", adapter))
    assert steps_logged(folder) == list(range(TOTAL_STEPS))
    kinds = [(e["type"], e["step"]) for e in strict_events(folder) if e["type"] == "eval"]
    assert kinds == [("eval", 10), ("eval", 20), ("eval", 30)]


def test_a_best_that_came_after_the_checkpoint_keeps_its_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill leaves it: the weights in adapter_best/ are better than what the checkpoint knows of."""
    stopped_run(tmp_path, "training", monkeypatch)
    folder = tmp_path / "r"
    later = {"value": 1.5, "step": 99}
    assert json.loads((folder / "adapter_best" / "best.json").read_text())["step"] == 10
    (folder / "adapter_best" / "best.json").write_text(json.dumps(later))
    before = weights(folder, "adapter_best")
    result = train(None, results_dir=tmp_path, name="r", resume=True)
    assert result.best == later
    assert_same_weights(weights(folder, "adapter_best"), before)


def test_elapsed_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    checkpoint, _ = newest_checkpoint(tmp_path / "r" / "checkpoints")
    assert checkpoint is not None
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    times = [e["elapsed_s"] for e in listener.events if e["type"] == "step"]
    assert 0 < checkpoint.parts["clock"]["elapsed_s"] < times[0] < times[-1] < result.elapsed_s


def test_resume_of_a_finished_run_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r")
    before = tree(tmp_path / "r")
    listener = Listener()
    again = train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert again == done
    assert tree(tmp_path / "r") == before
    assert listener.events == []
    assert len(listener.said) == 1
    assert "is finished: accuracy" in listener.said[0]


def test_resume_of_a_finished_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r")
    with pytest.raises(UserError, match=r"other settings.*budget: '3steps' was stored, '6steps' is asked for"):
        train(tiny_run(tmp_path, budget="6steps"), results_dir=tmp_path, name="r", resume=True)


def test_resume_with_other_settings_is_refused_naming_the_keys(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    before = tree(tmp_path / "r")
    other = tiny_run(
        tmp_path,
        budget="31steps",
        regulariser={"warmup_steps": 6},
        training={"learning_rate": 5e-3},
        adapter={"rank": 3},
    )
    with pytest.raises(UserError, match="started with other settings") as caught:
        train(other, results_dir=tmp_path, name="r", resume=True)
    message = str(caught.value)
    for key in ("training.learning_rate", "adapter.rank", "budget", "0.005", "0.01", "31steps", "30steps"):
        assert key in message
    assert "batch_size" not in message
    assert tree(tmp_path / "r") == before
    same = tiny_run(tmp_path, budget="30steps", regulariser={"warmup_steps": 6})
    assert train(same, results_dir=tmp_path, name="r", resume=True).status == "done"


def test_resume_needs_a_run_that_exists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        train(None, results_dir=tmp_path, name="r", resume=True)
    with pytest.raises(UserError, match="--resume needs --name"):
        train(None, results_dir=tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_two_trainers_of_one_run_do_not_meet(tmp_path: Path) -> None:
    """The second one is refused while the first trains, and the first does not notice."""
    refused = []

    def on(event: dict) -> None:
        if event["type"] == "eval" and event["step"] == 10:
            with pytest.raises(UserError, match="is being trained by another process") as caught:
                train(None, results_dir=tmp_path, name="r", resume=True)
            refused.append(caught.value)

    result = train(tiny_run(tmp_path), results_dir=tmp_path, name="r", reporter=Listener(on))
    assert len(refused) == 1
    assert result.status == "done"
    assert steps_logged(tmp_path / "r") == list(range(20))


@pytest.mark.parametrize("gone", ["broken", "deleted"])
def test_resume_without_a_valid_checkpoint_says_so_and_starts_over(gone: str, tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    folder = tmp_path / "r"
    for path in (folder / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1]) if gone == "broken" else path.unlink()
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"type":"step","st')  # a kill in the middle of a write
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert any("has no valid checkpoint: starting over" in line for line in listener.said)
    assert sum("checkpoint passed over" in line for line in listener.said) == 2
    assert_same_outcome(result, unbroken(tmp_path))
    assert_same_weights(weights(folder), weights(tmp_path / "unbroken"))
    assert steps_logged(folder) == list(range(TOTAL_STEPS))
    assert newest_checkpoint(folder / "checkpoints")[1] == []


def test_resume_falls_back_to_the_older_checkpoint_and_says_so(tmp_path: Path) -> None:
    stopped_run(tmp_path, "training")
    folder = tmp_path / "r"
    newest = max((folder / "checkpoints").iterdir())
    (newest / "state.json").write_text("{}")
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert any(newest.name in line and "state.json is not what was written" in line for line in listener.said)
    assert_same_outcome(result, unbroken(tmp_path))
    assert_same_weights(weights(folder), weights(tmp_path / "unbroken"))
    assert steps_logged(folder) == list(range(TOTAL_STEPS))


def test_a_run_with_checkpoints_of_another_format_is_refused_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 1)
        stopped_run(tmp_path, "training")
    before = tree(tmp_path / "r")
    with pytest.raises(UserError, match=r"step-\d+ is a checkpoint of format 1.*begin anew under another --name"):
        train(None, results_dir=tmp_path, name="r", resume=True)
    assert tree(tmp_path / "r") == before


@pytest.mark.parametrize("part", ["probes", "schedule"])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_the_parts_name(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is still there afterwards."""
    saved = Checkpoint
    with monkeypatch.context() as patch:
        without = lambda step, size, parts: saved(step, size, {n: v for n, v in parts.items() if n != part})  # noqa: E731
        patch.setattr("fastpeft.trainer.checkpointing.Checkpoint", without)
        stopped_run(tmp_path, "training")
    with pytest.raises(UserError, match=rf"the checkpoint of step \d+ lacks the part {part}\."):
        train(None, results_dir=tmp_path, name="r", resume=True)
    checkpoint, skipped = newest_checkpoint(tmp_path / "r" / "checkpoints")
    assert checkpoint is not None
    assert skipped == []


def test_an_error_while_training_is_recorded_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop_module.train_step
    calls = []

    def fails(*args):
        calls.append(None)
        if len(calls) == 8:
            raise RuntimeError("the machine is on fire")
        return original(*args)

    monkeypatch.setattr(loop_module, "train_step", fails)
    run = tiny_run(tmp_path, budget=f"{TOTAL_STEPS}steps", regulariser={"warmup_steps": 6})
    with pytest.raises(RuntimeError, match="on fire"):
        train(run, results_dir=tmp_path, name="r")
    monkeypatch.undo()
    end = strict_events(tmp_path / "r")[-1]
    assert (end["type"], end["status"], end["error"]) == ("end", "failed", "RuntimeError: the machine is on fire")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "failed"
    assert_same_outcome(train(None, results_dir=tmp_path, name="r", resume=True), unbroken(tmp_path))
    assert_same_weights(weights(tmp_path / "r"), weights(tmp_path / "unbroken"))


def test_epochs_differ_in_order_and_cover_every_row(tmp_path: Path) -> None:
    batches = build_job(tiny_run(tmp_path)).batches
    assert len(batches) == STEPS_PER_EPOCH
    orders = [[int(row) for rows in batches.epoch(epoch) for row in rows] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(96))
    assert orders[0] != orders[1]


def test_a_label_without_training_rows_is_pointed_out(tmp_path: Path) -> None:
    """As when another task's data are given under a preset's dataset.name."""
    job = build_job(tiny_run(tmp_path, dataset={"labels": ["yes", "no", "maybe"]}))
    assert any("no training row has the label maybe" in note for note in job.notes)
    assert not any("no training row" in note for note in build_job(tiny_run(tmp_path)).notes)
