"""Classification data from files: jsonl, csv, tsv and parquet, with a column map."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.task import ClassificationTask, DataError, Examples, LabelIndex

MAX_INFERRED_LABELS = 100
"""More different values, and more than one in ten rows: not labels, unless they are named."""

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_VALIDATION_NAMES = ("dev", "validation", "dev_matched", "validation_matched", "valid")
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


def load_local(config: DatasetConfig, labels: tuple[str, ...] | None = None) -> ClassificationTask:
    """Read `config.path`. `labels` are the task's own names, used unless the config names others.

    Raises:
        DataError: a missing file, column or split, a malformed row, an unknown label.
    """
    assert config.path is not None
    train_path, validation_path = _find_splits(Path(config.path).expanduser())
    names = tuple(config.labels) if config.labels else labels
    train = _Reader(train_path, config)
    index = LabelIndex(names) if names else LabelIndex.from_values(train.label_values())
    if len(index.names) < 2:
        raise DataError(f"{train_path}: one label only ({index.names}); a classifier needs two")
    examples, skipped = train.examples(index), {"train": train.num_skipped}
    if not names and len(index.names) > max(MAX_INFERRED_LABELS, len(examples) // 10):
        raise DataError(
            f"{train_path}: the label column holds {len(index.names):,} different values in {len(examples):,} rows, "
            f"such as {index.names[0]!r}: set dataset.columns.label, or name the labels in dataset.labels"
        )
    paired = examples.text_pair is not None
    if validation_path is None:
        examples, validation = _split(examples, config.validation_fraction)
    else:
        reader = _Reader(validation_path, config)
        validation = reader.examples(index)
        skipped["validation"] = reader.num_skipped
        if paired != (validation.text_pair is not None):
            raise DataError(
                f"{train_path} holds {_kind(paired)} but {validation_path} {_kind(not paired)}: "
                "name the columns in dataset.columns"
            )
    return ClassificationTask(
        name=config.name if config.name != "local" else Path(config.path).resolve().name,
        label_names=index.names,
        train=examples,
        validation=validation,
        skipped_rows={split: count for split, count in skipped.items() if count},
    )


class _Reader:
    """One file's rows as examples; counts what it skips."""

    def __init__(self, path: Path, config: DatasetConfig) -> None:
        self.path = path
        self.num_skipped = 0
        self._name = config.name
        self._skip = config.on_bad_row == "skip"
        self._no_label = set(LabelIndex.MISSING) - set(config.labels or ())
        self._rows = list(read_rows(path))
        if not self._rows:
            raise DataError(f"{path}: has no rows")
        self._columns = _choose_columns(path, self._rows, config.columns)
        self._rows = [row for row in self._rows if self._usable(row)]
        if not self._rows:
            raise DataError(f"{path}: all {self.num_skipped:,} rows are malformed")

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
                    f"{self.path}:{row.line}: unknown label {value!r}; known: {', '.join(index.names)}. "
                    "Name every label in dataset.labels, in the order of their numbers"
                    + (f"; data other than {self._name} needs a dataset.name of its own" * (self._name != "local"))
                )
            labels.append(number)
        pairs = [row.values[pair_column] for row in self._rows] if pair_column else None
        return Examples([row.values[text_column] for row in self._rows], pairs, labels)

    def _usable(self, row: Row) -> bool:
        fault = row.fault or self._fault(row.values)
        if fault is None:
            return True
        if not self._skip:
            raise DataError(f"{self.path}:{row.line}: {fault}. Mend the row, or set dataset.on_bad_row=skip")
        self.num_skipped += 1
        return False

    def _fault(self, values: dict[str, Any]) -> str | None:
        text_column, pair_column, label_column = self._columns
        for column in filter(None, (text_column, pair_column)):
            if not isinstance(values.get(column), str):
                return f"column {column!r} holds {values.get(column)!r}, expected text"
            if not values[column].strip():
                return f"column {column!r} is empty"
            if not _is_unicode(values[column]):
                return f"column {column!r} holds half of a surrogate pair, which is no character"
        label = values.get(label_column)
        if isinstance(label, (dict, list)) or _label_text(label) in self._no_label:
            return f"column {label_column!r} holds {label!r}, which is no label"
        return None


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file with the line that each ends on (parquet: the row's number), from 1."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text") from None
    if path.suffix == ".jsonl":
        yield from _read_jsonl(text)
    else:
        yield from _read_table(path, text)


def _read_jsonl(text: str) -> Iterator[Row]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            yield Row(line, {}, f"is not valid JSON ({error})")
            continue
        if isinstance(values, dict):
            yield Row(line, values)
        else:
            yield Row(line, {}, f"expected a JSON object, got {type(values).__name__}")


def _read_table(path: Path, text: str) -> Iterator[Row]:
    """Some tsv files quote their fields, others hold stray quotes: take the reading with fewer faults."""
    delimiter = "," if path.suffix == ".csv" else "\t"
    readings = [_parse_table(path, text, delimiter, csv.QUOTE_MINIMAL)]
    if delimiter == "\t" and any(row.fault for row in readings[0]):
        readings.append(_parse_table(path, text, delimiter, csv.QUOTE_NONE))
    return iter(min(readings, key=lambda rows: sum(row.fault is not None for row in rows)))


def _parse_table(path: Path, text: str, delimiter: str, quoting: int) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text, newline="")  # str.splitlines would end a row at U+2028 and others
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            rows.append(Row(reader.line_num, {}, f"is malformed ({error})"))
            if header is None:
                return rows
            continue
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: the header names a column twice: {', '.join(header)}")
        elif len(fields) == len(header):
            rows.append(Row(reader.line_num, dict(zip(header, fields))))
        else:
            rows.append(Row(reader.line_num, {}, f"has {len(fields)} fields, the header {len(header)}"))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is no readable parquet file: {str(error).splitlines()[0]}") from None
    for line, values in enumerate(table.to_pylist(), 1):
        yield Row(line, values)


