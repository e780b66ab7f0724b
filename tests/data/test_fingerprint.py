"""Data are known again by their rows, and what has changed about them is said."""

from __future__ import annotations

import random
import string

import pytest

from fastpeft.data.fingerprint import Fingerprint, ReadRow, differences

TRAIN = [ReadRow((f"text {i}",), ("ab"[i % 2],)) for i in range(10)]
DEV = [ReadRow((f"other {i}",), ("ab"[i % 2],)) for i in range(4)]


def of(train: list[ReadRow], dev: list[ReadRow] | None = None, **more: list[ReadRow]) -> Fingerprint:
    return Fingerprint.of({"train": train, "validation": DEV if dev is None else dev} | more)


def test_the_same_rows_have_the_same_hash_wherever_they_are_read_from() -> None:
    first, again = (
        of(TRAIN),
        Fingerprint.of({"validation": iter(DEV), "train": (ReadRow([*g], [*w]) for g, w in TRAIN)}),
    )
    assert first == again
    assert first.sha256 == again.sha256
    assert list(differences(first, again)) == []
    assert Fingerprint.from_json(first.to_json()) == first


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (of(TRAIN[:-1]), "the train split has 9 rows and had 10"),
        (of([*TRAIN, TRAIN[0]]), "the train split has 11 rows and had 10"),
        (of(TRAIN[::-1]), "the rows of the train split stand in another order"),
        (of([ReadRow(given, ("c",)) for given, _ in TRAIN]), "the labels or answers of the train split are others"),
        (
            of([ReadRow((f"{given[0]}.",), wanted) for given, wanted in TRAIN]),
            "the texts of the train split are others",
        ),
        (of(TRAIN, [ReadRow((f"{given[0]}.",), ("c",)) for given, _ in DEV]), "the validation split has other rows"),
        (of([*TRAIN[1:], DEV[0]], [TRAIN[0], *DEV[1:]]), "the same 14 rows are split otherwise"),
        (of([*TRAIN, DEV[0]], DEV[1:]), "the same 14 rows are split otherwise"),
        (of(TRAIN, test=DEV), "there is a test split, and there was none"),
        (Fingerprint.of({"train": TRAIN}), "the validation split is gone"),
    ],
)
def test_what_has_changed_is_said_in_one_clause(now: Fingerprint, words: str) -> None:
    (said,) = differences(of(TRAIN), now)
    assert said.startswith(words)
    assert now.sha256 != of(TRAIN).sha256


def test_several_changes_are_all_said() -> None:
    assert len(list(differences(of(TRAIN), of(TRAIN[:3], DEV[::-1], test=DEV)))) == 3


def test_no_text_looks_like_two(seed: int) -> None:
    """Where one text ends and the next begins is part of what is hashed."""
    rng, found = random.Random(seed), {}
    marks = [*"'\",\\;:()0123 \n\0\t", "\ud800", "é", "\u2028", *string.ascii_letters[:3]]
    rows = [ReadRow(("a,", "b"), ()), ReadRow(("a", ",b"), ()), ReadRow(("a", "b"), ()), ReadRow(("a",), ("b",))]
    rows += [
        ReadRow(
            tuple("".join(rng.choices(marks, k=rng.randrange(4))) for _ in range(rng.randrange(3))),
            tuple("".join(rng.choices(marks, k=rng.randrange(3))) for _ in range(rng.randrange(2))),
        )
        for _ in range(2000)
    ]
    for row in rows:
        assert found.setdefault(Fingerprint.of({"train": [row]}).sha256, row) == row
    assert len({one.unordered for one in (Fingerprint.of({"t": [row]}).splits["t"] for row in rows)}) == len(set(rows))
