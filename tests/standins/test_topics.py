"""Generated texts with several labels: the labels are what the sentences state."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from fastpeft.standins import PATHS, topics
from fastpeft.standins.sentence_grammar import FRAMES, LEXICON
from fastpeft.standins.topics import LABELS

CLASS_OF = {word: group[0] for group in LEXICON["train"].verbs for word in group}
DENIES = ("no ", "not one ", "not every ")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, list[str]]]]:
    return {"train": topics.train_texts(), "validation": topics.validation_texts()}


def stated(text: str) -> set[str]:
    """A second reading: a sentence denies once by its determiner, once by "never", once by "it is false"."""
    found = set()
    for sentence in text.removesuffix(" .").split(" . "):
        body = sentence
        for start in ("it is true that ", "it is false that ", "there was ", "it was "):
            body = body.removeprefix(start)
        denials = sentence.startswith("it is false") + body.startswith(DENIES) + (" never " in body)
        if denials % 2 == 0:
            found |= {CLASS_OF[word] for word in body.split() if word in CLASS_OF}
    return found


def test_the_splits_have_their_sizes_and_no_text_twice(splits):
    assert {name: len({text for text, _ in rows}) for name, rows in splits.items()} == {
        "train": 8000,
        "validation": 1000,
    }


def test_the_labels_are_what_the_sentences_state(splits):
    for rows in splits.values():
        for text, labels in rows:
            assert labels == sorted(stated(text)), text


def test_rows_have_none_to_three_labels_and_every_label_is_as_frequent(splits):
    for rows in splits.values():
        counts = Counter(label for _, labels in rows for label in labels)
        assert set(counts) == set(LABELS)
        assert min(counts.values()) > 0.7 * max(counts.values())
        sizes = Counter(len(labels) for _, labels in rows)
        assert set(sizes) == {0, 1, 2, 3}
        assert all(count > 0.05 * len(rows) for count in sizes.values())


def test_a_verb_alone_does_not_tell_its_label(splits):
    """Some of the sentences deny what they name."""
    for rows in splits.values():
        named = sum(CLASS_OF[w] not in labels for text, labels in rows for w in text.split() if w in CLASS_OF)
        assert named > 0.2 * len(rows)


def test_validation_has_frames_that_training_lacks():
    assert not {frame.text for frame in FRAMES["train"]} & {frame.text for frame in FRAMES["validation"]}


def test_the_shipped_encoder_knows_every_word(splits):
    vocabulary = set(json.loads((PATHS["deberta_tiny"] / "tokenizer.json").read_text())["model"]["vocab"])
    assert {word for rows in splits.values() for text, _ in rows for word in text.split()} <= vocabulary


def test_another_process_makes_the_same_rows_in_less_than_a_second(splits):
    code = "import json; from fastpeft.standins import topics; print(json.dumps(topics.splits()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["train"] == [{"text": text, "labels": labels} for text, labels in splits["train"]]
    began = time.process_time()
    topics.splits()
    assert time.process_time() - began < 1
