"""From rows with named columns, wherever they were read, to a task: columns, labels, bad rows, the held-out part."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.task import ClassificationTask, DataError, Examples, LabelIndex

MAX_INFERRED_LABELS = 100
"""More different values, and more than one in ten rows: not labels, unless they are named."""

_TEXT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "passage"),
    ("text", "text_pair"),
)
_TEXTS = ("sentence", "text", "review", "content")
_LABELS = ("label", "labels", "gold_label", "answer", "class")


@dataclass(frozen=True)
class Row:
    """A row as read. `fault` says why it could not be read; then `values` is empty."""

    line: int
    values: dict[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class Split:
    source: str
    """Names it in messages: a file, or a dataset and its split."""
    rows: list[Row]


def build_task(
    config: DatasetConfig, name: str, train: Split, validation: Split | None, labels: tuple[str, ...] | None = None
) -> ClassificationTask:
    """The task in `train` and `validation`; without the latter a part of the training rows is held out.

    `labels` are the data's own names, used unless the config names others.

    Raises:
        DataError: a missing column, a malformed row, an unknown label.
    """
    names = tuple(config.labels) if config.labels else labels
    reader = _Reader(train, config, names)
    index = LabelIndex(names) if names else LabelIndex.from_values(reader.label_values())
    if len(index.names) < 2:
        raise DataError(f"{train.source}: one label only ({index.names}); a classifier needs two")
    examples, skipped, notes = reader.examples(index), {"train": reader.num_skipped}, []
    if not names and len(index.names) > max(MAX_INFERRED_LABELS, len(examples) // 10):
        raise DataError(
            f"{train.source}: the label column holds {len(index.names):,} different values in {len(examples):,} rows, "
            f"such as {index.names[0]!r}: set dataset.columns.label, or name the labels in dataset.labels"
        )
    paired = examples.text_pair is not None
    if validation is None:
        examples, held_out = _hold_out(examples, config.validation_fraction)
        share = f"{config.validation_fraction:.0%}"
        notes.append(f"{name} has no validation split: {share} of its training rows, {len(held_out):,}, are held out")
    else:
        reader = _Reader(validation, config, names)
        held_out = reader.examples(index)
        skipped["validation"] = reader.num_skipped
        if paired != (held_out.text_pair is not None):
            raise DataError(
                f"{train.source} holds {_kind(paired)} but {validation.source} {_kind(not paired)}: "
                "name the columns in dataset.columns"
            )
    return ClassificationTask(
        name=name,
        label_names=index.names,
        train=examples,
        validation=held_out,
        skipped_rows={split: count for split, count in skipped.items() if count},
        notes=tuple(notes),
    )


def choose_columns(source: str, have: Sequence[str], config: ColumnsConfig) -> tuple[str, str | None, str]:
    """(text, text_pair or None, label): as configured, else by the usual names."""
    for key in ("text", "text_pair", "label"):
        column = getattr(config, key)
        if column is not None and column not in have:
            raise DataError(f"{source}: dataset.columns.{key} is {column!r}, but the columns are {', '.join(have)}")
    text, pair = config.text, config.text_pair
    if text is None:
        both = next((p for p in _TEXT_PAIRS if set(p) <= set(have) and pair in (None, p[1])), None)
        text, pair = both or (next((t for t in _TEXTS if t in have), None), pair)
    label = config.label or next((name for name in _LABELS if name in have), None)
    for key, column in (("text", text), ("label", label)):
        if column is None:
            problems = "; or are these word problems? Then set dataset.task=word-problems" if "question" in have else ""
            raise DataError(
                f"{source}: which column is the {key}? Set dataset.columns.{key}; the columns are {', '.join(have)}"
                f"{problems}"
            )
    assert text is not None
    assert label is not None
    return text, pair, label


class _Reader:
    """A split's rows as examples; counts what it skips."""

    def __init__(self, split: Split, config: DatasetConfig, names: tuple[str, ...] | None) -> None:
        self.source = split.source
        self.num_skipped = 0
        self._other = config.name if config.path is not None and config.name != "local" else None
        self._skip = config.on_bad_row == "skip"
        self._no_label = set(LabelIndex.MISSING) - set(names or ())
        if not split.rows:
            raise DataError(f"{self.source}: has no rows")
        have = list(dict.fromkeys(name for row in split.rows for name in row.values))
        if not have:
            first = split.rows[0]
            raise DataError(f"{self.source}:{first.line}: {first.fault}, and so is every other row")
        self._columns = choose_columns(self.source, have, config.columns)
        self._rows = [row for row in split.rows if self._usable(row)]
        if not self._rows:
            raise DataError(f"{self.source}: all {self.num_skipped:,} rows are malformed")

    def label_values(self) -> set[str]:
        return {_label_text(row.values[self._columns[2]]) for row in self._rows}

    def examples(self, index: LabelIndex) -> Examples:
        text_column, pair_column, label_column = self._columns
        labels = []
        for row in self._rows:
            value = _label_text(row.values[label_column])
            number = index(value)
            if number is None:
                raise DataError(
                    f"{self.source}:{row.line}: unknown label {value!r}; known: {', '.join(index.names)}. "
                    "Name every label in dataset.labels, in the order of their numbers"
                    + (f"; data other than {self._other} needs a dataset.name of its own" if self._other else "")
                )
            labels.append(number)
        pairs = [row.values[pair_column] for row in self._rows] if pair_column else None
        return Examples([row.values[text_column] for row in self._rows], pairs, labels)

    def _usable(self, row: Row) -> bool:
        fault = row.fault or self._fault(row.values)
        if fault is None:
            return True
        if not self._skip:
            raise DataError(f"{self.source}:{row.line}: {fault}. Mend the row, or set dataset.on_bad_row=skip")
        self.num_skipped += 1
        return False

    def _fault(self, values: dict[str, Any]) -> str | None:
        text_column, pair_column, label_column = self._columns
        for column in filter(None, (text_column, pair_column)):
            fault = text_fault(values, column)
            if fault is not None:
                return fault
        label = values.get(label_column)
        if isinstance(label, (dict, list)) or _label_text(label) in self._no_label:
            return f"column {label_column!r} holds {label!r}, which is no label"
        return None


def text_fault(values: dict[str, Any], column: str) -> str | None:
    """What is wrong with a row's text, None for a text that can be used."""
    text = values.get(column)
    if not isinstance(text, str):
        return f"column {column!r} holds {text!r:.80}, expected text"
    if not text.strip():
        return f"column {column!r} is empty"
    return None if _is_unicode(text) else f"column {column!r} holds half of a surrogate pair, which is no character"


def _label_text(value: Any) -> str | None:
    """Labels compare as text; 1.0 (a float column with gaps) is 1, and NaN is no label."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(paired: bool) -> str:
    return "pairs of texts" if paired else "single texts"


def choose_held_out(num_rows: int, num_held_out: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out), each in order; the same ones whatever the training seed."""
    order = list(range(num_rows))
    random.Random(0).shuffle(order)
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


def _hold_out(examples: Examples, validation_fraction: float) -> tuple[Examples, Examples]:
    kept, held_out = choose_held_out(len(examples), max(1, round(len(examples) * validation_fraction)))

    def pick(rows: list[int]) -> Examples:
        pair = examples.text_pair
        return Examples(
            [examples.text[i] for i in rows],
            None if pair is None else [pair[i] for i in rows],
            [examples.labels[i] for i in rows],
        )

    return pick(kept), pick(held_out)
