"""From the command to the result: trials of a real trainer, the best one trained in full, and nothing of it lost."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpeft.config import load_run
from fastpeft.errors import UserError
from fastpeft.runs.events import read_events
from fastpeft.runs.store import RunFolder, list_runs
from fastpeft.sweep.sweep import Outcome, Plan, StopSignals, sweep
from fastpeft.sweep.trial import best_value, value_of
from tests.support.run_files import load_with
from tests.support.tiny_runs import Child, write_run
from tests.sweep.test_trials import Heard

RATE = "training.learning_rate"
SPACE = {RATE: {"type": "loguniform", "low": 1e-5, "high": 1e-1}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data with a test split, and run.yaml."""
    folder = tmp_path_factory.mktemp("files")
    write_run(folder)
    shutil.copy(folder / "pairs" / "dev.jsonl", folder / "pairs" / "test.jsonl")
    return folder


class Told(Heard):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict] = []

    def on_event(self, event: dict) -> None:
        self.events.append(event)


def tiny(files: Path, **optuna: Any):
    section = {"space": SPACE, "trials": 3} | optuna
    return load_with(files / "run.yaml", {"optuna": section, "budget": "12steps", "evaluation": {"every": "25%"}})


def swept(run, results: Path, told: Told | None = None, **options: Any) -> Outcome:
    return sweep(Plan(run=run, name="s", results_dir=results, **options), told or Told(), StopSignals())


def splits(folder: Path) -> list[str]:
    return [event["split"] for event in read_events(folder / "events.jsonl") if event["type"] == "eval"]


def test_trials_are_searched_and_the_best_is_trained_with_every_seed(files, tmp_path):
    run = tiny(files, seeds="1,2", trial_budget="8steps", pruner_startup=1)
    told = Told()
    outcome = swept(run, tmp_path, told, num_workers=2)
    assert (outcome.status, outcome.counted) == ("done", 3)
    best = outcome.best
    assert best is not None
    names = [f"s-best{best.number:04d}-seed{seed}" for seed in (1, 2)]
    assert [result.name for result in best.results] == names
    assert [result.status for result in best.results] == ["done", "done"]
    assert {result.group for result in best.results} == {f"s-best{best.number:04d}"}
    assert all(result.budget["limit"] == 12 for result in best.results)

    # the list of runs has the full trainings and no trial
    assert sorted(folder.path.name for folder in list_runs(tmp_path)) == names
    trials = tmp_path / "s" / "trials"
    assert sorted(folder.path.name for folder in list_runs(trials)) == ["0000", "0001", "0002"]
    for row in told.rows:
        folder = RunFolder(trials / f"{row.number:04d}")
        stored = load_run(folder.config)
        assert stored.training.learning_rate == row.params[RATE]
        assert (stored.budget, stored.wandb.mode) == ("8steps", "disabled")  # pyright: ignore
        result = folder.read_result()
        assert result is not None
        assert result.status == row.outcome
        assert result.test == {}
        assert "test" not in splits(folder.path), "settings are not chosen by the test split"
        assert not list(folder.path.glob("adapter*"))
    for result in best.results:
        assert result.test["num"] > 0
        assert load_run(tmp_path / result.name / "run.yaml").training.learning_rate == best.params[RATE]
    assert {event["type"] for event in told.events} >= {"run", "step", "eval", "end"}

    summary = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert summary["best"] == {"number": best.number, "value": best.value, "params": best.params}
    assert summary["metric"] == "accuracy"
    assert summary["runs"] == names
    assert len((tmp_path / "s" / "trials.csv").read_text().splitlines()) == 4
    again = load_run(tmp_path / "s" / "best.yaml")
    assert (again.training.learning_rate, again.budget) == (best.params[RATE], "12steps")

    # once more: nothing is left to do
    told = Told()
    assert swept(run, tmp_path, told, num_workers=2) == outcome
    assert told.rows == []
    assert told.events == []


