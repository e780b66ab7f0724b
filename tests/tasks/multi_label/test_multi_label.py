"""Several labels a text: each way to write them, what is refused, the loss, the metrics and the threshold."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support

from fastpeft.config.schema import ColumnsConfig, DatasetConfig, EvaluationConfig, ModelConfig
from fastpeft.data.rows import DataError
from fastpeft.signals import Need
from fastpeft.tasks import load_task
from fastpeft.tasks.multi_label.labels import listed
from fastpeft.tasks.multi_label.task import MultiLabel, best_constant_f1
from fastpeft.tasks.sequence_classification.task import SequenceClassification
from fastpeft.tasks.sequences.scoring import Answers
from tests.support.tiny import FAMILIES, make_model

CPU = torch.device("cpu")
LISTS = [["b"], [], ["a", "c"], ["c"], ["a", "b", "c"], ["c", "a"]]
IN_ZEROS_AND_ONES = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1], [1, 0, 1]]


def write(folder: Path, train: list, dev: list | None = None, key: str = "labels") -> Path:
    folder.mkdir(exist_ok=True)
    for split, values in (("train", train), ("dev", dev or train)):
        rows = [{"text": f"the dog ran {i}", key: value} for i, value in enumerate(values)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(folder: Path, threshold: float = 0.5, **settings) -> MultiLabel:
    task = load_task(DatasetConfig(path=str(folder), name="rows", **settings), EvaluationConfig(threshold=threshold))
    assert isinstance(task, MultiLabel)
    return task


def given(task: MultiLabel) -> list[list[float]]:
    return [list(labels) for labels in task.texts.train.labels]


# ---- how labels are written -------------------------------------------------------------------


def test_lists_of_names_are_several_labels_and_the_run_says_so(tmp_path):
    task = load(write(tmp_path / "rows", LISTS))
    assert task.label_names == ("a", "b", "c")
    assert given(task) == IN_ZEROS_AND_ONES
    assert task.notes[0] == "rows: 6 training rows with 1.5 labels each (a 50%, b 33%, c 67%), 6 validation rows"
    assert task.notes[1] == "dataset.task is multi-label: column 'labels' holds lists of labels"


@pytest.mark.parametrize("dump", [json.dumps, str], ids=["JSON", "Python"])
def test_lists_in_csv_files_are_read(tmp_path, dump):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("text", "labels"), *((f"a dog {i}", dump(row)) for i, row in enumerate(LISTS))]
            )
    assert given(load(folder)) == IN_ZEROS_AND_ONES


def test_class_numbers_stand_for_the_names_of_dataset_labels(tmp_path):
    numbers = [[2, 0], [1], [], [0, 2]]
    task = load(write(tmp_path / "rows", numbers), labels=["x", "y", "z"])
    assert task.label_names == ("x", "y", "z")
    assert given(task) == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_the_order_of_dataset_labels_is_kept_and_a_label_that_no_row_has_is_told(tmp_path):
    task = load(write(tmp_path / "rows", LISTS), labels=["c", "rare", "b", "a"])
    assert given(task)[2] == [1, 0, 0, 1]
    assert any("no training row has the label rare" in note for note in task.notes)


@pytest.mark.parametrize("labels", [None, ["x", "y", "z"]])
def test_class_names_of_a_parquet_file_are_taken_or_named_anew(tmp_path, labels):
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["joy", "anger", "fear"]))})
    folder = tmp_path / "rows"
    folder.mkdir()
    columns = {"text": ["a", "b", "c"], "labels": [[2], [0, 1], []]}
    for split in ("train", "dev"):
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    task = load(folder, labels=labels)
    assert task.label_names == tuple(labels or ("joy", "anger", "fear"))
    assert given(task) == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    with pytest.raises(DataError, match=r"dataset\.labels: 2 names are given, but column 'labels' .* has 3 classes"):
        load(folder, labels=["x", "y"])


@pytest.mark.parametrize("number", [int, float, bool])
def test_vectors_of_zeros_and_ones_are_no_lists_of_the_classes_0_and_1(tmp_path, number):
    vectors = [[number(one) for one in row] for row in IN_ZEROS_AND_ONES]
    folder = write(tmp_path / "rows", vectors)
    task = load(folder)
    assert task.label_names == ("0", "1", "2")
    assert given(task) == IN_ZEROS_AND_ONES
    named = load(folder, labels=["x", "y", "z"])
    assert (named.label_names, given(named)) == (("x", "y", "z"), IN_ZEROS_AND_ONES)
    with pytest.raises(DataError, match="hold vectors of 3 zeros and ones, but 2 labels are named"):
        load(folder, labels=["x", "y"])


def test_a_vector_of_another_length_is_named(tmp_path):
    folder = write(tmp_path / "rows", IN_ZEROS_AND_ONES, dev=[[0, 1, 0], [1, 0]])
    with pytest.raises(DataError, match=r"dev\.jsonl:2: column 'labels' holds \[1, 0\], expected 3 zeros and ones"):
        load(folder)


def test_lists_of_two_classes_are_lists_though_they_hold_zeros_and_ones(tmp_path):
    task = load(write(tmp_path / "rows", [[0, 1], [1], [0], []]))
    assert given(task) == [[1, 1], [0, 1], [1, 0], [0, 0]]


def test_a_column_for_each_label(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = "text,a,b,c\nx,0,1,0\ny, 1,0,\nz,true,False,1.0\n"
    for split in ("train", "dev"):
        (folder / f"{split}.csv").write_text(texts)
    columns = ColumnsConfig(label=["a", "b", "c"])
    task = load(folder, columns=columns)
    assert task.label_names == ("a", "b", "c")
    assert given(task) == [[0, 1, 0], [1, 0, 0], [1, 0, 1]]
    assert task.notes[1] == "dataset.task is multi-label: dataset.columns.label names 3 columns"
    assert load(folder, columns=columns, labels=["p", "q", "r"]).label_names == ("p", "q", "r")
    with pytest.raises(DataError, match=r"2 names are given for the 3 columns of dataset\.columns\.label"):
        load(folder, columns=columns, labels=["p", "q"])
    with pytest.raises(DataError, match=r"dataset\.columns\.label is 'd', but the columns are text, a, b, c"):
        load(folder, columns=ColumnsConfig(label=["a", "d"]))
    (folder / "dev.csv").write_text(texts + "v,0,maybe,1\n")
    with pytest.raises(DataError, match=r"dev\.csv:5: column 'b' holds 'maybe', expected 0 or 1"):
        load(folder, columns=columns)
    assert len(load(folder, columns=columns, on_bad_row="skip").texts.validation) == 3


def test_columns_of_a_file_without_a_header_are_given_by_number(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("one text\t0\t1\nanother\t1\t1\n")
    task = load(folder, columns=ColumnsConfig(text=0, label=[1, 2]), labels=["p", "q"])
    assert given(task) == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["a", 2, 3.0], ["a", "2", "3"]),
        ([], []),
        ("[]", []),
        ("['it''s']", ["its"]),
        (" [1, 2] ", ["1", "2"]),
        ("a", None),
        ("[a, b]", None),
        ("['a', open('f')]", None),
        (None, None),
        ([None], None),
        ([""], None),
        ([["a"]], None),
        ([{"a": 1}], None),
        ("[" * 10_000 + "]" * 10_000, None),
    ],
)
def test_what_a_value_lists(value, labels):
    assert listed(value) == labels


# ---- what is refused ----------------------------------------------------------------------------


def test_a_row_without_a_list_is_named_or_left_out(tmp_path):
    folder = write(tmp_path / "rows", [*LISTS * 2, "b"])
    with pytest.raises(DataError, match=r"train\.jsonl:13: column 'labels' holds 'b', expected a list of labels"):
        load(folder)
    assert len(load(folder, on_bad_row="skip").texts.train) == 12


def test_a_label_that_only_validation_has_is_named(tmp_path):
    folder = write(tmp_path / "rows", LISTS, dev=[["a"], ["d", "a"]])
    with pytest.raises(DataError, match=r"dev\.jsonl:2: unknown label 'd'; known: a, b, c\. Name every label in"):
        load(folder)
    assert load(folder, labels=["a", "b", "c", "d"]).label_names == ("a", "b", "c", "d")


def test_rows_without_any_label_at_all_are_refused(tmp_path):
    with pytest.raises(DataError, match="no row has a label"):
        load(write(tmp_path / "rows", [[], []]))


def test_a_single_label_is_taken(tmp_path):
    assert given(load(write(tmp_path / "rows", [["a"], [], ["a"]]))) == [[1], [0], [1]]


def test_a_class_that_looks_like_a_list_here_and_there_stays_a_class(tmp_path):
    folder = write(tmp_path / "rows", ["good", "bad", "[1]", "bad"], key="label")
    assert isinstance(load_task(DatasetConfig(path=str(folder))), SequenceClassification)


# ---- loss, metrics, threshold -------------------------------------------------------------------


def encoded(tmp_path: Path, family: str = "bert", lists: list | None = None) -> tuple[MultiLabel, torch.nn.Module]:
    """A task that is encoded, and its model."""
    task = load(write(tmp_path / "rows", lists or LISTS * 4))
    torch.manual_seed(0)
    backbone = task.load_model(ModelConfig(name=str(make_model(tmp_path / family, family))), torch.float32, CPU)
    task.encode(backbone, CPU)
    return task, backbone.model.requires_grad_(True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lists", [LISTS * 4, [["a"], []] * 8], ids=["three labels", "one label"])
def test_loss_and_gradient_are_those_of_transformers(tmp_path, family, lists):
    task, model = encoded(tmp_path, family, lists)
    rows = np.arange(12)
    batch = task.collate(rows, CPU)
    assert model.config.problem_type == "multi_label_classification"
    loss = task.loss(model, batch, task.num_items(rows)).loss
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs = model(**batch.inputs, labels=batch.labels).loss
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    for name, p in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-6 * scale)


def test_what_a_schedule_reads_of_the_answers_are_means_over_the_labels(tmp_path):
    task, model = encoded(tmp_path)
    rows = np.arange(10)
    batch = task.collate(rows, CPU)
    found = task.loss(model, batch, 20, (Need.TOKENS,)).statistics
    probability = model(**batch.inputs).logits.sigmoid().double()
    entropy = torch.distributions.Bernoulli(probability).entropy().mean(1).sum() / 20
    assert found["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    error = (probability - batch.labels).square().mean(1).sum() / 20
    assert found["answer_fisher"].item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_metrics_are_those_of_scikit_learn(tmp_path, threshold, seed):
    task = load(write(tmp_path / "rows", LISTS), threshold=threshold)
    rng = np.random.default_rng(seed)
    gold = (rng.random((200, 3)) < (0.5, 0.1, 0.0)).astype(np.float32)  # one that is nowhere
    logits = torch.from_numpy(rng.normal(size=(200, 3)).astype(np.float32) * 2)
    predicted = logits.sigmoid().numpy() >= threshold
    value, more, groups = task.metrics(Answers(logits, 0.0), gold)
    assert value == pytest.approx(f1_score(gold, predicted, average="micro", zero_division=0))
    assert more["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    assert more["exact_rows"] == pytest.approx((predicted == (gold > 0)).all(1).mean())
    each = precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    for own, *figures in zip(groups.values(), *each):
        assert list(own.values()) == pytest.approx(figures)
    assert list(groups) == ["a", "b", "c"]
    assert list(groups["a"]) == ["precision", "recall", "f1", "support"]


def test_a_model_that_gives_no_label_scores_0(tmp_path):
    task = load(write(tmp_path / "rows", LISTS))
    value, more, _ = task.metrics(Answers(torch.full((6, 3), -9.0), 0.0), np.array(IN_ZEROS_AND_ONES, np.float32))
    assert (value, more["macro_f1"]) == (0.0, 0.0)
    assert more["exact_rows"] == pytest.approx(1 / 6)


def test_the_threshold_is_told_to_whoever_reads_the_export(tmp_path):
    task = load(write(tmp_path / "rows", LISTS), threshold=0.25)
    assert task.model_settings()["threshold"] == task.facts()["threshold"] == 0.25
    assert task.card_task().endswith("any of the labels a, b, c, each from 0.25 on")
    assert "if p >= 0.25]" in task.card_example(64, ())


def test_the_majority_is_the_best_answer_that_is_the_same_for_every_row(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
        gold = rng.random((30, 4)) < rng.random(4)
        every = [np.tile(answer, (30, 1)) for answer in itertools.product((False, True), repeat=4)]
        best = max(f1_score(gold, answer, average="micro", zero_division=0) for answer in every)
        assert best_constant_f1(gold) == pytest.approx(best)
