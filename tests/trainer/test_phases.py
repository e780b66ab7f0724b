"""What a run is busy with is in its log from the first moment on, and the first step says how far it is."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpeft import phases
from fastpeft.budget import BudgetClock
from fastpeft.config import parse_budget
from fastpeft.errors import UserError
from fastpeft.models import precision
from fastpeft.runs.events import Event
from fastpeft.runs.store import RunError, RunFolder
from fastpeft.trainer import build, first_step, train
from fastpeft.trainer import run as run_module
from fastpeft.trainer.first_step import blocks_of, whole
from tests.support.tiny_runs import Listener, assert_same_weights, strict_events, tiny_run, weights


def of_phase(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event["type"] == "phase" and event["name"] == name]


@pytest.fixture
def every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too soon after what was told before it."""
    monkeypatch.setattr(phases, "EVERY_S", 0.0)
    monkeypatch.setattr(first_step, "EVERY_S", 0.0)


# ---- the order -------------------------------------------------------------------------------


def test_phases_stand_in_the_log_in_their_order(tmp_path: Path) -> None:
    listener = Listener()
    train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r", reporter=listener)
    events = strict_events(tmp_path / "r")
    assert events == listener.events
    kinds = [event["name"] if event["type"] == "phase" else event["type"] for event in events]
    firsts = [kind for kind in dict.fromkeys(kinds) if kind not in ("system", "importance")]
    assert firsts[:9] == ["data", "model", "tokenise", "check", "memory", "run", "calibrate", "first_step", "step"]
    times = [event["time_s"] for event in events if event["type"] != "system"]
    assert times == sorted(times)
    assert all(event["elapsed_s"] == 0 and event["step"] == 0 for event in events[: kinds.index("run")])


def test_a_budget_of_seconds_also_times_the_final_evaluation(tmp_path: Path) -> None:
    job_phases: list[str] = []
    with phases.told_to(lambda **fields: job_phases.append(fields["name"])):
        build.build_job(tiny_run(tmp_path, budget="100s"))
    assert job_phases == ["data", "model", "tokenise", "check", "memory", "timing"]


def test_the_log_is_there_while_the_run_is_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def load_task(*args):
        seen.append([event["text"] for event in strict_events(tmp_path / "out" / "r")])
        return original(*args)

    original = build.load_task
    monkeypatch.setattr(build, "load_task", load_task)
    train(tiny_run(tmp_path, budget="1steps"), results_dir=tmp_path / "out", name="r")
    assert seen == [[f"reading {tmp_path / 'pairs'}"]]


def test_calibration_says_how_far_it_is(tmp_path: Path, every_word: None) -> None:
    train(tiny_run(tmp_path, budget="2steps"), results_dir=tmp_path, name="r")
    told = of_phase(strict_events(tmp_path / "r"), "calibrate")
    assert [event.get("done") for event in told] == [None, 0, 1, 2, 3]
    assert {(event["total"], event["unit"]) for event in told[1:]} == {(4, "batches")}


# ---- set-ups that fail -----------------------------------------------------------------------


@pytest.mark.parametrize("has_others", [False, True])
def test_a_set_up_that_fails_leaves_nothing_that_was_not_there(has_others: bool, tmp_path: Path) -> None:
    run, results = tiny_run(tmp_path), tmp_path / "out" / "deep"
    (tmp_path / "pairs" / "train.jsonl").write_text("{}\n")
    if has_others:
        (results / "other").mkdir(parents=True)
    listener = Listener()
    with pytest.raises(UserError, match=r"train\.jsonl"):
        train(run, results_dir=results, name="r", reporter=listener)
    assert [event["name"] for event in listener.events] == ["data"]
    assert [path.name for path in results.rglob("*")] == (["other"] if has_others else [])
    assert results.exists() == has_others


def test_what_a_kill_in_the_set_up_left_does_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGKILL leaves it: nobody tidies up, and the lock goes with the process."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "load_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("fastpeft.trainer.set_up.shutil.rmtree", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run(tmp_path), results_dir=tmp_path, name="r")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [".lock", "events.jsonl"]
    assert train(tiny_run(tmp_path, budget="1steps"), results_dir=tmp_path, name="r").status == "done"
    assert [event["name"] for event in of_phase(strict_events(tmp_path / "r"), "data")] == ["data"]


