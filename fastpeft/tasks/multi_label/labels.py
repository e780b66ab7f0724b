"""Formats of a row's labels: one list, a vector of zeros and ones, or one column per label."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.rows import DataError, Row, label_text
from fastpeft.tasks.label_spelling import nearest_spelling
from fastpeft.tasks.sequences.label_index import LabelIndex
from fastpeft.tasks.sequences.reading import TextSplit

Reader = Callable[[Row], list[float]]
"""Of a row a zero or a one for each label."""

_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")
_IN_VECTORS = {"1": 1.0, "True": 1.0, "0": 0.0, "False": 0.0}


class ListedLabels:
    """One column with the list of a row's labels, by names or by numbers.

    Where all lists are as long as one another, of zeros and ones, and no lists of distinct labels, they are vectors: a
    place for each label.
    """

    def __init__(self, names: tuple[str, ...] | None) -> None:
        """
        Args:
            names: of the labels, in the order of their numbers; None takes those of the training rows.
        """
        self._given = names
        self._index = LabelIndex(names) if names else None
        self._width: int | None = None
        """Of the training rows' vectors; 0 for lists."""

    @property
    def names(self) -> tuple[str, ...]:
        assert self._index is not None
        return self._index.names

    def fault(self, values: dict[str, Any], column: str) -> str | None:
        if listed(values.get(column)) is None:
            return f"column {column!r} holds {values.get(column)!r:.80}, expected a list of labels"
        return None

    def reader(self, split: TextSplit) -> Reader:
        """Raises DataError for labels that cannot be told; the reader does for an unknown one."""
        column = split.columns.label
        lists = [_labels(row, column) for row in split.rows]
        if self._width is None:
            self._width = _width_of_vectors(lists)
            self._index = self._choose_index(lists, split.source)
        index, width = self._index, self._width
        assert index is not None

        def from_vector(row: Row) -> list[float]:
            found = _labels(row, column)
            if len(found) != width or not _is_vector(found):
                raise DataError(
                    f"{split.source}:{row.line}: column {column!r} holds {row.values[column]!r:.80}, expected {width} "
                    "zeros and ones, as in the training rows before it"
                )
            return [_IN_VECTORS[one] for one in found]

        def from_list(row: Row) -> list[float]:
            given = [0.0] * len(index.names)
            for label in _labels(row, column):
                number = index(label)
                if number is None:
                    near = nearest_spelling(label, index.names)
                    spelling = f"It differs from {near!r} in spelling only: write them alike. " if near else ""
                    raise DataError(
                        f"{split.source}:{row.line}: unknown label {label!r}; known: {', '.join(index.names)}. "
                        f"{spelling}Name every label in dataset.labels, in the order of their numbers"
                    )
                given[number] = 1.0
            return given

        return from_vector if width else from_list

    def _choose_index(self, lists: list[list[str]], source: str) -> LabelIndex:
        if self._width:
            names = self._given or tuple(map(str, range(self._width)))
            if len(names) != self._width:
                raise DataError(
                    f"{source}: the rows hold vectors of {self._width} zeros and ones, but {len(names)} labels are "
                    "named: name one for each place in dataset.labels"
                )
            return LabelIndex(names)
        if self._index is not None:
            return self._index
        found = {label for labels in lists for label in labels}
        if not found:
            raise DataError(f"{source}: no row has a label; set dataset.columns.label, or name the labels")
        return LabelIndex.from_values(found)


class LabelColumns:
    """A column of zeros and ones for each label."""

    def __init__(self, config: DatasetConfig) -> None:
        assert isinstance(config.columns.label, list)
        self._columns = [str(column) for column in config.columns.label]
        self.names = tuple(config.labels or self._columns)
        if len(self.names) != len(self._columns):
            raise DataError(
                f"dataset.labels: {len(self.names)} names are given for the {len(self._columns)} columns of "
                "dataset.columns.label"
            )

    def fault(self, values: dict[str, Any], column: str) -> str | None:
        for name in self._columns:
            if _flag(values.get(name)) is None:
                return f"column {name!r} holds {values.get(name)!r:.80}, expected 0 or 1"
        return None

    def reader(self, split: TextSplit) -> Reader:
        return lambda row: [float(_flag(row.values[name]) or 0.0) for name in self._columns]


def listed(value: Any) -> list[str] | None:
    """The labels in a list, or in one written as JSON or as Python has it, as csv files hold them; None for anything
    else."""
    if isinstance(value, str):
        value = _parsed(value.strip())
    if not isinstance(value, (list, tuple)) or any(isinstance(one, (list, tuple, dict)) for one in value):
        return None
    labels = [label_text(one) for one in value]
    return [label for label in labels if label is not None] if all(labels) else None


def _parsed(text: str) -> Any:
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _labels(row: Row, column: str) -> list[str]:
    found = listed(row.values[column])
    assert found is not None
    return found


def _width_of_vectors(lists: list[list[str]]) -> int:
    """How many places the vectors have; 0 for lists of labels, none of which names a label twice."""
    width = len(lists[0])
    alike = width > 1 and all(len(labels) == width and _is_vector(labels) for labels in lists)
    return width if alike and any(len(set(labels)) < width for labels in lists) else 0


def _is_vector(labels: list[str]) -> bool:
    return all(label in _IN_VECTORS for label in labels)


def _flag(value: Any) -> bool | None:
    """None for what is neither yes nor no."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    text = value.strip().lower() if isinstance(value, str) else None
    return True if text in _YES else False if text in _NO else None
