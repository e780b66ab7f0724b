"""The generated entities: legal, deterministic, with the cases that make the task one."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import pytest

from fastpeft.standins import PATHS, entities
from fastpeft.standins.entities import LABELS

SPLITS = {
    "train": entities.train_sentences,
    "validation": entities.validation_sentences,
    "test": entities.test_sentences,
}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[entities.Tagged]]:
    return {name: make() for name, make in SPLITS.items()}


def test_the_splits_have_their_sizes_and_no_sentence_twice(splits):
    texts = {name: {" ".join(words) for words, _ in rows} for name, rows in splits.items()}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6000, "validation": 800, "test": 800}
    assert {name: len(rows) for name, rows in texts.items()} == {"train": 6000, "validation": 800, "test": 800}


def test_tags_are_legal_iob2_and_every_label_occurs_in_every_split(splits):
    for rows in splits.values():
        for words, tags in rows:
            assert len(words) == len(tags) > 0
            assert all(tag[0] != "I" or before[2:] == tag[2:] for before, tag in pairwise(["O", *tags]))
        assert {tag for _, tags in rows for tag in tags} == set(LABELS)


def test_another_process_makes_the_same_sentences(splits):
    code = "import json; from fastpeft.standins import entities; print(json.dumps(entities.validation_sentences()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == [list(row) for row in splits["validation"]]


def test_made_names_of_validation_and_test_stand_in_no_other_split(splits):
    vocabulary = _vocabulary()
    made = {
        name: {w for words, _ in rows for w in words if w.lower() not in vocabulary} for name, rows in splits.items()
    }
    assert all(made.values())
    assert not made["train"] & (made["validation"] | made["test"])
    assert not made["validation"] & made["test"]


def test_the_shipped_encoder_knows_every_word_but_made_names(splits):
    vocabulary = _vocabulary()
    for rows in splits.values():
        unknown = {
            w for words, tags in rows for w, tag in zip(words, tags) if tag == "O" and w.lower() not in vocabulary
        }
        assert not unknown


def test_there_are_long_neighbouring_and_no_entities_and_words_that_are_both(splits):
    for rows in splits.values():
        lengths, neighbours = set(), set()
        for _, tags in rows:
            starts = [i for i, tag in enumerate(tags) if tag[0] == "B"]
            lengths |= {_end(tags, i) - i for i in starts} or {0}
            neighbours |= {(tags[i - 1][2:] == tags[i][2:]) for i in starts if i and tags[i - 1] != "O"}
        assert {0, 1, 2, 3} <= lengths
        assert neighbours == {True, False}
        inside = {w.lower() for words, tags in rows for w, tag in zip(words, tags) if tag != "O"}
        outside = {w.lower() for words, tags in rows for w, tag in zip(words, tags) if tag == "O"}
        assert {"lake", "school", "castle"} <= inside & outside
        assert len(inside & outside) >= 20


def _end(tags: list[str], start: int) -> int:
    end = start + 1
    while end < len(tags) and tags[end][0] == "I":
        end += 1
    return end


def _vocabulary() -> set[str]:
    path = PATHS["deberta_tiny"]
    return set(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"])