def test_a_run_that_is_being_set_up_is_in_the_way(tmp_path: Path) -> None:
    first = RunFolder.at(tmp_path, "r")
    first.create()
    first.events.touch()
    with pytest.raises(RunError, match="is in the way"):
        RunFolder.at(tmp_path, "r").check_free()
    first.unlock()
    RunFolder.at(tmp_path, "r").check_free()


def test_a_resume_that_fails_writes_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, budget="6steps")
    stop = run_module.StopRequest()
    on = Listener(lambda event: event["type"] == "checkpoint" and setattr(stop, "signal", 15))
    assert train(run, results_dir=tmp_path, name="r", reporter=on, stop=stop).status == "stopped"
    rows = (tmp_path / "pairs" / "dev.jsonl").read_text()
    (tmp_path / "pairs" / "dev.jsonl").write_text("not JSON\n")
    before = of_phase(strict_events(tmp_path / "r"), "data")
    listener = Listener()
    with pytest.raises(UserError):
        train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert of_phase(strict_events(tmp_path / "r"), "data") == before
    assert [event["step"] for event in listener.events] == [4]  # it goes on from there

    (tmp_path / "pairs" / "dev.jsonl").write_text(rows)
    assert train(None, results_dir=tmp_path, name="r", resume=True).status == "done"
    assert len(of_phase(strict_events(tmp_path / "r"), "data")) == 2
    assert [e["text"] for e in of_phase(strict_events(tmp_path / "r"), "first_step")][-1] == "step 5 under way"


# ---- the first step --------------------------------------------------------------------------


def test_the_first_step_counts_its_tokens_and_estimates_the_rest(tmp_path: Path, every_word: None) -> None:
    run = tiny_run(tmp_path, method="lora", budget="5steps", training={"micro_batch_tokens": 40})
    train(run, results_dir=tmp_path, name="r")
    events = strict_events(tmp_path / "r")
    told, steps = of_phase(events, "first_step"), [event for event in events if event["type"] == "step"]
    assert {event["text"] for event in told} == {"step 1 under way"}
    done = [event["done"] for event in told]
    assert done[0] == 0
    assert done == sorted(done)
    assert done[-1] == told[0]["total"] == steps[0]["tokens"]
    assert len(set(done)) > 6
    assert events.index(told[-1]) < events.index(steps[0])
    estimates = [event for event in told if "whole_s" in event]
    assert {event["whole_steps"] for event in estimates} == {5}
    assert all(0 <= event["left_s"] < event["whole_s"] for event in estimates)
    assert estimates[-1]["left_s"] == 0


def test_a_step_of_one_micro_batch_moves_through_its_blocks_forward_and_backward(
    tmp_path: Path, every_word: None
) -> None:
    train(tiny_run(tmp_path, method="lora", budget="1steps"), results_dir=tmp_path, name="r")
    told = of_phase(strict_events(tmp_path / "r"), "first_step")
    inside = [event["done"] / event["total"] for event in told if 0 < event["done"] < event["total"]]
    assert min(inside) < 0.4  # in the forward pass
    assert max(inside) > 0.5  # in the backward pass


def test_an_estimate_stands_though_the_step_was_short(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, budget="1steps"), results_dir=tmp_path, name="r")
    assert "whole_s" in of_phase(strict_events(tmp_path / "r"), "first_step")[-1]


def test_it_changes_no_bit_and_leaves_no_hook(tmp_path: Path, every_word: None, monkeypatch) -> None:
    models = []
    original = run_module.build_job

    def build_job(*args):
        models.append(original(*args))
        return models[-1]

    monkeypatch.setattr(run_module, "build_job", build_job)
    train(tiny_run(tmp_path, budget="4steps"), results_dir=tmp_path, name="told")
    assert not any(block._forward_hooks for block in blocks_of(models[0].adapter.model))
    monkeypatch.setattr(first_step, "blocks_of", lambda model: [])
    train(tiny_run(tmp_path, budget="4steps"), results_dir=tmp_path, name="plain")
    assert_same_weights(weights(tmp_path / "told"), weights(tmp_path / "plain"))


