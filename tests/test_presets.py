"""Every shipped preset is valid, and one of each kind trains two steps on its stand-in; `make soak` trains them all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastpeft.config import load_run, preset_names, trial_run
from fastpeft.config.load import PRESETS
from fastpeft.config.methods import METHODS
from fastpeft.config.schedules import SCHEDULES
from fastpeft.trainer import train

FILES = sorted(PRESETS.rglob("*.yaml"))
CLASSIC = ("constant", "linear", "cosine", "wsd", "rex")
WITH_TEST = ("embedded-word-problems", "embedded-entities", "embedded-boxed-problems")
"""Generated sets that have a test split."""


def kind(path: Path) -> tuple[str, ...]:
    """Method, schedule, optimizer and data: presets that share them differ in what two steps do not show. Schedules
    that measure nothing are one, and on word problems all but one are."""
    run = load_run(path.stem)
    dataset = run.stand_in.dataset if run.stand_in else run.dataset.name
    model = run.stand_in.model if run.stand_in else run.model.name
    one = run.schedule.name in CLASSIC or (dataset == "embedded-word-problems" and path.stem != "graff_gsm8k")
    return run.method, "any" if one else run.schedule.name, run.optimizer.name, model, dataset


# Of each kind the preset with the shortest name, and of those the first. Schedules are told apart on sentence pairs.
CHOSEN = {kind(path): path for path in sorted(FILES, key=lambda p: (len(p.stem), p.stem), reverse=True)}


def trials() -> list[Any]:
    """Until each method, schedule, optimizer and dataset has been there; the others are soak tests."""
    seen: set[str] = set()
    cases = []
    for of, path in sorted(CHOSEN.items(), key=lambda item: (len(item[1].stem), item[1].stem)):
        cases.append(pytest.param(path, id=path.stem, marks=() if set(of) - seen else pytest.mark.soak))
        seen |= set(of)
    return cases


@pytest.fixture
def no_words(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Nothing is printed, by no library either, and no warning given that Python would show."""
    yield
    assert capfd.readouterr() == ("", "")
    hidden = DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning
    assert not [str(warning.message) for warning in recwarn if not issubclass(warning.category, hidden)]


def test_every_file_has_a_name_that_loads() -> None:
    assert [path.stem for path in sorted(FILES, key=lambda p: p.stem)] == preset_names()
    methods, tasks = [name.replace("iw_lora", "iwlora") for name in METHODS.names], ("mnli", "sst2", "rte")
    assert {f"{method}_{task}" for method in methods for task in tasks} <= set(preset_names())
    for path in FILES:
        assert load_run(path.stem).run_id == path.stem
        assert trial_run(load_run(path.stem)).run_id == path.stem


@pytest.mark.parametrize("task", ["gsm8k", "mnli"])
def test_every_schedule_has_a_preset_for_each_task_of_the_same_model_and_data(task: str) -> None:
    base = load_run({"gsm8k": "linear_gsm8k", "mnli": "lora_mnli"}[task])
    for name in SCHEDULES.names:
        run = load_run(f"{name}_{task}")
        assert run.schedule.name == name
        for same in ("method", "model", "dataset", "adapter", "budget", "evaluation"):
            assert getattr(run, same) == getattr(base, same), same


@pytest.mark.parametrize("path", trials())
@pytest.mark.usefixtures("fewer_rows")
def test_trial_on_the_stand_in(path: Path, tmp_path: Path, no_words: None) -> None:
    check_trial(path, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("path", sorted(set(FILES) - set(CHOSEN.values())), ids=lambda path: path.stem)
def test_trial_of_every_other_on_the_stand_in(path: Path, tmp_path: Path, no_words: None) -> None:
    check_trial(path, tmp_path)


def check_trial(path: Path, tmp_path: Path) -> None:
    result = train(trial_run(load_run(path.stem)), results_dir=tmp_path, name="r")
    assert (result.status, result.steps, result.stand_in) == ("done", 2, True)
    assert result.run_id == path.stem
    least = -1 if result.metric["name"] == "spearman" else 0
    assert least <= result.metric["value"] <= 1
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    kinds = [event["type"] for event in events]
    has_test = kind(path)[-1] in WITH_TEST
    assert kinds.count("step") == 2
    assert kinds.count("eval") == 2 + has_test
    assert bool(result.test) == has_test
    assert kinds.count("checkpoint") == 1
    assert kinds[-1] == "end"
    assert all(event["num"] == 32 for event in events if event["type"] == "eval")
    assert any((tmp_path / "r" / METHODS[result.method].saved_as).glob("*.safetensors"))
    assert load_run(tmp_path / "r" / "run.yaml").run_id == path.stem


@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_a_preset_of_another_task_differs_in_little_and_has_a_stand_in(task: str) -> None:
    run, mnli = load_run(f"lora_{task}"), load_run("lora_mnli")
    assert (run.dataset.name, run.method, run.model, run.adapter) == (task, "lora", mnli.model, mnli.adapter)
    assert run.stand_in == mnli.stand_in
    assert len((PRESETS / f"lora_{task}.yaml").read_text().splitlines()) < 20


@pytest.mark.usefixtures("fewer_rows")
def test_a_trial_of_plain_lora_speaks_of_no_regulariser(tmp_path):
    said: list[str] = []
    reporter = SimpleNamespace(say=said.append, on_event=lambda e: said.extend(e.get("notes", ())))
    train(trial_run(load_run("lora_mnli")), results_dir=tmp_path, name="r", reporter=reporter)
    assert any("LoRA on" in line for line in said)
    assert not any("regulariser" in line for line in said)
