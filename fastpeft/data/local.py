"""Files of a user's own: jsonl, json, csv, tsv and parquet, and which of a folder's files is which split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpeft.data.rows import DataError, Row, Split
from fastpeft.data.source import Source
from fastpeft.data.tables import read_table

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_SPACE = re.compile(r"[ \t\r\n]*")
_STEMS = {
    "train": ("train",),
    "validation": ("dev", "validation", "dev_matched", "validation_matched", "valid", "val"),
    "test": ("test",),
}


class FileSource(Source):
    """A file, or a folder with one file a split: train.*, dev.* (validation.*, ...), test.*.

    Where no file has a split's name, one whose name ends in it, or has it between dots, hyphens or underscores, is
    taken: sts-train.csv, corpus.dev.conll.
    """

    def __init__(self, path: Path, name: str, header: bool = True) -> None:
        """
        Args:
            header: a table's first line names its columns.

        Raises:
            DataError: there is no such file or folder.
        """
        super().__init__(name)
        self.folder, self._header = path, header
        self._read: dict[str, Split] = {}
        if not path.exists():
            raise DataError(f"dataset.path {path}: there is no such file or folder")
        self.files = {"train": [path]} if path.is_file() else _files_of(path)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def path(self, split: str) -> Path:
        """The file of a split. Raises DataError where there is none, or more than one."""
        found = self.files.get(split, [])
        if len(found) == 1:
            return found[0]
        wanted = " or ".join(f"{stem}.*" for stem in _STEMS[split])
        have = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
        problem = f"more than one of {wanted}" if found else f"no {wanted}"
        raise DataError(f"dataset.path {self.folder}: {problem} in {', '.join(SUFFIXES)}; it holds {have}")

    def paths(self, split: str) -> list[Path]:
        return list(self.files.get(split, ()))

    @property
    def needs_held_out(self) -> bool:
        """Of a single file only: a folder without a validation file may have one under a name that is not known."""
        return self.folder.is_file()

    def columns(self, split: str) -> list[str]:
        return self.read(split).require_columns()

    def describe_split(self, split: str) -> str:
        return str(self.path(split))

    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """Those that `datasets` wrote into a parquet file; other formats have none."""
        path = self.path(split)
        return _parquet_class_names(path).get(column) if path.suffix == ".parquet" else None

    def _rows(self, split: str, columns: tuple[str, ...] | None) -> Split:
        if split not in self._read:
            self._read[split] = read_split(self.path(split), self._header)
        return self._read[split]


def read_split(path: Path, header: bool = True) -> Split:
    """All rows of a file, with the line that each ends on (parquet: the row's number), from 1.

    Raises:
        DataError: a file that cannot be read; a row that cannot be is a Row with a fault.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"dataset.path {path}: expected a file in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        return Split(str(path), list(_read_parquet(path)))
    text = read_text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return Split(str(path), list(_read_json(path, text)))
    if path.suffix in (".jsonl", ".json"):
        return Split(str(path), list(_read_jsonl(text)))
    return Split(str(path), *read_table(path, text, header))


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark. Raises DataError, with the line of what is not."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text") from None


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
        table = pyarrow.parquet.read_table(path)
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


# ---- which file is which split -------------------------------------------------------------


def find_test(path: Path) -> Path:
    """The file to score on: `path` itself, a folder's test file, or the only file in it."""
    if path.is_file():
        return path
    if not path.exists():
        raise DataError(f"dataset.path {path}: there is no such file or folder")
    only = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return only[0] if len(only) == 1 else FileSource(path, path.name).path("test")


def _files_of(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files; splits without one are left out."""
    there = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    found = {}
    for split, stems in _STEMS.items():
        named = [p for stem in stems for s in SUFFIXES if (p := folder / f"{stem}{s}") in there]
        named = named or [p for p in there if p.stem in stems]
        named = named or [p for p in there if _ends_in(p.stem, stems)]
        if named:
            found[split] = named
    return found


def _ends_in(stem: str, split_names: tuple[str, ...]) -> bool:
    """Behind anything but a letter: wnut17train ends in train, latest does not end in test."""
    return re.search(rf"(?:^|[^a-z])(?:{'|'.join(split_names)})$", stem.lower()) is not None
