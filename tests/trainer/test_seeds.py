"""`--seeds`: one run a seed, one budget for all, grouped, resumable."""

from __future__ import annotations

import json
import signal

import pytest

from fastpeft.cli.result_tables import runs_table
from fastpeft.config import ConfigError, load_run, parse_budget, trial_run
from fastpeft.errors import UserError
from fastpeft.runs.store import RunError, list_runs
from fastpeft.trainer.interrupt import StopRequest
from fastpeft.trainer.seeds import share_budget, train_seeds
from tests.support.tiny_runs import write_run


@pytest.fixture
def run_file(tmp_path):
    return write_run(tmp_path)


def load(run_file, **overrides):
    return load_run(run_file, {"budget": "12steps", "evaluation.every": "end", "wandb.mode": "disabled"} | overrides)


@pytest.mark.parametrize(
    ("budget", "count", "share"),
    [("90s", 3, "30s"), ("1m", 7, None), ("100steps", 3, "33steps"), ("2Mtok", 4, "500000tok"), ("1kJ", 8, "125J")],
)
def test_budget_is_shared_and_never_exceeded(run_file, budget, count, share):
    shared = share_budget(load(run_file, budget=budget), count)
    total, part = parse_budget(budget), parse_budget(shared.budget)
    assert part.kind == total.kind
    assert part.limit * count <= total.limit * (1 + 1e-11)
    assert share is None or shared.budget == share


def test_too_small_to_share(run_file):
    with pytest.raises(ConfigError, match="5 seeds cannot share it"):
        share_budget(load(run_file, budget="4steps"), 5)


def test_without_a_budget_every_seed_has_its_epochs(run_file):
    run = load(run_file, budget=None)
    assert share_budget(run, 3) == run


def test_seeds_differ_and_are_grouped(run_file, tmp_path):
    started = []
    results = train_seeds(
        load(run_file), [3, 1], results_dir=tmp_path / "r", name="g", on_start=lambda *a: started.append(a)
    )
    assert started == [(3, "g-seed3"), (1, "g-seed1")]
    assert [(r.name, r.seed, r.group, r.status, r.steps) for r in results] == [
        ("g-seed3", 3, "g", "done", 6),
        ("g-seed1", 1, "g", "done", 6),
    ]
    losses = [
        [e["loss"] for e in map(json.loads, (tmp_path / "r" / r.name / "events.jsonl").open()) if e["type"] == "step"]
        for r in results
    ]
    assert losses[0] != losses[1]
    table = runs_table(list(list_runs(tmp_path / "r")))
    names = list(table.columns[0].cells)
    assert names == ["g", "  g-seed3", "  g-seed1"]
    assert next(iter(table.columns[1].cells)) == "2 of 2 done"
    values = [r.metric["value"] for r in results]
    assert next(iter(table.columns[2].cells)).startswith(f"{sum(values) / 2:.4f} ± ")
    # the same as a run of that seed alone
    alone = train_seeds(load(run_file, budget="6steps"), [1], results_dir=tmp_path / "alone", name="g")
    assert alone[0].metric == results[1].metric


def test_a_taken_folder_is_refused_before_anything_is_trained(run_file, tmp_path):
    (tmp_path / "r" / "g-seed1").mkdir(parents=True)
    with pytest.raises(RunError, match="g-seed1"):
        train_seeds(load(run_file), [0, 1], results_dir=tmp_path / "r", name="g")
    assert not (tmp_path / "r" / "g-seed0").exists()


def test_resume_keeps_what_is_done_continues_and_starts_the_rest(run_file, tmp_path):
    class Watch:
        stop_now = False

        def say(self, message): ...

        def on_event(self, event):
            is_second = event["type"] == "step" and event["step"] >= 2 and current[-1] == 1
            self.stop_now = self.stop_now or is_second

    class Request(StopRequest):
        def __call__(self):
            return watch.stop_now

    watch, current = Watch(), []
    where = {"results_dir": tmp_path / "r", "name": "g"}
    first = train_seeds(
        load(run_file, budget="36steps"), [0, 1, 2], **where, stop=Request(), reporter=watch,
        on_start=lambda seed, _: current.append(seed),
    )  # fmt: skip
    assert [r.status for r in first] == ["done", "stopped"]
    kept = (tmp_path / "r" / "g-seed0" / "events.jsonl").read_bytes()
    second = train_seeds(load(run_file, budget="36steps"), [0, 1, 2], **where, resume=True)
    assert [(r.seed, r.status, r.steps, r.group) for r in second] == [(s, "done", 12, "g") for s in (0, 1, 2)]
    assert (tmp_path / "r" / "g-seed0" / "events.jsonl").read_bytes() == kept
    wrong = r"other settings.*'12steps' was stored, '9steps' is asked for"
    with pytest.raises(UserError, match=wrong):  # done, yet not comparable
        train_seeds(load(run_file, budget="36steps"), [0, 1, 2, 3], **where, resume=True)
    assert not (tmp_path / "r" / "g-seed3").exists()


def test_resume_with_another_share_is_refused_before_anything_is_trained(run_file, tmp_path):
    """A seed more makes the shares smaller: its run could not be compared with the others."""
    where = {"results_dir": tmp_path / "r", "name": "g"}
    train_seeds(load(run_file, budget="4steps"), [0], **where)
    with pytest.raises(UserError, match=r"g-seed0 .* budget: '4steps' was stored, '2steps' is asked for"):
        train_seeds(load(run_file, budget="4steps"), [1, 0], **where, resume=True)
    assert not (tmp_path / "r" / "g-seed1").exists()
    again = train_seeds(load(run_file, budget="8steps"), [1, 0], **where, resume=True)
    assert [(r.seed, r.steps) for r in again] == [(1, 4), (0, 4)]


def test_a_trial_has_two_steps_for_each_seed(run_file):
    trial = trial_run(load(run_file), num_seeds=3)
    assert share_budget(trial, 3).budget == "2steps"


def test_handlers_are_put_back_after_nested_use():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop:
            pass
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,x"], "expected whole numbers"),
        (["--seeds", ""], "expected whole numbers"),
        (["--seeds", "1,1"], "twice"),
        (["--seeds", "1,2", "--seed", "3"], "give one of them"),
        (["--seeds", "1,2", "--budget", "1steps"], "cannot share"),
        (["--seeds", "1,2", "--resume"], "needs --run"),
    ],
)
def test_refused_at_the_command_line(run_file, fastpeft_here, arguments, message):
    done = fastpeft_here("train", "--run", run_file, *arguments)
    assert message in done.refused()
    assert done.out == "" or "loading torch" in done.out
