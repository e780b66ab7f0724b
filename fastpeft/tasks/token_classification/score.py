"""Strict entity scores: an entity is correct if its span and its type match exactly, in IOB2."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TypeScore:
    """All but the support are 0 to 1."""

    precision: float
    recall: float
    f1: float
    support: int
    """Entities in the gold tags."""


@dataclass(frozen=True)
class EntityScores:
    """Micro averages over all entities, the same for each type, and the share of words with the right tag."""

    precision: float
    recall: float
    f1: float
    support: int
    per_type: dict[str, TypeScore]
    """By entity type, sorted; with types that are nowhere."""
    token_accuracy: float


def score_entities(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], label_names: Sequence[str]
) -> EntityScores:
    """Compare predicted with gold tags, one a word.

    A prediction that is no legal IOB2 is no entity: I-X after O, after another type, or at the start. A score whose
    denominator is 0 is 0.

    Args:
        label_names: O, and B- and I- of each type: the tags that occur.

    Raises:
        ValueError: sentences of other lengths.
    """
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    types = sorted({name[2:] for name in label_names if name != "O"})
    true, said = _numbered(gold, label_names), _numbered(predicted, label_names)
    zero: Any = 0  # seqeval's annotation says text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of its macro average, unread, where there is no entity
        # Without `mode` the scheme is ignored, without `scheme` the mode, both silently.
        report: Any = classification_report(
            true, said, mode="strict", scheme=IOB2, zero_division=zero, output_dict=True
        )
    total = _type_score(report["micro avg"])
    pairs = [(one, other) for one_s, other_s in zip(true, said) for one, other in zip(one_s, other_s)]
    return EntityScores(
        precision=total.precision,
        recall=total.recall,
        f1=total.f1,
        support=total.support,
        per_type={name: _type_score(report.get(str(number))) for number, name in enumerate(types)},
        token_accuracy=sum(one == other for one, other in pairs) / max(1, len(pairs)),
    )


def count_entities(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], label_names: Sequence[str]
) -> Iterator[tuple[int, int, int]]:
    """Of each sentence (entities found rightly, found, there), as `score_entities` counts them."""
    from seqeval.scheme import IOB2, Entities

    true, said = (Entities(_numbered(split, label_names), IOB2).entities for split in (gold, predicted))
    for is_there, found in zip(true, said, strict=True):
        yield len(set(is_there) & set(found)), len(found), len(is_there)


def _numbered(sentences: Sequence[Sequence[str]], label_names: Sequence[str]) -> list[list[str]]:
    """Types as numbers: seqeval strips hyphens off names, and puts its averages among them."""
    types = sorted({name[2:] for name in label_names if name != "O"})
    numbered = {name: name if name == "O" else f"{name[0]}-{types.index(name[2:])}" for name in label_names}
    return [[numbered[tag] for tag in tags] for tags in sentences]


def _type_score(row: dict[str, Any] | None) -> TypeScore:
    if row is None:
        return TypeScore(0.0, 0.0, 0.0, 0)
    return TypeScore(float(row["precision"]), float(row["recall"]), float(row["f1-score"]), int(row["support"]))
