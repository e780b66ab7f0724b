"""Conversion of rows with named columns to labelled texts: choice of columns, faulty rows, held-out rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.rows import DataError, Row, Split, configured_columns, text_fault
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.splitting import held_out_note, hold_out, shared_note
from fastpeft.tasks.sequences.examples import Examples

_TEXT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "passage"),
    ("text", "text_pair"),
)
_TEXTS = ("sentence", "text", "review", "content")
MOSTLY = 0.9
"""Share of the rows by whose labels a kind of task is told. The others are faults, named when the rows are read."""
_LONGEST_NAME = 40
"""Of a column. What is longer is a text."""
_LABELS = ("label", "labels", "gold_label", "answer", "class", "score")


class Columns(NamedTuple):
    text: str
    text_pair: str | None
    label: str


@dataclass(frozen=True)
class LabelledTexts:
    """The splits, read."""

    train: Examples
    validation: Examples
    test: Examples | None = None
    """None without a labelled test split."""
    skipped_rows: dict[str, int] = field(default_factory=dict)
    """Split -> rows left out under on_bad_row: skip."""
    notes: tuple[str, ...] = ()


class TextSplit:
    """The usable rows of a split. An unusable row stops the run or is counted, by dataset.on_bad_row."""

    def __init__(
        self,
        split: Split,
        config: DatasetConfig,
        known: Mapping[str, str],
        label_fault: Callable[[dict[str, Any], str], str | None],
    ) -> None:
        """
        Args:
            known: columns from a dataset's built-in settings.
            label_fault: returns the fault of the label in a row's values; None for a usable label.

        Raises:
            DataError: a missing column, a malformed row, or no row at all.
        """
        self.source, self.notes, self.num_skipped = split.source, split.notes, 0
        self.first_skipped = ""
        """Location of the first omitted row, and the reason."""
        self.columns = choose_columns(split.source, split.require_columns(), config.columns, known)
        self.rows: list[Row] = []
        for row in split.rows:
            fault = row.fault or self._fault(row.values, label_fault)
            if fault is None:
                self.rows.append(row)
                continue
            where = f"{self.source}:{row.line}: {fault}"
            if config.on_bad_row != "skip":
                raise DataError(f"{where}. Mend the row, or set dataset.on_bad_row=skip")
            self.num_skipped += 1
            self.first_skipped = self.first_skipped or where
        if not self.rows:
            raise DataError(
                f"{self.source}: all {self.num_skipped:,} rows are malformed, the first {self.first_skipped}"
            )

    def examples(self, label: Callable[[Row], Any]) -> Examples:
        """The rows as Examples; `label` returns the training label of a row."""
        text, pair, _ = self.columns
        pairs = [row.values[pair] for row in self.rows] if pair else None
        return Examples([row.values[text] for row in self.rows], pairs, [label(row) for row in self.rows])

    def _fault(self, values: dict[str, Any], label_fault: Callable[[dict[str, Any], str], str | None]) -> str | None:
        for column in filter(None, self.columns[:2]):
            fault = text_fault(values, column)
            if fault is not None:
                return fault
        return label_fault(values, self.columns.label)


def read_texts(
    config: DatasetConfig,
    source: Source,
    label_fault: Callable[[dict[str, Any], str], str | None],
    label_of: Callable[[TextSplit], Callable[[Row], Any]],
    names: Mapping[str, tuple[str, ...]] | None = None,
    *,
    classes_of: Callable[[Any], Collection[Hashable]] = lambda label: (),
    several_columns: bool = False,
) -> LabelledTexts:
    """All splits. Without a validation split, training rows are held out, stratified by class, and without texts that
    stay in the training rows. A test split without labels, as in competitions, is left out.

    Args:
        label_of: split -> function that returns a row's label; called for the training split first.
        names: column -> names of its class indices.
        classes_of: the classes that a label stands for.
        several_columns: whether dataset.columns.label may name several columns.

    Raises:
        DataError: a missing split or column, a malformed row, an unknown label.
    """
    if isinstance(config.columns.label, list) and not several_columns:
        raise DataError(
            f"dataset.columns.label names {len(config.columns.label)} columns, but dataset.task={config.task} takes "
            "one; dataset.task=multi-label takes several"
        )
    columns = source_columns(config, source)
    extra = [str(column) for column in config.columns.label] if isinstance(config.columns.label, list) else []
    wanted = [column for column in (*columns, *extra) if column]
    known = source.known.columns if source.known else {}

    def read(split: str) -> TextSplit:
        return TextSplit(source.read(split, wanted, names), config, known, label_fault)

    splits = {TRAIN: (train := read(TRAIN))}
    examples = train.examples(label_of(train))
    if source.needs_held_out:
        classes = [classes_of(label) for label in examples.labels]
        kept, rows = hold_out(examples.texts, classes, config.validation_fraction)
        examples, held_out = examples.pick(kept), examples.pick(rows)
    else:
        splits[VALIDATION] = validation = read(VALIDATION)
        held_out = validation.examples(label_of(validation))
        _check_paired(train, validation)
    for split, rows in (("training", examples), ("validation", held_out)):
        if not len(rows):
            raise DataError(f"dataset {source.name}: the {split} split is empty")
    unlabelled = _without_labels(source, train.columns.label, wanted, names, label_fault)
    scored = None
    if source.has(TEST) and unlabelled is None:
        splits[TEST] = test = read(TEST)
        _check_paired(train, test)
        scored = test.examples(label_of(test))
    skipped = {name: split.num_skipped for name, split in splits.items() if split.num_skipped}
    notes = [*_notes(source, splits, examples, held_out), *([unlabelled] if unlabelled else [])]
    if scored is not None:
        notes += shared_note(examples.texts, scored.texts, "test rows", _text_columns(train))
    return LabelledTexts(examples, held_out, scored, skipped, tuple(notes))


def _check_paired(train: TextSplit, other: TextSplit) -> None:
    paired = train.columns.text_pair is not None
    if paired != (other.columns.text_pair is not None):
        raise DataError(
            f"{train.source} holds {_kind(paired)} but {other.source} {_kind(not paired)}: "
            "name the columns in dataset.columns"
        )


def _without_labels(
    source: Source,
    column: str,
    wanted: Sequence[str],
    names: Mapping[str, tuple[str, ...]] | None,
    label_fault: Callable[[dict[str, Any], str], str | None],
) -> str | None:
    """Why the test split cannot be scored; None if it can or if there is none."""
    if not source.has(TEST):
        return None
    split = source.read(TEST, [name for name in wanted if name in source.columns(TEST)], names)
    if column not in split.columns:
        return f"{split.source} has no column {column!r}: it is not scored"
    if all(row.fault or label_fault(row.values, column) for row in split.rows):
        return f"no row of {split.source} has a label: it is not scored"
    return None


def _notes(source: Source, splits: Mapping[str, TextSplit], train: Examples, validation: Examples) -> Iterator[str]:
    """Messages on how files were read, and on omitted rows, held-out rows and texts in both splits."""
    for split in splits.values():
        yield from split.notes
    if source.needs_held_out:
        yield held_out_note(source.name, len(validation), len(train) + len(validation), "rows", source.others)
    for name, split in splits.items():
        if split.num_skipped:
            count, first = split.num_skipped, split.first_skipped
            yield f"{count:,} malformed rows of the {name} split were skipped, the first {first}"
    yield from shared_note(train.texts, validation.texts, "validation rows", _text_columns(splits[TRAIN]))


def _text_columns(split: TextSplit) -> list[str]:
    return [column for column in split.columns[:2] if column]


def source_columns(config: DatasetConfig, source: Source) -> Columns:
    """Columns of the training split. Raises DataError if they are missing or cannot be guessed."""
    known = source.known.columns if source.known else {}
    return choose_columns(source.describe_split(TRAIN), source.columns(TRAIN), config.columns, known)


def choose_columns(
    source: str, have: Sequence[str], config: ColumnsConfig, known: Mapping[str, str] | None = None
) -> Columns:
    """Columns from the configuration, else from the dataset's built-in settings, else by usual names.

    Raises:
        DataError: a column is missing, or is not configured and has no usual name.
    """
    text, pair, label = _guess(source, have, config, known or {})
    for key, column in (("text", text), ("label", label)):
        if column is None:
            problems = "; or are these word problems? Then set dataset.task=word-problems" if "question" in have else ""
            if any(_is_no_name(name) for name in have):
                problems = ". Where the first line is a row and no header, give columns by number, from 0"
            raise DataError(
                f"{source}: which column is the {key}? Set dataset.columns.{key}; the columns are "
                f"{', '.join(name[:_LONGEST_NAME] for name in have)}{problems}"
            )
    assert text is not None
    assert label is not None
    return Columns(text, pair, label)


class Guess(NamedTuple):
    text: str | None
    text_pair: str | None
    label: str | None


def guess_columns(config: DatasetConfig, source: Source) -> Guess:
    """Of the training split, as far as they can be told. Raises DataError for a configured one that is not there."""
    known = source.known.columns if source.known else {}
    return _guess(source.describe_split(TRAIN), source.columns(TRAIN), config.columns, known)


def _guess(source: str, have: Sequence[str], config: ColumnsConfig, known: Mapping[str, str]) -> Guess:
    given = {key: column for key, column in known.items() if column in have}
    given |= configured_columns(source, have, config)
    text, pair = given.get("text"), given.get("text_pair")
    if text is None:
        both = next((p for p in _TEXT_PAIRS if set(p) <= set(have) and pair in (None, p[1])), None)
        text, pair = both or (next((t for t in _TEXTS if t in have), None), pair)
    label = given.get("label") or next((name for name in _LABELS if name in have), None)
    return Guess(text, pair, str(config.label[0]) if isinstance(config.label, list) else label)


def _is_no_name(name: str) -> bool:
    return len(name) > _LONGEST_NAME or re.fullmatch(r"[-+]?[0-9.]+", name) is not None


def _kind(paired: bool) -> str:
    return "pairs of texts" if paired else "single texts"
