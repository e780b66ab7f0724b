"""What a dataset section leads to: which file is which split, class names, and what is known of a dataset by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.known import KnownDataset
from fastpeft.data.local import FileSource, find_test
from fastpeft.data.opening import open_source
from fastpeft.data.rows import DataError
from fastpeft.data.source import TEST, TRAIN, VALIDATION
from fastpeft.tasks import find_known, kind_of, load_task, task_class
from fastpeft.tasks.regression.task import Regression
from tests.support.classifiers import load_texts
from tests.support.hub_files import card, parquet
from tests.support.real_data import DATA

ROWS = "text,label\na,no\nb,yes\n"


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).write_text(ROWS)
    return tmp_path


def files_of(folder: Path) -> dict[str, list[str]]:
    return {split: [path.name for path in paths] for split, paths in FileSource(folder, "f").files.items()}


# ---- splits by file names ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dev", "validation", "valid", "val", "dev_matched", "validation_matched"])
def test_names_of_a_split(tmp_path, name):
    folder = folder_of(tmp_path, "train.csv", f"{name}.csv", "test.csv", "readme.txt", ".hidden.csv")
    assert files_of(folder) == {TRAIN: ["train.csv"], VALIDATION: [f"{name}.csv"], TEST: ["test.csv"]}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("sts-train.csv", "sts-dev.csv"), {TRAIN: ["sts-train.csv"], VALIDATION: ["sts-dev.csv"]}),
        (
            ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
            {TRAIN: ["wnut17train.conll"], VALIDATION: ["emerging.dev.conll"], TEST: ["emerging.test.annotated"]},
        ),
        (("eng.train", "a_val.csv"), {VALIDATION: ["a_val.csv"]}),
        (("Corpus-Train.csv", "corpus_DEV.csv"), {TRAIN: ["Corpus-Train.csv"], VALIDATION: ["corpus_DEV.csv"]}),
        (("train.csv", "my-train.csv", "dev.csv"), {TRAIN: ["train.csv"], VALIDATION: ["dev.csv"]}),
        (("strain.csv", "contest.csv", "latest.csv", "interval.csv", "invalid.csv"), {}),
        (("training.csv", "validate.csv", "tests.csv"), {}),
        (
            ("train_v2.csv", "dev-small.csv", "test2.csv"),
            {TRAIN: ["train_v2.csv"], VALIDATION: ["dev-small.csv"], TEST: ["test2.csv"]},
        ),
        (
            ("train.csv", "train_v2.csv", "dev_mismatched.csv"),
            {TRAIN: ["train.csv"], VALIDATION: ["dev_mismatched.csv"]},
        ),
        (
            ("dev_matched.csv", "dev_mismatched.csv", "train.csv"),
            {TRAIN: ["train.csv"], VALIDATION: ["dev_matched.csv"]},
        ),
        (("train.csv.gz", "VAL.tsv"), {TRAIN: ["train.csv.gz"], VALIDATION: ["VAL.tsv"]}),
    ],
)
def test_names_that_end_in_a_splits(tmp_path, names, found):
    assert files_of(folder_of(tmp_path, *names)) == found


def test_several_files_of_a_split_are_named(tmp_path):
    source = FileSource(folder_of(tmp_path, "a-train.csv", "b-train.csv"), "f")
    assert [path.name for path in source.paths(TRAIN)] == ["a-train.csv", "b-train.csv"]
    with pytest.raises(DataError, match=r"more than one of train\.\*.*it holds a-train\.csv, b-train\.csv"):
        source.path(TRAIN)
    assert source.paths(TEST) == []


def test_what_has_no_validation_split_is_split(tmp_path):
    folder = folder_of(tmp_path, "train.csv")
    assert FileSource(folder / "train.csv", "f").needs_held_out
    assert FileSource(folder, "f").needs_held_out
    assert find_test(folder) == folder / "train.csv"
    assert not FileSource(folder_of(tmp_path, "dev.csv"), "f").needs_held_out


def test_files_that_are_not_read_are_named(tmp_path):
    many = "text,label\n" + "".join(f"text {i},{'no' if i % 2 else 'yes'}\n" for i in range(20))
    for name in ("train.csv", "test.csv", "sample_submission.csv", "notes.txt"):
        (tmp_path / name).write_text(many)
    notes = load_texts(DatasetConfig(path=str(tmp_path))).notes
    held_out = "has no validation split: 10% of its training rows, 2, are held out"
    assert any(f"{held_out}; not read: sample_submission.csv" in note for note in notes)


def test_a_folders_only_file_is_its_training_split(tmp_path):
    assert files_of(folder_of(tmp_path, "reviews.csv", "readme.txt")) == {TRAIN: ["reviews.csv"]}
    assert files_of(folder_of(tmp_path, "more.csv")) == {}


@pytest.mark.parametrize("name", ["test.csv", "dev.csv"])
def test_a_file_of_another_split_is_not_trained_on(tmp_path, name):
    assert TRAIN not in files_of(folder_of(tmp_path, name))


# ---- as the hub lays files out -------------------------------------------------------------


def shards(folder: Path, split: str, count: int, rows_each: int = 4, end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rows = [{"text": f"{split} {i} {row}", "label": row % 2} for row in range(rows_each)]
        (folder / f"{split}-{i:05}-of-{count:05}{end}.parquet").write_bytes(parquet(rows, ("no", "yes")))


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize("end", ["", "-b42a775f407cee45"])
def test_shards_are_one_split_in_their_order(tmp_path, inside, end):
    shards(tmp_path / inside, "train", 3, end=end)
    shards(tmp_path / inside, "validation", 1, end=end)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    task = load_texts(DatasetConfig(path=str(tmp_path)))
    assert task.train.text == [f"train {i} {row}" for i in range(3) for row in range(4)]
    assert (task.label_names, len(task.validation)) == (("no", "yes"), 4)


def test_shards_of_text_files(tmp_path):
    for i in range(2):
        (tmp_path / f"train-{i:05}-of-00002.csv").write_text(f"text,label\na{i},no\n,yes\nb{i},yes\n")
    message = "train-00000-of-00002.csv and 1 more:3: column 'text' is empty"
    with pytest.raises(DataError, match=message):
        load_texts(DatasetConfig(path=str(tmp_path)))
    task = load_texts(DatasetConfig(path=str(tmp_path), on_bad_row="skip", validation_fraction=0.5))
    assert sorted(task.train.text + task.validation.text) == ["a0", "a1", "b0", "b1"]
    assert task.skipped_rows == {TRAIN: 2}


def test_a_missing_shard_is_named(tmp_path):
    shards(tmp_path, "train", 3)
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="train has 3 parts, and 1 of them are missing, the first train-00001-of-00003"):
        FileSource(tmp_path, "f")


def test_folders_of_a_splits_name(tmp_path):
    """As the hub converts datasets to parquet."""
    for split in ("train", "validation"):
        shards(tmp_path / split, "0000", 1)
    task = load_texts(DatasetConfig(path=str(tmp_path)))
    assert (len(task.train), len(task.validation)) == (4, 4)


def test_a_configuration_is_a_folder(tmp_path):
    for config in ("main", "socratic"):
        shards(tmp_path / config, "train", 1, rows_each=8 if config == "main" else 4)
    with pytest.raises(DataError, match=r"several configurations: set dataset\.path .* of them: main, socratic"):
        FileSource(tmp_path, "f")
    config = DatasetConfig(path=str(tmp_path), config="main", validation_fraction=0.5)
    assert len(load_texts(config).train) == 4
    (tmp_path / "socratic" / "train-00000-of-00001.parquet").unlink()
    assert len(load_texts(DatasetConfig(path=str(tmp_path), validation_fraction=0.5)).train) == 4


def test_a_file_is_read_once(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "train.csv", "dev.csv")
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    task = load_texts(DatasetConfig(path=str(folder)))
    assert len(task.train) == 2
    assert read == ["train.csv", "dev.csv"]


# ---- columns by number, class names --------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "header"),
    [
        (ColumnsConfig(), True),
        (ColumnsConfig(text="text", label="label"), True),
        (ColumnsConfig(text=0, label=1), False),
        (ColumnsConfig(label=["a", "b"]), True),
        (ColumnsConfig(label=[1, 2]), False),
    ],
)
def test_numbers_say_that_there_is_no_header(tmp_path, columns, header):
    folder = folder_of(tmp_path, "train.csv")
    rows = open_source(DatasetConfig(path=str(folder), columns=columns), None).read(TRAIN).rows
    assert len(rows) == (2 if header else 3)
    assert list(rows[0].values) == (["text", "label"] if header else ["0", "1"])


def test_class_names_in_a_parquet_files_metadata(tmp_path):
    rows = [{"text": f"t {i}", "label": i % 3} for i in range(9)]
    (tmp_path / "train.parquet").write_bytes(parquet(rows, ("good", "bad", "so-so")))
    (tmp_path / "dev.parquet").write_bytes(parquet(rows[:4], ("good", "bad", "so-so")))
    source = FileSource(tmp_path, "f")
    assert source.class_names(TRAIN, "label") == ("good", "bad", "so-so")
    assert source.class_names(TRAIN, "text") is None
    task = load_texts(DatasetConfig(path=str(tmp_path)))
    assert task.label_names == ("good", "bad", "so-so")
    assert task.train.labels == [0, 1, 2] * 3
    other = load_texts(DatasetConfig(path=str(tmp_path), labels=["bad", "good", "so-so"]))
    assert other.train.labels == [1, 0, 2] * 3
    assert load_texts(DatasetConfig(path=str(tmp_path), labels=["a", "b", "c"])).train.labels == [0, 1, 2] * 3


def test_a_parquet_file_without_class_names(tmp_path):
    rows = [{"text": f"t {i}", "label": i % 3} for i in range(9)]
    (tmp_path / "train.parquet").write_bytes(parquet(rows))
    assert FileSource(tmp_path, "f").class_names(TRAIN, "label") is None


# ---- known by name -------------------------------------------------------------------------


def test_a_name_that_several_kinds_know(monkeypatch):
    """The first kind's, unless dataset.task asks for another."""
    scores = KnownDataset(repository="owner/scores", columns={"label": "score"})
    monkeypatch.setattr(Regression, "datasets", {**Regression.datasets, "rte": scores})
    labels = task_class("classification").datasets["rte"]
    for task, kind, dataset in (
        ("auto", "classification", labels),
        ("classification", "classification", labels),
        ("regression", "regression", scores),
    ):
        config = DatasetConfig(name="rte", task=task)
        found = find_known(config)
        assert (found.kind, found.dataset) == (kind, dataset)
        assert kind_of(config) == kind


