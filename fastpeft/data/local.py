"""Classification data from files: jsonl, csv, tsv and parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.rows import Row, Split, build_task
from fastpeft.data.task import ClassificationTask, DataError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_VALIDATION_NAMES = ("dev", "validation", "dev_matched", "validation_matched", "valid")


def load_local(config: DatasetConfig, labels: tuple[str, ...] | None = None) -> ClassificationTask:
    """Read `config.path`. `labels` are the task's own names, used unless the config names others.

    Raises:
        DataError: a missing file, column or split, a malformed row, an unknown label.
    """
    assert config.path is not None
    train_path, validation_path = _find_splits(Path(config.path).expanduser())
    name = config.name if config.name != "local" else Path(config.path).resolve().name
    validation = _read_split(validation_path) if validation_path is not None else None
    return build_task(config, name, _read_split(train_path), validation, labels)


def _read_split(path: Path) -> Split:
    return Split(str(path), list(read_rows(path)))


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