@pytest.mark.soak
def test_the_metric_may_be_a_loss_and_one_that_is_not_measured_ends_the_sweep(files, tmp_path):
    run = tiny(files, trials=1, metric="loss", direction="minimize")
    outcome = swept(run, tmp_path / "a", trains_best=False)
    assert outcome.best is None
    events = list(read_events(tmp_path / "a" / "s" / "trials" / "0000" / "events.jsonl"))
    summary = json.loads((tmp_path / "a" / "s" / "sweep.json").read_text())
    losses = [event["loss"] for event in events if event["type"] == "eval"]
    assert summary["best"]["value"] == min(losses) == best_value(events, "loss", "minimize")
    with pytest.raises(UserError, match=r"optuna.metric bleu: .* expected one of auto, accuracy, loss") as caught:
        swept(tiny(files, metric="bleu"), tmp_path / "b")
    assert caught.value.exit_code == 2
    assert len(list((tmp_path / "b" / "s" / "trials").glob("*.log"))) == 1


def test_what_no_trial_could_have_is_refused_before_any_is_made(files, tmp_path):
    with pytest.raises(UserError, match=r"optuna\.budget: joules need an energy meter"):
        swept(tiny(files, budget="5kJ", max_trial_energy_j=5), tmp_path / "a")
    run = load_with(files / "run.yaml", {"optuna": {"space": SPACE}, "model": {"name": "/no/such/model"}})
    with pytest.raises(UserError, match=r"there is no such folder") as caught:
        swept(run, tmp_path / "b")
    assert caught.value.exit_code == 3
    assert not list(tmp_path.rglob("trials"))


def test_a_sweep_that_runs_elsewhere_and_a_runs_name_are_refused(files, tmp_path):
    held = RunFolder.at(tmp_path, "s")
    held.path.mkdir()
    held.lock()
    with pytest.raises(UserError, match=r"is a sweep that another process runs"):
        swept(tiny(files), tmp_path)
    held.unlock()
    held.config.touch()
    with pytest.raises(UserError, match=r"is a run; choose another --name"):
        swept(tiny(files), tmp_path)


def test_values_of_an_evaluation():
    event = {"type": "eval", "metric": "f1", "value": 0.5, "loss": "nan", "more": {"precision": 0.25}, "num": 64}
    assert [value_of(event, name) for name in ("auto", "f1", "precision")] == [0.5, 0.5, 0.25]
    events = [event, event | {"value": 0.75}, event | {"value": "inf"}, event | {"split": "test", "value": 1.0}]
    assert best_value(events, "auto", "maximize") == 0.75
    assert best_value(events, "auto", "minimize") == 0.5
    assert best_value(events, "loss", "minimize") is None
    sampled = [event | {"value": 0.9, "num": 20}, *events]
    assert best_value(sampled, "auto", "maximize") == 0.75, "a sample's score is none of all rows"


@pytest.mark.soak
def test_ctrl_c_saves_and_the_same_command_goes_on(files, tmp_path):
    """In a process of its own, as a user has it."""
    values = yaml.safe_load((files / "run.yaml").read_text())
    values |= {"optuna": {"space": SPACE, "trials": 2, "pruner": "none"}, "budget": "150steps"}
    values["evaluation"] = {"every": "end"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = ["sweep", "--run", str(tmp_path / "run.yaml"), "--results-dir", str(tmp_path / "r"), "--trials-only"]
    events = tmp_path / "r" / "tiny-sweep" / "trials" / "0000" / "events.jsonl"
    with Child(tmp_path / "log", *command) as child:
        child.wait_until(lambda: events.exists() and events.read_text().count('"type":"step"') > 20)
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 130
        assert "go on with   fastpeft sweep --run" in child.output()
    stopped = RunFolder(events.parent).read_result()
    assert stopped is not None
    assert stopped.status == "stopped"
    assert 0 < stopped.steps < 150
    with Child(tmp_path / "log", *command) as child:
        assert child.end(300) == 0, child.output()
    steps = [event["step"] for event in read_events(events) if event["type"] == "step"]
    assert steps == list(range(150)), "the trial went on from its checkpoint"
    summary = json.loads((tmp_path / "r" / "tiny-sweep" / "sweep.json").read_text())
    assert (summary["status"], summary["trials"], summary["made_again"]) == ("done", 2, 0)
