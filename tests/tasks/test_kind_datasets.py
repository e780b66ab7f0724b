"""Datasets of entities, scores and several labels by their names, from a hub on loopback that is laid out as theirs."""

from __future__ import annotations

import io
from typing import Any

import pytest

from fastpeft.config import load_run
from fastpeft.data.rows import DataError
from fastpeft.tasks import load_task
from fastpeft.tasks.multi_label.task import MultiLabel
from fastpeft.tasks.regression.task import Regression
from fastpeft.tasks.token_classification.task import TokenClassification
from tests.support.fake_hub import FakeHub
from tests.support.hub_files import GLUE, card

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
EMOTIONS = ["admiration", "anger", "neutral"]


def parquet(columns: dict[str, list], features: dict[str, Any]) -> bytes:
    from datasets import Dataset, Features

    file = io.BytesIO()
    Dataset.from_dict(columns, features=Features(features)).to_parquet(file)
    return file.getvalue()


def repository(config: str, data: bytes, splits: tuple[str, ...]) -> dict[str, bytes]:
    files = {f"{config}/{split}-00000-of-00001.parquet": data for split in splits}
    return {"README.md": card({config: {split: f"{config}/{split}-*" for split in splits}}), **files}


@pytest.mark.parametrize(
    ("name", "owner", "config"),
    [("conll2003", "eriktks/conll2003", "conll2003"), ("wnut17", "leondz/wnut_17", "wnut_17")],
)
def test_entities_come_from_the_hubs_own_conversion(name: str, owner: str, config: str, fake_hub: FakeHub) -> None:
    from datasets import ClassLabel, List, Value

    features = {"id": Value("string"), "tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=TAGS))}
    rows = {"id": ["0", "1"], "tokens": [["Anna", "Berg", "sleeps"], ["in", "Oslo"]], "ner_tags": [[1, 2, 0], [0, 3]]}
    converted = fake_hub.add("dataset", owner, {"script.py": b"raise RuntimeError"})
    files = repository(config, parquet(rows, features), ("train", "validation", "test"))
    converted.commit(files, "refs/convert/parquet")
    task = load_task(load_run(f"lora_{name}").dataset)
    assert isinstance(task, TokenClassification)
    assert task.label_names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert task.splits.train.tags == [["B-PER", "I-PER", "O"], ["O", "B-LOC"]]
    assert task.has_test


def test_sts_b_is_a_task_of_glue_with_scores(fake_hub: FakeHub) -> None:
    from datasets import Value

    features = {"sentence1": Value("string"), "sentence2": Value("string"), "label": Value("float32")}
    rows = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [0.0, 2.5, 5.0]}
    fake_hub.add("dataset", GLUE, repository("stsb", parquet(rows, features), ("train", "validation")))
    task = load_task(load_run("lora_stsb").dataset)
    assert isinstance(task, Regression)
    assert (task.texts.train.text_pair, task.texts.train.labels) == (["d", "e", "f"], [0.0, 2.5, 5.0])


def test_whole_scores_of_sts_b_are_scores_because_of_its_name(fake_hub: FakeHub) -> None:
    from datasets import Value

    features = {"sentence1": Value("string"), "sentence2": Value("string"), "label": Value("float32")}
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.0, 5.0]}
    fake_hub.add("dataset", GLUE, repository("stsb", parquet(rows, features), ("train", "validation")))
    assert isinstance(load_task(load_run("iwlora_stsb").dataset), Regression)


def test_emotions_are_several_labels_by_the_names_of_their_classes(fake_hub: FakeHub) -> None:
    from datasets import ClassLabel, List, Value

    features = {"text": Value("string"), "labels": List(ClassLabel(names=EMOTIONS)), "id": Value("string")}
    rows = {"text": ["x", "y", "z"], "labels": [[2], [0, 1], [1]], "id": ["a", "b", "c"]}
    files = repository("simplified", parquet(rows, features), ("train", "validation", "test"))
    fake_hub.add("dataset", "google-research-datasets/go_emotions", files)
    task = load_task(load_run("lora_goemotions").dataset)
    assert isinstance(task, MultiLabel)
    assert task.label_names == tuple(EMOTIONS)
    assert [list(labels) for labels in task.texts.train.labels] == [[0, 0, 1], [1, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("name", ["embedded-similarity", "embedded-topics", "embedded-entities"])
def test_generated_data_are_of_their_own_kind(name: str) -> None:
    run = load_run("lora_mnli", {"dataset.name": name, "dataset.task": "classification"})
    with pytest.raises(DataError, match=rf"{name} is of the kind .*; leave dataset\.task out"):
        load_task(run.dataset)
