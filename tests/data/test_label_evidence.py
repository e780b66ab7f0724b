"""What the rows show of their labels and splits: missing labels, spellings, one class alone, texts on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.config.schema import EvaluationConfig
from fastpeft.data.rows import DataError
from fastpeft.tasks import load_task
from tests.support.classifiers import load_texts
from tests.support.row_files import config, folder_of, write_jsonl


def error_of(path: Path, **fields) -> str:
    with pytest.raises(DataError) as error:
        load_task(config(path, **fields))
    return str(error.value)


# ---- missing labels ------------------------------------------------------------------------


def labelled(counts: dict) -> list[dict]:
    return [{"sentence": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]


@pytest.mark.parametrize(
    ("counts", "mark"),
    [
        ({-1: 30, 0: 30, 1: 30}, "-1"),
        ({"-1": 5, "1": 40}, "-1"),
        ({-2: 9, -1: 9, 0: 9}, "-1"),
        ({"-": 20, "+": 20}, "-"),
    ],
)
def test_minus_one_is_a_class_where_it_is_as_common_as_one(tmp_path, counts, mark):
    task = load_task(config(folder_of(tmp_path, labelled(counts))))
    assert sorted(task.label_names) == sorted(map(str, counts))
    assert len(task.texts.train) == sum(counts.values())
    number = sum(count for label, count in counts.items() if str(label) == mark)
    assert f"the label {mark} is taken for a class: {number:,} training rows have it" in task.notes


@pytest.mark.parametrize(
    "counts",
    [
        {0: 300, 1: 300, 2: 300, -1: 12},
        {"no": 20, "yes": 20, -1: 20},
        {"entailment": 30, "neutral": 30, "-": 20},
        {-1: 40},
    ],
)
def test_minus_one_is_no_label_where_it_is_rare_or_of_another_sort(tmp_path, counts):
    folder = folder_of(tmp_path, labelled(counts))
    assert "which is no label; where it is a class, name every label in dataset.labels" in error_of(folder)
    if len(counts) > 1:
        task = load_texts(config(folder, on_bad_row="skip"))
        assert task.skipped_rows["train"] == min(counts.values())


def test_minus_one_is_a_class_if_it_is_named(tmp_path):
    folder = folder_of(tmp_path, labelled({0: 300, 1: 300, -1: 12}))
    assert load_texts(config(folder, labels=["-1", "0", "1"])).train.labels.count(0) == 12
    assert "'label' holds -1" in error_of(folder, labels=["0", "1"])


# ---- how labels are spelt ------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [("Yes", "yes"), ("not entailed", "not  entailed"), ("1", "1.0"), ("not_entailed", "not-entailed")],
)
def test_labels_that_differ_in_spelling_only_are_pointed_out(tmp_path, labels):
    folder = folder_of(tmp_path, labelled({**dict.fromkeys(labels, 5), "no": 5}))
    (warning,) = load_task(config(folder)).warnings()
    assert all(repr(label) in warning for label in labels)
    assert "differ in spelling only" in warning


def test_labels_that_are_spelt_apart_are_not(tmp_path):
    assert load_task(config(folder_of(tmp_path, labelled({"yes": 5, "no": 5, "1": 5, "10": 5})))).warnings() == []


def test_blanks_at_a_labels_ends_are_left_out_and_counted(tmp_path):
    task = load_task(config(folder_of(tmp_path, labelled({"yes": 5, " yes": 3, "no\t": 4}))))
    assert task.label_names == ("no", "yes")
    assert any("train.jsonl: 7 labels have blanks at their ends" in note for note in task.notes)


def test_an_unknown_label_that_is_spelt_like_a_known_one(tmp_path):
    folder = folder_of(tmp_path, labelled({"yes": 5, "no": 5}), labelled({"yes": 5, "NO": 5}))
    assert "unknown label 'NO'; known: no, yes. It differs from 'no' in spelling only" in error_of(folder)


def test_whole_numbers_may_be_scores(tmp_path):
    task = load_task(config(folder_of(tmp_path, labelled(dict.fromkeys(range(30), 3)))))
    said = "30 whole numbers are taken for classes; where they are scores set dataset.task=regression"
    assert said in task.notes
    assert not any(
        "taken for classes" in note for note in load_task(config(folder_of(tmp_path, labelled({1: 5, 2: 5})))).notes
    )


# ---- what is scored ------------------------------------------------------------------------


def test_one_class_is_warned_of(tmp_path):
    folder = folder_of(tmp_path, labelled({"yes": 5, "no": 5}), labelled({"no": 9}))
    (warning,) = load_task(config(folder)).warnings()
    assert warning.startswith("every validation row has the label 'no': accuracy says nothing")
    folder = folder_of(tmp_path / "other", labelled({"yes": 5}), labelled({"yes": 5, "no": 9}))
    (warning,) = load_task(config(folder, labels=["yes", "no"])).warnings()
    assert warning.startswith("every training row has the label 'yes'")


def test_a_limit_of_evaluated_rows_draws_them(tmp_path):
    """The first rows of a sorted file are of one class."""
    folder = folder_of(tmp_path, labelled({"yes": 50, "no": 50}), labelled({"no": 100, "yes": 100}))
    task = load_task(config(folder), EvaluationConfig(max_examples=40))
    assert task.warnings() == []
    assert any(note.startswith("scored on 40 of 200 validation rows, drawn at random") for note in task.notes)


def test_texts_of_both_splits_are_counted(tmp_path):
    pairs = [{"question": f"q{i}", "passage": f"p{i // 3}", "label": i % 2} for i in range(30)]
    dev = [*pairs[:2], {"question": "q", "passage": "p5", "label": 0}, {"question": "q", "passage": "p", "label": 0}]
    notes = load_texts(config(folder_of(tmp_path, pairs, dev))).notes
    said = "of 4 validation rows these stand in the training rows too: 2 (50.0%) as a whole, 2 (50.0%) by 'question', "
    assert notes == (f"{said}3 (75.0%) by 'passage'",)


def test_no_text_is_on_both_sides_of_a_split_that_is_made(tmp_path):
    rows = labelled({"yes": 40, "no": 40}) * 4
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    task = load_texts(config(path))
    assert not set(task.train.text) & set(task.validation.text)
    assert (len(task.train), len(task.validation)) == (288, 32)
    assert not any("stand in the training rows" in note for note in task.notes)


def test_the_lines_that_are_left_out_are_named(tmp_path):
    folder = folder_of(tmp_path, [*labelled({"yes": 5, "no": 5}), {"sentence": "", "label": "no"}, {"label": "no"}])
    notes = load_texts(config(folder, on_bad_row="skip")).notes
    first = f"{folder}/train.jsonl:11: column 'sentence' is empty"
    assert f"2 malformed rows of the train split were skipped, the first {first}" in notes
