"""A test split of texts: scored once where it has labels, named where it has none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastpeft.config.schema import EvaluationConfig
from fastpeft.data.rows import DataError
from fastpeft.data.source import RowsSource
from fastpeft.tasks import load_task
from fastpeft.tasks.sequence_classification.task import SequenceClassification
from fastpeft.trainer import train
from tests.support.row_files import config, folder_of, write_jsonl
from tests.support.tiny_runs import strict_events, tiny_run

KINDS = {
    "classification": ["no", "yes"],
    "regression": [0.25, 3.5],
    "multi-label": [["red"], ["red", "round"]],
}


def rows(kind: str, name: str, count: int) -> list[dict]:
    labels = KINDS[kind]
    return [{"text": f"{name} {i}", "label": labels[i % len(labels)]} for i in range(count)]


def folder(tmp_path: Path, kind: str, test: list[dict]) -> Path:
    folder_of(tmp_path, rows(kind, "seen", 20), rows(kind, "held", 10))
    write_jsonl(tmp_path / "test.jsonl", test)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_one_with_labels_is_scored(kind, tmp_path):
    task = load_task(config(folder(tmp_path, kind, rows(kind, "asked", 6))))
    assert task.kind == kind
    assert (task.has_test, len(task.texts.test)) == (True, 6)
    assert 0.4 < task.test_cost < 0.9
    assert "10 validation rows, 6 test rows" in task.notes[0]
    assert {name: len(list(read)) for name, read in task.rows_read().items()} == {
        "train": 20,
        "validation": 10,
        "test": 6,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("label", "why"),
    [({}, "test.jsonl has no column 'label'"), ({"label": None}, "no row of .*test.jsonl has a label")],
)
def test_one_without_labels_is_named_and_not_scored(kind, label, why, tmp_path):
    task = load_task(config(folder(tmp_path, kind, [{"text": f"asked {i}"} | label for i in range(6)])))
    assert not task.has_test
    assert set(task.rows_read()) == {"train", "validation"}
    assert any(re.search(f"{why}: it is not scored", note) for note in task.notes)


def test_class_numbers_of_minus_one_are_no_labels(tmp_path):
    """As GLUE has them."""
    task = load_task(config(folder(tmp_path, "classification", [{"text": f"t {i}", "label": -1} for i in range(6)])))
    assert not task.has_test


def test_a_sample_is_scored_where_a_limit_is_set(tmp_path):
    counts = {"train": 20, "validation": 8, "test": 9}
    source = RowsSource("q", {name: rows("classification", name, count) for name, count in counts.items()})
    task = SequenceClassification.load(config(tmp_path), source, EvaluationConfig(max_test_examples=4), 0)
    assert any("scored on 4 of 9 test rows" in note for note in task.notes)
    assert len(task._test_rows) == 4


def test_texts_that_are_trained_on_are_counted(tmp_path):
    task = load_task(config(folder(tmp_path, "classification", rows("classification", "seen", 5))))
    assert any("of 5 test rows these stand in the training rows too: 5 (100.0%)" in note for note in task.notes)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ([{"text": "a", "label": "maybe"}], "unknown label 'maybe'"),
        ([{"premise": "a", "hypothesis": "b", "label": "no"}], "test.jsonl"),
    ],
)
def test_a_faulty_one_stops_the_run_before_it_begins(test, words, tmp_path):
    with pytest.raises(DataError, match=words):
        load_task(config(folder(tmp_path, "classification", test)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_scores_it_once_with_the_best_weights(kind, tmp_path):
    data = folder(tmp_path / "data", kind, rows(kind, "asked", 6))
    run = tiny_run(tmp_path, budget="3steps", dataset={"path": str(data), "task": kind})
    result = train(run, results_dir=tmp_path, name="r")
    evals = [e for e in strict_events(tmp_path / "r") if e["type"] == "eval"]
    assert [e["split"] for e in evals][-1] == "test"
    assert [e["split"] for e in evals].count("test") == 1
    assert (result.test["num"], result.test["weights"]) == (6, "best")
    assert result.test["value"] == evals[-1]["value"]