def test_a_known_dataset_of_another_kind_is_found_where_it_is(fake_hub):
    """Its labels and columns are those of the kind that knows it, and mean nothing here."""
    known = task_class("classification").datasets["rte"]
    found = find_known(DatasetConfig(name="rte", task="regression"))
    assert (found.kind, found.dataset) == ("regression", replace(known, labels=None, f1_label=None))
    rows = [
        {"question": f"How many are {i} and 1?", "answer": f"{i}+1\n#### {i + 1}", "label": i % 2} for i in range(9)
    ]
    fake_hub.add(
        "dataset", "openai/gsm8k", {"README.md": card({"main": {"train": "a.parquet"}}), "a.parquet": parquet(rows)}
    )
    task = load_task(
        DatasetConfig(name="gsm8k", task="classification", columns=ColumnsConfig(text="question", label="label"))
    )
    assert (task.kind, task.name, task.label_names) == ("classification", "gsm8k", ("0", "1"))


@pytest.mark.parametrize("name", ["embedded-nli", "embedded-word-problems"])
def test_what_the_package_makes_is_of_one_kind(name):
    with pytest.raises(DataError, match=f"dataset.task=multi-label: {name} is of the kind .*leave dataset.task out"):
        find_known(DatasetConfig(name=name, task="multi-label"))


def test_a_name_that_nobody_knows():
    assert find_known(DatasetConfig(name="owner/name")) is None
    assert find_known(DatasetConfig(name="local")) is None


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_stsb_as_it_lies_on_a_disk():
    columns = ColumnsConfig(text=5, text_pair=6, label=4)
    task = load_task(DatasetConfig(name="stsb", path=str(DATA / "stsb"), columns=columns))
    assert (task.kind, task.name) == ("regression", "stsb")
    assert (len(task.texts.train), len(task.texts.validation)) == (5_749, 1_500)
    assert task.texts.train.text[0] == "a plane is taking off ."
    assert task.texts.train.labels[:3] == [5.0, 3.8, 3.8]