def _find_splits(path: Path) -> tuple[Path, Path | None]:
    """The training file, and the validation file of a folder."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"dataset.path {path}: expected a file in {', '.join(SUFFIXES)}")
        return path, None
    if not path.is_dir():
        raise DataError(f"dataset.path {path}: there is no such file or folder")
    return _one_file(path, ("train",)), _one_file(path, _VALIDATION_NAMES)


def _one_file(folder: Path, stems: tuple[str, ...]) -> Path:
    found = [p for stem in stems for s in SUFFIXES if (p := folder / f"{stem}{s}").is_file()]
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(f"{stem}.*" for stem in stems)
    have = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    problem = f"more than one of {wanted}" if found else f"no {wanted}"
    raise DataError(f"dataset.path {folder}: {problem} in {', '.join(SUFFIXES)}; it holds {have}")


def _choose_columns(path: Path, rows: list[Row], config: ColumnsConfig) -> tuple[str, str | None, str]:
    """(text, text_pair or None, label): as configured, else by the usual names."""
    have = list(dict.fromkeys(name for row in rows for name in row.values))
    if not have:
        raise DataError(f"{path}:{rows[0].line}: {rows[0].fault}, and so is every other row")
    for key in ("text", "text_pair", "label"):
        column = getattr(config, key)
        if column is not None and column not in have:
            raise DataError(f"{path}: dataset.columns.{key} is {column!r}, but the columns are {', '.join(have)}")
    text, pair = config.text, config.text_pair
    if text is None:
        both = next((p for p in _TEXT_PAIRS if set(p) <= set(have) and pair in (None, p[1])), None)
        text, pair = both or (next((t for t in _TEXTS if t in have), None), pair)
    label = config.label or next((name for name in _LABELS if name in have), None)
    for key, column in (("text", text), ("label", label)):
        if column is None:
            raise DataError(
                f"{path}: which column is the {key}? Set dataset.columns.{key}; the columns are {', '.join(have)}"
            )
    assert text is not None
    assert label is not None
    return text, pair, label


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


def _split(examples: Examples, validation_fraction: float) -> tuple[Examples, Examples]:
    """Hold rows out, the same ones whatever the training seed."""
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    cut = max(1, round(len(order) * validation_fraction))

    def pick(rows: list[int]) -> Examples:
        pair = examples.text_pair
        return Examples(
            [examples.text[i] for i in rows],
            None if pair is None else [pair[i] for i in rows],
            [examples.labels[i] for i in rows],
        )

    return pick(sorted(order[cut:])), pick(sorted(order[:cut]))
