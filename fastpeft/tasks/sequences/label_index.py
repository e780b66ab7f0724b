"""Label names and their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fastpeft.data.rows import DataError
from fastpeft.data.source import TRAIN, Source


class LabelIndex:
    """Label names to numbers. Takes a name, or a name's number if no name is itself a number."""

    MISSING = (None, "", "-", "-1")
    """Values that datasets use for a missing label. `marks_no_label` decides whether the last two are classes."""

    def __init__(self, names: tuple[str, ...], take_numbers: bool = True) -> None:
        self.names = names
        self._numbers = {name: i for i, name in enumerate(names)}
        if take_numbers and not any(map(is_whole_number, names)):
            self._numbers |= {str(i): i for i in range(len(names))}

    @classmethod
    def from_values(cls, values: set[str]) -> LabelIndex:
        """Labels found in training data, sorted; whole numbers by value. No dataset defines this
        order, so that a number is not accepted for a name."""
        key: Callable = int if all(map(is_whole_number, values)) else str
        return cls(tuple(sorted(values, key=key)), take_numbers=False)

    def __call__(self, value: str | None) -> int | None:
        return None if value is None else self._numbers.get(value)


def marks_no_label(counts: Mapping[str | None, int]) -> set[str | None]:
    """The values of LabelIndex.MISSING that are not classes, by the frequency of each label in the training rows.

    -1 is a class among whole numbers, and - among signs such as +, if it is at least a tenth as common as the others
    are in the mean. Datasets have a percent of rows without gold label, or whole test splits.
    """
    missing: set[str | None] = set(LabelIndex.MISSING)
    others = {label: count for label, count in counts.items() if label is not None and label not in missing}
    for mark, is_alike in (("-1", is_whole_number), ("-", _is_sign)):
        is_common = 10 * counts.get(mark, 0) * len(others) >= sum(others.values())
        if others and counts.get(mark) and is_common and all(map(is_alike, others)):
            missing.discard(mark)
    return missing


def class_names(source: Source, column: str, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Name of each class number in the data; None for a column that holds the labels themselves.

    Args:
        labels: names from the user or from the built-in settings of the dataset.

    Raises:
        DataError: the numbers of labels and of classes differ.
    """
    names = source.class_names(TRAIN, column)
    if names is None or labels is None or set(labels) == set(names):
        return names
    if len(labels) != len(names):
        raise DataError(
            f"dataset.labels: {len(labels)} names are given, but column {column!r} of {source.name} has {len(names)} "
            f"classes: {', '.join(names)}"
        )
    return labels


def is_whole_number(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", name) is not None


def _is_sign(name: str) -> bool:
    return not any(map(str.isalnum, name))
