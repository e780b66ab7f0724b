"""Files of a user's own: jsonl, json, csv, tsv and parquet, packed by gzip or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpeft.data.rows import DataError, Row, Split
from fastpeft.data.source import TEST, TRAIN, Source
from fastpeft.data.split_files import STEMS, SUFFIXES, find_split_files, refuse_links
from fastpeft.data.tables import read_table
from fastpeft.data.text_files import format_of, read_bytes, read_text

_SPACE = re.compile(r"[ \t\r\n]*")


class FileSource(Source):
    """A file, or a folder whose files' names tell the splits: `split_files`."""

    def __init__(self, path: Path, name: str, header: bool = True, config: str | None = None) -> None:
        """
        Args:
            header: a table's first line names its columns.
            config: the folder's subfolder that is meant, where it has several.

        Raises:
            DataError: there is no such file or folder; a split's parts are not all there.
        """
        super().__init__(name)
        self.folder, self._header = path, header
        self._read: dict[str, Split] = {}
        self._in_parts: frozenset[str] = frozenset()
        self._others: tuple[Path, ...] = ()
        if not path.exists():
            raise DataError(f"dataset.path {path}: there is no such file or folder")
        if path.is_file():
            self.files = {TRAIN: [path]}
            return
        found = find_split_files(path, config)
        self.files, self._in_parts, self._others = found.files, found.in_parts, found.others
        refuse_links(path, (*found.others, *(file for files in found.files.values() for file in files)))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def path(self, split: str) -> Path | None:
        """The file of a split; None where it is in parts. Raises DataError where there is none, or more than one."""
        return None if split in self._in_parts else self._one_file(split)

    def paths(self, split: str) -> list[Path]:
        return list(self.files.get(split, ()))

    @property
    def others(self) -> list[Path]:
        return list(self._others)

    def columns(self, split: str) -> list[str]:
        return self.read(split).require_columns()

    def describe_split(self, split: str) -> str:
        if split not in self._in_parts:
            return str(self._one_file(split))
        first, *more = self.files[split]
        return f"{first} and {len(more)} more" if more else str(first)

    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """Those that `datasets` wrote into a parquet file; other formats have none."""
        path = self.files[split][0] if split in self._in_parts else self._one_file(split)
        return _parquet_class_names(path).get(column) if format_of(path) == ".parquet" else None

    def _one_file(self, split: str) -> Path:
        found = self.files.get(split, [])
        if len(found) == 1:
            return found[0]
        wanted = " or ".join(f"{stem}.*" for stem in STEMS[split])
        have = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
        problem = f"more than one of {wanted}" if found else f"no {wanted}"
        raise DataError(f"dataset.path {self.folder}: {problem} in {', '.join(SUFFIXES)}; it holds {have}")

    def _rows(self, split: str, columns: tuple[str, ...] | None) -> Split:
        if split not in self._read:
            paths = self.files[split] if split in self._in_parts else [self._one_file(split)]
            parts = [read_split(path, self._header) for path in paths]
            self._read[split] = parts[0] if len(parts) == 1 else _joined(self.describe_split(split), parts)
        return self._read[split]


def _joined(source: str, parts: Sequence[Split]) -> Split:
    """Lines are counted on from part to part."""
    rows: list[Row] = []
    for part in parts:
        before = rows[-1].line if rows else 0
        rows += [replace(row, line=before + row.line) for row in part.rows]
    return Split(source, rows, tuple(note for part in parts for note in part.notes))


def read_split(path: Path, header: bool = True) -> Split:
    """All rows of a file, with the line that each ends on (parquet: the row's number), from 1.

    Raises:
        DataError: a file that cannot be read; a row that cannot be is a Row with a fault.
    """
    suffix = format_of(path)
    if suffix not in SUFFIXES:
        raise DataError(f"dataset.path {path}: expected a file in {', '.join(SUFFIXES)}, or one of them in .gz")
    if suffix == ".parquet":
        return Split(str(path), list(_read_parquet(path)))
    text, notes = read_text(path)
    if suffix == ".json" and text.lstrip().startswith("["):
        return Split(str(path), list(_read_json(path, text)), notes)
    if suffix in (".jsonl", ".json"):
        return Split(str(path), list(_read_jsonl(text)), notes)
    rows, decided = read_table(path, text, header)
    return Split(str(path), rows, (*notes, *decided))


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


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(path)))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is no readable parquet file: {str(error).splitlines()[0]}") from None
    for line, values in enumerate(table.to_pylist(), 1):
        yield Row(line, values)


def _parquet_class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Column -> names of its class numbers, which `datasets` keeps in the schema's metadata only."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        names = inner.get("names") if isinstance(inner, dict) else None
        if names:
            found[column] = tuple(map(str, names))
    return found


def find_test(path: Path) -> Path:
    """The file to score on: `path` itself, a folder's test file, or the only file in it."""
    if path.is_file():
        return path
    source = FileSource(path, path.name)
    there = [*source.others, *(file for files in source.files.values() for file in files)]
    found = there[0] if len(there) == 1 else source.path(TEST)
    if found is None:
        raise DataError(f"dataset.path {path}: its test split is in parts; give one file")
    return found