def test_blocks_are_the_layers_and_not_lists_inside_them() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Experts(), Experts()]), "head": torch.nn.Linear(2, 2)})
    assert [type(block) for block in blocks_of(model)] == [Experts, Experts]
    assert blocks_of(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("10steps", (16.0, 8)), ("1000tok", (16.0, 8)), ("50s", (50.0, 25)), ("5kJ", (None, None))],
)
def test_the_whole_is_what_the_budget_leaves(budget: str, expected: tuple) -> None:
    clock = BudgetClock(parse_budget(budget))
    clock.steps, clock.tokens = 2, 200
    encoded = SimpleNamespace(lengths=torch.full((30,), 10))
    batches = type("Batches", (), {"encoded": encoded, "__len__": lambda self: 3})()
    assert whole(clock, batches, seconds_per_token=0.02) == expected


# ---- precision -------------------------------------------------------------------------------


def measured(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda dtype, device, shape: ratio)


@pytest.mark.parametrize(("ratio", "name"), [(0.5, "bfloat16"), (18.0, "float32")])
def test_a_run_says_what_auto_chose(ratio: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(ratio, monkeypatch)
    train(tiny_run(tmp_path, budget="2steps", training={"precision": "auto"}), results_dir=tmp_path, name="r")
    (begun,) = (event for event in strict_events(tmp_path / "r") if event["type"] == "run")
    assert any(note.startswith("precision auto is") and "measured" in note for note in begun["notes"])
    kept = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert (kept["dtype"], kept["precision_ratio"]) == (f"torch.{name}", ratio)


def test_a_slower_precision_that_was_asked_for_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(18.0, monkeypatch)
    listener = Listener()
    run = tiny_run(tmp_path, budget="2steps", training={"precision": "bf16"})
    train(run, results_dir=tmp_path, name="r", reporter=listener)
    (warning,) = (text for text in listener.warnings() if "precision" in text)
    assert "takes 18 times as long in bf16" in warning
    assert warning.endswith("Set training.precision=auto")


def test_a_resume_keeps_the_precision_and_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, budget="8steps", training={"precision": "auto"})
    measured(0.5, monkeypatch)
    unbroken = train(run, results_dir=tmp_path, name="unbroken")
    stop = run_module.StopRequest()
    on = Listener(lambda event: event["type"] == "checkpoint" and setattr(stop, "signal", 15))
    assert train(run, results_dir=tmp_path, name="r", reporter=on, stop=stop).status == "stopped"
    monkeypatch.setattr(precision, "slowdown", lambda *_: pytest.fail("measured again"))
    assert train(None, results_dir=tmp_path, name="r", resume=True).metric == unbroken.metric
    kept = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert (kept["dtype"], kept["precision_ratio"]) == ("torch.bfloat16", 0.5)
    assert_same_weights(weights(tmp_path / "r"), weights(tmp_path / "unbroken"))


# ---- who is told -----------------------------------------------------------------------------


def test_nobody_listens_and_nothing_happens() -> None:
    phases.begin("data", "reading")
    phases.progress(1, 2, "rows")


def test_progress_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(phases.time, "monotonic", lambda: now.s)
    told = []
    with phases.told_to(lambda **fields: told.append(fields.get("done"))):
        phases.begin("data", "reading")
        for i in range(100):
            now.s += 0.01
            phases.progress(i, 100, "rows")
    assert told[0] is None
    assert 1 <= len(told) - 1 <= 2
    phases.progress(1, 2, "rows")
    assert len(told) <= 3


def test_another_thread_is_not_heard() -> None:
    told = []
    with phases.told_to(lambda **fields: told.append(fields)):
        thread = threading.Thread(target=phases.begin, args=("data", "reading"))
        thread.start()
        thread.join()
    assert told == []
