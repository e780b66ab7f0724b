"""A run of W&B is a run's folder again: what was sent comes back, and what is none of ours is refused."""

from __future__ import annotations

import json
import sys
import types

import pytest

from fastpeft.compare.found_runs import find_runs, is_wandb_path
from fastpeft.compare.report import report
from fastpeft.errors import UserError
from fastpeft.runs.events import read_events
from fastpeft.runs.store import RunFolder
from fastpeft.trackers.scalars import Rows
from fastpeft.trackers.wandb_history import events_of, fetch_run
from tests.support.tui_logs import evaluation, event, header, heartbeat, importance, step

CONFIG = header()["config"] | {"run_id": "iwlora_mnli", "budget": {"kind": "seconds", "limit": 100.0}, "stand_in": True}
SUMMARY = {
    "status": "done",
    "steps": 20,
    "elapsed_s": 2.0,
    "final/accuracy": 0.75,
    "best/accuracy": 0.8,
    "best/step": 10,
}


def sent() -> list[dict]:
    """Events as the trainer wrote them."""
    events = [importance(0, [0.1, 0.2, 0.3, 0.4])]
    for i in range(20):
        events += [heartbeat(i * 0.1, i, power_w=200.0)] if i % 5 == 0 else []
        events.append(step(i))
        if i % 10 == 9:
            events.append(evaluation(i, 0.8 if i == 9 else 0.75, more={"majority": 0.5}))
    return [*events, evaluation(19, 0.7, split="test")]


def history(events) -> list[dict]:
    """As W&B gives it: numbers that are not finite are texts, and other things stand among them."""
    rows = Rows()
    made = [row for one in events if (row := rows.of(one)) is not None]
    return [
        {"_step": row.order, "_timestamp": row.time_s, "_runtime": 1.0}
        | {key: "NaN" if value != value else value for key, value in row.values.items()}
        for row in made
    ]


class FakeRun:
    id, name, state = "abc123", "iwlora-seed7", "finished"
    config, summary = CONFIG, SUMMARY

    def scan_history(self):
        return iter(history(sent()))


@pytest.fixture
def wandb(monkeypatch):
    """W&B's client, with one run. Returns the run."""
    run = FakeRun()

    class Api:
        def run(self, path):
            if path != "team/project/abc123":
                raise ValueError(f"Could not find run <Run {path} (not found)>\nmore")
            return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Api))
    monkeypatch.setattr("fastpeft.trackers.wandb_history.is_installed", lambda name: True)
    return run


def test_what_was_sent_comes_back():
    found = list(events_of(history(sent()), "accuracy"))
    for kind in ("step", "eval", "importance"):
        ours, theirs = ([one for one in some if one["type"] == kind] for some in (sent(), found))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs):
            kept = {key: value for key, value in one.items() if key in other}
            assert kept == {key: other[key] for key in kept}
            assert one.keys() - other.keys() <= {"sensitivity"}
    assert [one["power_w"] for one in found if one["type"] == "system"] == [200.0] * 4


def test_a_run_of_wandb_is_evaluated_like_a_folder(wandb, tmp_path):
    folder = RunFolder(fetch_run("team/project/abc123", tmp_path))
    result = folder.read_result()
    assert (result.name, result.status, result.seed, result.method) == ("iwlora-seed7", "done", 7, "iw_lora")
    assert (result.metric, result.best["value"], result.test["value"]) == (
        {"name": "accuracy", "value": 0.75},
        0.8,
        0.7,
    )
    assert (result.tokens, result.steps, result.stand_in, result.energy_j) == (10_000, 20, True, pytest.approx(400.0))
    assert next(iter(read_events(folder.events)))["config"]["training"]["seed"] == 7

    def fetch(path):
        return fetch_run(path, tmp_path / "results" / "comparison" / "wandb")

    made = report(find_runs(["team/project/abc123"], tmp_path / "results", fetch), tmp_path / "results")
    assert made.comparison.rows[0].test.value == 0.7
    metrics = json.loads((made.found[0].folder.path / "metrics.json").read_text())
    assert metrics["history"]["steps"]["loss"][-1] == pytest.approx(1.05)
    assert find_runs([str(folder.path)], tmp_path), "it stays, and is read again from there"


@pytest.mark.parametrize(
    ("state", "status"), [("finished", "done"), ("killed", "stopped"), ("crashed", "failed"), ("running", "running")]
)
def test_a_run_whose_trainer_did_not_say_how_it_ended_has_wandbs_state(wandb, tmp_path, state, status):
    wandb.state, wandb.summary = state, {key: value for key, value in SUMMARY.items() if key != "status"}
    assert RunFolder(fetch_run("team/project/abc123", tmp_path)).read_result().status == status


def test_a_run_that_is_not_there_and_one_that_is_not_ours_are_refused(wandb, tmp_path):
    with pytest.raises(UserError, match=r"team/project/other: W&B does not give this run \(Could not find run"):
        fetch_run("team/project/other", tmp_path)
    wandb.scan_history = lambda: iter([{"_step": 0, "accuracy": 0.5}])
    with pytest.raises(UserError, match="was not logged by fastpeft"):
        fetch_run("team/project/abc123", tmp_path)


def test_without_wandb_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("fastpeft.trackers.wandb_history.is_installed", lambda name: False)
    with pytest.raises(UserError, match="pip install wandb"):
        fetch_run("a/b/c", tmp_path)


def test_what_a_path_of_wandb_is():
    assert is_wandb_path("team/project/abc123")
    assert not any(map(is_wandb_path, ("name", "results/name", "./a/b", "a//b", "/a/b", "a/b/c/d")))


def test_an_evaluation_without_the_metric_is_none():
    rows = history([evaluation(9, 0.5, metric="f1"), event("warning", 1.0, 1)])
    assert list(events_of(rows, "accuracy")) == []
