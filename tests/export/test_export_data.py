"""Exports where the data have changed since, or are gone: the labels are those that were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastpeft.errors import UserError
from fastpeft.export.plan import make_plan
from fastpeft.export.write import export
from fastpeft.runs.store import RunFolder
from fastpeft.tasks.trained_on import FILE
from fastpeft.trainer import train
from tests.support.every_kind import ALL_KINDS, change_rows, data_folder, run_of_kind
from tests.support.tiny import make_model


def export_to(folder: Path, results_dir: Path, **options: Any) -> list[str]:
    """What was said."""
    said: list[str] = []
    export(make_plan("r", results_dir=results_dir, to=folder, **options), said.append)
    return said


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def row_of_card(folder: Path, name: str) -> str:
    return next(line for line in card(folder).splitlines() if line.startswith(f"| {name} |"))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_run_of_each_kind_is_exported_without_its_data(kind: str, tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, kind)
    train(run, results_dir=tmp_path, name="r")
    export_to(tmp_path / "with", tmp_path)
    shutil.rmtree(data_folder(run))
    said = export_to(tmp_path / "without", tmp_path)
    assert any("the data that the run was trained on cannot be read" in line for line in said)
    apart = {"check", "mb", "mb_before"}
    ours, theirs = facts(tmp_path / "with"), facts(tmp_path / "without")
    assert {k: v for k, v in ours.items() if k not in apart} == {k: v for k, v in theirs.items() if k not in apart}
    assert theirs["check"]["where"] == "made-up rows"
    assert theirs["check"]["difference"] <= theirs["check"]["tolerance"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    for row in ("task", "metric", "also") if "| also |" in card(tmp_path / "with") else ("task", "metric"):
        assert row_of_card(tmp_path / "with", row) == row_of_card(tmp_path / "without", row)
    assert "made-up rows" in row_of_card(tmp_path / "without", "checked")


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_labels_that_were_renamed_since_are_those_that_were_trained(method: str, merge: bool, tmp_path: Path) -> None:
    """Sorted, the new names would swap places."""
    if method == "full" and not merge:
        pytest.skip("a whole model is no adapter")
    run = run_of_kind(tmp_path, "classification", method=method)
    train(run, results_dir=tmp_path, name="r")
    for file in data_folder(run).iterdir():
        file.write_text(file.read_text().replace('"no"', '"zz_no"'))
    said = export_to(tmp_path / "out", tmp_path, merge=merge)
    (fault,) = (line for line in said if "the data are not those that the run was trained on" in line)
    assert "the labels are yes, zz_no and were no, yes" in fault
    assert facts(tmp_path / "out")["labels"] == ["no", "yes"]
    assert "labels no, yes" in card(tmp_path / "out")
    if merge:
        assert transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "no", 1: "yes"}


def test_what_trimming_costs_is_not_measured_on_other_rows(tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, "classification")
    train(run, results_dir=tmp_path, name="r")
    change_rows(run, "classification", "rows")
    said = export_to(tmp_path / "out", tmp_path, trim=0.9)
    assert any("what trimming costs is not measured" in line for line in said)
    assert facts(tmp_path / "out")["metric_by_trimming"] is None
    assert "not scored again" in row_of_card(tmp_path / "out", "trimmed")


def test_a_run_of_an_earlier_version_has_its_labels_checked_at_least(tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, "classification")
    train(run, results_dir=tmp_path, name="r")
    (tmp_path / "r" / FILE).unlink()
    change_rows(run, "classification", "rows")
    said = export_to(tmp_path / "out", tmp_path)
    assert any("does not say which data it was trained on" in line for line in said)
    for file in data_folder(run).iterdir():
        file.write_text(file.read_text().replace('"no"', '"zz_no"'))
    with pytest.raises(UserError, match="the labels are yes, zz_no and were no, yes") as caught:
        export_to(tmp_path / "other", tmp_path)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "other").exists()
    shutil.rmtree(data_folder(run))
    with pytest.raises(UserError, match="there is no such file or folder"):
        export_to(tmp_path / "other", tmp_path)


@pytest.mark.parametrize("names", [("0", "1"), ("no", "yes")])
def test_a_whole_model_keeps_the_head_that_was_trained_whatever_its_labels(
    names: tuple[str, str], tmp_path: Path
) -> None:
    """Bare numbers would say nothing of a checkpoint from elsewhere."""
    run = run_of_kind(tmp_path, "classification", method="full")
    for file in data_folder(run).iterdir():
        file.write_text(file.read_text().replace('"no"', f'"{names[0]}"').replace('"yes"', f'"{names[1]}"'))
    train(run, results_dir=tmp_path, name="r")
    export_to(tmp_path / "out", tmp_path, merge=True)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    folder = RunFolder(tmp_path / "r").weights("model", best=True)
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert found.config.id2label == dict(enumerate(names))
    assert (found.classifier.weight == trained.classifier.weight).all()


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_the_bases_problem_type_is_in_no_export(kind: str, tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, kind)
    shutil.rmtree(tmp_path / "model")
    make_model(tmp_path / "model", "bert", problem_type="multi_label_classification")
    train(run, results_dir=tmp_path, name="r")
    export_to(tmp_path / "out", tmp_path, merge=True)
    wanted = "single_label_classification" if kind == "classification" else None
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").problem_type == wanted
    export_to(tmp_path / "adapter", tmp_path)
    assert "multi_label" not in "".join(
        path.read_text() for path in (tmp_path / "adapter").iterdir() if path.suffix in (".json", ".md")
    )
