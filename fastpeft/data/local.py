"""Data from files: jsonl, json, csv, tsv and parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.rows import Row, Split, build_task
from fastpeft.data.task import ClassificationTask, DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_SPACE = re.compile(r"[ \t\r\n]*")
_VALIDATION_NAMES = ("dev", "validation", "dev_matched", "validation_matched", "valid")


def load_local(config: DatasetConfig, labels: tuple[str, ...] | None = None) -> ClassificationTask:
    """Read `config.path`. `labels` are the task's own names, used unless the config names others.

    Raises:
        DataError: a missing file, column or split, a malformed row, an unknown label.
    """
    assert config.path is not None
    train_path, validation_path = _find_splits(Path(config.path).expanduser())
    name = config.name if config.name != "local" else Path(config.path).resolve().name
    validation = read_split(validation_path) if validation_path is not None else None
    return build_task(config, name, read_split(train_path), validation, labels)


def read_split(path: Path) -> Split:
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
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from _read_json(path, text)
    elif path.suffix in (".jsonl", ".json"):
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
        yield _object_row(line, values)


def _object_row(line: int, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(line, values)
    return Row(line, {}, f"expected a JSON object, got {type(values).__name__}")


def _read_json(path: Path, text: str) -> Iterator[Row]:
    """A list of objects. What is wrong inside one leaves no telling where the next begins, and stops the reading."""
    decoder = json.JSONDecoder()
    position, line = _skip_space(text, text.index("[") + 1), 1
    start = 0
    while not text.startswith("]", position):
        try:
            values, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", start, getattr(error, "pos", position))
            raise DataError(f"{path}:{line}: is not valid JSON ({getattr(error, 'msg', error)})") from None
        line, start = line + text.count("\n", start, end), end
        yield _object_row(line, values)
        position = _skip_space(text, end)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            line += text.count("\n", start, position)
            raise DataError(f"{path}:{line}: is not valid JSON (expected ',' or ']' after an object)")
    if text[position + 1 :].strip():
        raise DataError(f"{path}: is not valid JSON (text after the list)")


def _skip_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None
    return space.end()


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
    if is_data_file(path):
        return path, None
    return _one_file(path, ("train",)), _one_file(path, _VALIDATION_NAMES)


def find_train_and_test(path: Path) -> tuple[Path, Path | None, list[Path]]:
    """The training file, a folder's test file if it has one, and its validation files, which word problems leave be."""
    if is_data_file(path):
        return path, None, []
    test = _one_file(path, ("test",)) if _files(path, ("test",)) else None
    return _one_file(path, ("train",)), test, _files(path, _VALIDATION_NAMES)


def find_test(path: Path) -> Path:
    """The file to score on: `path` itself, a folder's test file, or the only file in it."""
    if is_data_file(path):
        return path
    only = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return only[0] if len(only) == 1 else _one_file(path, ("test",))


def is_data_file(path: Path) -> bool:
    """True for a file that can be read, False for a folder; raises DataError for anything else."""
    if path.is_file() and path.suffix not in SUFFIXES:
        raise DataError(f"dataset.path {path}: expected a file in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise DataError(f"dataset.path {path}: there is no such file or folder")
    return not path.is_dir()


def _files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    return [p for stem in stems for s in SUFFIXES if (p := folder / f"{stem}{s}").is_file()]


def _one_file(folder: Path, stems: tuple[str, ...]) -> Path:
    found = _files(folder, stems)
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(f"{stem}.*" for stem in stems)
    have = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    problem = f"more than one of {wanted}" if found else f"no {wanted}"
    raise DataError(f"dataset.path {folder}: {problem} in {', '.join(SUFFIXES)}; it holds {have}")
