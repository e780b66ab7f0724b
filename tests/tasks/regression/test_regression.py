"""Regression: which rows are scores, what is refused by its line, the loss, and correlations that have no value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from fastpeft.config.schema import ColumnsConfig, DatasetConfig, ModelConfig
from fastpeft.data.rows import DataError
from fastpeft.signals import Need
from fastpeft.tasks import load_task
from fastpeft.tasks.regression.task import Regression, are_decimal_commas, correlations, number_of
from fastpeft.tasks.sequence_classification.task import SequenceClassification
from fastpeft.tasks.sequences.scoring import Answers
from tests.support.real_data import DATA
from tests.support.tiny import FAMILIES, make_model

CPU = torch.device("cpu")
STSB = DATA / "stsb"


def write(
    folder: Path, scores: list, dev: list | None = None, suffix: str = "jsonl", key: str = "label"
) -> DatasetConfig:
    folder.mkdir(exist_ok=True)
    for split, values in (("train", scores), ("dev", dev or ["0.5", "1.5"])):
        rows = [{"text": f"the dog ran {i}", key: value} for i, value in enumerate(values)]
        lines = [json.dumps(row) for row in rows]
        if suffix == "csv":
            lines = [f"text,{key}", *(f"{row['text']},{row[key]}" for row in rows)]
        (folder / f"{split}.{suffix}").write_text("\n".join(lines) + "\n")
    return DatasetConfig(path=str(folder), name="rows")


# ---- which rows are scores -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("key", ["label", "score"])
def test_numbers_that_are_not_all_whole_are_scores_and_the_run_says_so(tmp_path, suffix, key):
    values = [f"{i * 0.05:.3f}" for i in range(101)]
    task = load_task(write(tmp_path / "rows", values, suffix=suffix, key=key))
    assert isinstance(task, Regression)
    assert task.texts.train.labels == [float(value) for value in values]
    assert task.notes[0] == "rows: 101 training rows (scores 0 to 5, mean 2.5), 2 validation rows"
    assert (
        task.notes[1] == f"dataset.task is regression: column '{key}' holds numbers from 0 to 5, not all of them whole"
    )


@pytest.mark.parametrize(
    "values", [["0", "1", "2", "1"], ["0.0", "1.0", "4.0", "1.0"], [1.0, 2.0, 3.0, 5.0], ["0", "1.5x"] * 4]
)
def test_whole_numbers_and_words_stay_classes(tmp_path, values):
    config = write(tmp_path / "rows", values, dev=values[:2])
    assert isinstance(load_task(config), SequenceClassification)


def test_whole_numbers_are_scores_where_the_task_is_named(tmp_path):
    config = write(tmp_path / "rows", [1, 2, 5, 3], dev=[4, 4])
    task = load_task(DatasetConfig(path=config.path, task="regression"))
    assert isinstance(task, Regression)
    assert task.texts.train.labels == [1.0, 2.0, 5.0, 3.0]
    assert task.label_names == ()


def test_numbers_that_are_named_as_labels_stay_classes(tmp_path):
    config = write(tmp_path / "rows", ["0.5", "1.5", "1.5", "0.5"])
    task = load_task(DatasetConfig(path=config.path, labels=["0.5", "1.5"]))
    assert isinstance(task, SequenceClassification)
    assert task.label_names == ("0.5", "1.5")


def _parquet(tmp_path: Path, labels: list, features) -> bytes:
    from datasets import Dataset

    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"text": [f"a {i}" for i in range(len(labels))], "label": labels}, features=features).to_parquet(
        path
    )
    return path.read_bytes()


def test_class_names_of_a_parquet_file_stay_classes_though_they_look_like_scores(tmp_path):
    from datasets import ClassLabel, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["0.5", "1.5"])})
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.parquet").write_bytes(_parquet(tmp_path, [0, 1, 1, 0], features))
    task = load_task(DatasetConfig(path=str(folder)))
    assert isinstance(task, SequenceClassification)
    assert task.label_names == ("0.5", "1.5")


def test_floats_of_a_parquet_file_are_scores(tmp_path):
    from datasets import Features, Value

    features = Features({"text": Value("string"), "label": Value("float32")})
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.parquet").write_bytes(_parquet(tmp_path, [0.25, 1.5, 4.75, 5.0], features))
    assert isinstance(load_task(DatasetConfig(path=str(folder))), Regression)


def test_decimal_commas_are_told_from_the_column(tmp_path):
    """As spreadsheets of many countries write them, with semicolons between the columns."""
    path = tmp_path / "train.csv"
    path.write_text("text;score\n" + "".join(f"a text, {i};{i // 4},{i % 4 * 25:02}\n" for i in range(40)))
    task = load_task(DatasetConfig(path=str(path)))
    assert isinstance(task, Regression)
    assert any("with decimal commas" in note for note in task.notes)
    assert sorted(task.texts.train.labels + task.texts.validation.labels) == [i / 4 for i in range(40)]


@pytest.mark.parametrize("values", [["1,000", "2,500", "3,000"], ["1,5", "a", "b"], ["1,000.5", "2,000.25"]])
def test_commas_between_thousands_are_no_decimal_commas(values):
    assert not are_decimal_commas(values)


@pytest.mark.parametrize("bad", ["", "nan", "inf", "-inf", "1e39", "high", "1_000"])
@pytest.mark.parametrize("task", ["auto", "regression"])
def test_a_score_that_is_none_is_named_by_its_line_or_left_out(tmp_path, bad, task):
    values = [f"{i * 0.25}" for i in range(20)]
    config = write(tmp_path / "rows", [*values[:7], bad, *values[7:]], suffix="csv")
    with pytest.raises(DataError) as caught:
        load_task(DatasetConfig(path=config.path, task=task))
    assert f"train.csv:9: column 'label' holds {bad!r}, which is no finite number" in str(caught.value)
    assert "dataset.on_bad_row=skip" in str(caught.value)
    read = load_task(DatasetConfig(path=config.path, task=task, on_bad_row="skip"))
    assert isinstance(read, Regression)
    assert read.texts.train.labels == [float(value) for value in values]
    assert any("1 malformed rows of the train split were skipped" in note for note in read.notes)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        ("3", 3.0),
        (" 2.5 ", 2.5),
        ("-1e3", -1000.0),
        (True, None),
        (None, None),
        ([1.0], None),
        (10**400, None),
    ],
)
def test_what_a_label_holds_as_a_number(value, number):
    assert number_of(value) == number


def test_several_label_columns_are_refused_by_name(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.csv").write_text("text,a,b\nx,0.5,1\ny,1.5,0\n")
    config = DatasetConfig(path=str(folder), task="regression", columns=ColumnsConfig(label=["a", "b"]))
    with pytest.raises(DataError, match=r"names 2 columns, but dataset\.task=regression takes one"):
        load_task(config)


# ---- STS-B, whose files have no header --------------------------------------------------------

COLUMNS = ColumnsConfig(text=5, text_pair=6, label=4)


def test_columns_of_a_file_without_a_header_are_given_by_number(tmp_path):
    lines = [
        f'main\tfile\t2012\t{i:04d}\t{i * 0.2:.3f}\tA "plane {i} flies.\tA plane" {i} is flying.' for i in range(26)
    ]
    for split in ("train", "dev"):
        (tmp_path / f"sts-{split}.csv").write_text("\n".join(lines) + "\n")
    task = load_task(DatasetConfig(path=str(tmp_path), columns=COLUMNS))
    assert isinstance(task, Regression)
    train = task.texts.train
    assert (train.text[3], train.text_pair[3], train.labels[3]) == ('A "plane 3 flies.', 'A plane" 3 is flying.', 0.6)
    assert (len(train), len(task.texts.validation)) == (26, 26)


@pytest.mark.skipif(not STSB.is_dir(), reason="the shared STS-B files are not there")
def test_all_of_sts_b_is_read_from_its_files():
    task = load_task(DatasetConfig(path=str(STSB), columns=COLUMNS))
    assert isinstance(task, Regression)
    train, validation = task.texts.train, task.texts.validation
    assert (len(train), len(validation)) == (5749, 1500)
    assert (min(train.labels), max(train.labels)) == (0.0, 5.0)
    assert task.card_task().endswith("a score from 0 to 5")
    assert sum('"' in text for text in (*train.text, *(train.text_pair or ()))) > 30


# ---- loss and metrics ---------------------------------------------------------------------------


def loaded(tmp_path: Path, family: str = "bert", scores: list | None = None) -> tuple[Regression, torch.nn.Module]:
    """A task that is encoded, and its model."""
    config = write(tmp_path / "rows", scores or [i * 0.3 for i in range(24)], dev=[i * 0.2 + 0.1 for i in range(9)])
    task = load_task(config)
    assert isinstance(task, Regression)
    torch.manual_seed(0)
    backbone = task.load_model(ModelConfig(name=str(make_model(tmp_path / family, family))), torch.float32, CPU)
    task.encode(backbone, CPU)
    return task, backbone.model.requires_grad_(True)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_transformers(tmp_path, family):
    task, model = loaded(tmp_path, family)
    rows = np.arange(16)
    batch = task.collate(rows, CPU)
    assert model.config.problem_type == "regression"
    loss = task.loss(model, batch, task.num_items(rows)).loss
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs = model(**batch.inputs, labels=batch.labels).loss
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert ours.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    for name, p in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-6 * scale)


def test_what_a_schedule_reads_of_the_answers_is_the_squared_error(tmp_path):
    task, model = loaded(tmp_path)
    rows = np.arange(10)
    found = task.loss(model, task.collate(rows, CPU), 20, (Need.TOKENS,))
    assert found.statistics["answer_fisher"].item() == pytest.approx(found.loss.item(), rel=1e-6)
    assert found.statistics["entropy"].item() == 0.0


def test_metrics_are_scipys(tmp_path, seed):
    task, _ = loaded(tmp_path)
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 6, 200).astype(np.float32)  # with many ties
    predicted = torch.from_numpy((gold + rng.normal(size=200)).astype(np.float32))[:, None]
    value, more, groups = task.metrics(Answers(predicted, 0.0), gold)
    assert value == pytest.approx(spearmanr(predicted[:, 0], gold).statistic)
    assert more["pearson"] == pytest.approx(pearsonr(predicted[:, 0].double(), gold.astype(float)).statistic)
    assert more["mse"] == pytest.approx(float(((predicted[:, 0].numpy() - gold) ** 2).mean()), rel=1e-5)
    assert groups == {}
    assert task.metrics(Answers(-predicted, 0.0), gold)[0] == pytest.approx(-value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ([2.0, 2.0, 2.0], [0.5, 1.5, 2.5]),
        ([0.1, 0.2, 0.3], [1.5, 1.5, 1.5]),
        ([0.1, math.nan, 0.3], [0.5, 1.5, 2.5]),
        ([0.1, math.inf, 0.3], [0.5, 1.5, 2.5]),
        ([0.1], [0.5]),
    ],
)
def test_there_is_no_correlation_with_a_constant_or_with_what_is_not_finite(predicted, gold):
    assert correlations(np.array(predicted), np.array(gold)) == (0.0, 0.0)
