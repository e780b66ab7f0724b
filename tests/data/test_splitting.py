"""What is held out, what is sampled, and what stands on both sides."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.data.splitting import hold_out, num_shared, sample, sample_note, shared_note
from tests.support.real_data import DATA


def parted(texts, classes, fraction):
    kept, held_out = hold_out(texts, classes, fraction)
    assert sorted(kept + held_out) == list(range(len(texts)))
    assert kept == sorted(kept)
    assert held_out == sorted(held_out)
    return kept, held_out


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_each_class_is_held_out_in_its_share(fraction, seed):
    rng = random.Random(seed)
    classes = [(rng.choices("abc", (70, 25, 5))[0],) for _ in range(400)]
    _, held_out = parted([(i,) for i in range(400)], classes, fraction)
    assert len(held_out) == 400 * fraction
    every, there = Counter(classes), Counter(classes[row] for row in held_out)
    assert all(abs(there[one] - count * fraction) < 1 for one, count in every.items())


def test_of_two_rows_of_a_class_one_is_on_each_side():
    classes = [("rare",) if row in (3, 17) else ("usual",) for row in range(200)]
    _, held_out = parted([(row,) for row in range(200)], classes, 0.1)
    assert sum(classes[row] == ("rare",) for row in held_out) == 1


def test_a_class_of_one_row_is_trained_on():
    classes = [("rare",) if row == 3 else ("usual",) for row in range(50)]
    assert 3 in parted([(row,) for row in range(50)], classes, 0.5)[0]


@given(data=st.data(), num_texts=st.integers(2, 40), num_columns=st.integers(1, 2), fraction=st.floats(0.05, 0.5))
@settings(max_examples=60, deadline=None)
def test_equal_rows_are_on_one_side(data, num_texts, num_columns, fraction):
    texts = [tuple(f"{column} {i}" for column in range(num_columns)) for i in range(num_texts)]
    rows = data.draw(st.lists(st.sampled_from(texts), min_size=2 * num_texts, max_size=4 * num_texts))
    classes = data.draw(st.lists(st.sets(st.integers(0, 3)), min_size=len(rows), max_size=len(rows)))
    kept, held_out = parted(rows, classes, fraction)
    assert kept
    assert held_out
    assert len(set(rows)) == 1 or not {rows[row] for row in kept} & {rows[row] for row in held_out}


def test_rows_that_share_a_text_of_either_column_are_on_one_side():
    """As MNLI's premises have three hypotheses each, and BoolQ's passages several questions."""
    texts = [(f"question {row}", f"passage {row // 3}") for row in range(90)]
    kept, held_out = parted(texts, [()] * 90, 0.2)
    assert num_shared([texts[row] for row in kept], [texts[row] for row in held_out]) == (0, [0, 0])
    assert len(held_out) == 18


def test_where_all_hang_together_the_column_of_longer_texts_decides():
    texts = [("yes" if row % 2 else "no", f"a passage of several words, number {row // 2}") for row in range(60)]
    kept, held_out = parted(texts, [()] * 60, 0.2)
    shared, (_, by_passage) = num_shared([texts[row] for row in kept], [texts[row] for row in held_out])
    assert (shared, by_passage) == (0, 0)
    assert len(held_out) == 12


def test_texts_that_are_all_equal_are_split_nevertheless():
    kept, held_out = parted([("a",)] * 10, [("x",)] * 10, 0.2)
    assert (len(kept), len(held_out)) == (8, 2)


def test_the_split_is_the_same_every_time():
    texts = [(f"{row % 40}",) for row in range(120)]
    assert hold_out(texts, [()] * 120, 0.1) == hold_out(texts, [()] * 120, 0.1)


def test_a_sample_is_no_head():
    assert sample(5, 0) == sample(5, 5) == sample(5, 9) == [0, 1, 2, 3, 4]
    drawn = sample(200, 50)
    assert len(set(drawn)) == 50
    assert drawn == sorted(drawn) == sample(200, 50)
    assert 10 < sum(row >= 100 for row in drawn) < 40
    assert sample_note(5, 9, "rows") == sample_note(5, 0, "rows") == []
    (note,) = sample_note(200, 50, "validation rows")
    assert note.startswith("scored on 50 of 200 validation rows, drawn at random")


def test_what_is_shared_is_counted_as_a_whole_and_by_column():
    texts = [("q1", "p1"), ("q2", "p1"), ("q3", "p2")]
    assert num_shared(texts, [("q1", "p1"), ("q1", "p2"), ("q9", "p1"), ("q9", "p9")]) == (1, [2, 3])


# ---- real files ----------------------------------------------------------------------------


def pairs_of(path: str, *columns: str) -> list[tuple[str, ...]]:
    rows = map(json.loads, (DATA / path).read_text(encoding="utf-8").splitlines())
    return [tuple(row[column] for column in columns) for row in rows]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_passages_of_boolq_stand_in_both_of_its_splits():
    train, dev = (pairs_of(f"boolq/{split}.jsonl", "question", "passage") for split in ("train", "dev"))
    said = "of 500 validation rows these stand in the training rows too: 80 (16.0%) by 'passage'"
    assert shared_note(train, dev, "validation rows", ("question", "passage")) == [said]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_no_premise_and_no_hypothesis_of_snli_stands_on_both_sides():
    texts = pairs_of("snli/dev.jsonl", "premise", "hypothesis")
    kept, held_out = parted(texts, [()] * len(texts), 0.1)
    assert num_shared([texts[row] for row in kept], [texts[row] for row in held_out]) == (0, [0, 0])
    assert len(held_out) == 984
