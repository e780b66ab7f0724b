"""Generated pairs with a score: what the score says is in the sentences."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from fastpeft.standins import PATHS, similarity
from fastpeft.standins.sentence_grammar import LEXICON

Pairs = list[tuple[str, str, float]]


@pytest.fixture(scope="module")
def splits() -> dict[str, Pairs]:
    return {"train": similarity.train_pairs(), "validation": similarity.validation_pairs()}


def groups_of(split: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Each content word's field, and its class."""
    lexicon = LEXICON[split]
    fields = {"noun": lexicon.agents, "property": lexicon.verbs, "adjective": lexicon.antonyms}
    return {word: (field, frozenset(group)) for field, groups in fields.items() for group in groups for word in group}


def test_the_splits_have_their_sizes_and_no_pair_twice(splits):
    assert {name: len({row[:2] for row in rows}) for name, rows in splits.items()} == {
        "train": 8000,
        "validation": 1000,
    }
    assert all(one != other for rows in splits.values() for one, other, _ in rows)


def test_scores_reach_from_0_to_5_with_something_at_every_height(splits):
    for rows in splits.values():
        counts = Counter(int(score) for *_, score in rows)
        assert (min(score for *_, score in rows), max(score for *_, score in rows)) == (0.0, 5.0)
        assert all(counts[height] > 0.02 * len(rows) for height in range(6))
        assert len({score for *_, score in rows}) > 10


def test_the_score_adds_up_what_the_words_have_in_common(splits):
    """Read back from the texts; what is left of each score is the quantifier's part."""
    for split, rows in splits.items():
        known = groups_of(split)
        for one, other, score in rows:
            points = 0.0
            found = [{known[w][0]: w for w in text.split() if w in known} for text in (one, other)]
            assert found[0].keys() == found[1].keys() == {"noun", "property", "adjective"}
            for field in found[0]:
                words = [words[field] for words in found]
                kin = known[words[0]][1] == known[words[1]][1] and field != "adjective"
                share = 1.0 if words[0] == words[1] else similarity.KIN if kin else 0.0
                points += similarity.POINTS[field] * share
            assert score - points in (0.0, similarity.POINTS["quantifier"])


def test_the_splits_share_no_content_word_and_the_encoder_knows_them_all(splits):
    words = {
        name: {w for one, other, _ in rows for w in f"{one} {other}".split() if w in groups_of(name)}
        for name, rows in splits.items()
    }
    assert not words["train"] & words["validation"]
    vocabulary = set(json.loads((PATHS["deberta_tiny"] / "tokenizer.json").read_text())["model"]["vocab"])
    assert {w for rows in splits.values() for one, other, _ in rows for w in f"{one} {other}".split()} <= vocabulary


def test_another_process_makes_the_same_rows_in_less_than_a_second(splits):
    code = "import json; from fastpeft.standins import similarity; print(json.dumps(similarity.splits()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["validation"] == [
        {"sentence1": one, "sentence2": other, "score": score} for one, other, score in splits["validation"]
    ]
    began = time.process_time()
    similarity.splits()
    assert time.process_time() - began < 1
