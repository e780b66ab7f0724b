"""Which of a folder's files is which split: by their names, as a user or the hub writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fastpeft.data.rows import DataError
from fastpeft.data.source import TEST, TRAIN, VALIDATION
from fastpeft.data.text_files import format_of, stem_of

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
STEMS = {
    TRAIN: ("train",),
    VALIDATION: ("dev", "validation", "dev_matched", "validation_matched", "valid", "val"),
    TEST: ("test",),
}
_WITHOUT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the hub and `datasets` write beside the data."""
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")


@dataclass(frozen=True)
class SplitFiles:
    """Split -> its files."""

    files: dict[str, list[Path]]
    """Splits without one are left out."""
    in_parts: frozenset[str] = frozenset()
    """Splits whose files are the parts of one. Several files of another split leave open which is meant."""
    others: tuple[Path, ...] = ()
    """Files with rows that are of no split."""


@dataclass(frozen=True)
class _Unit:
    """What can be a split: a file, the shards of one, or a folder of files."""

    name: str
    paths: list[Path]
    is_parts: bool = False


def find_split_files(folder: Path, config: str | None = None) -> SplitFiles:
    """The splits in a folder, its `data/`, or the folder of a configuration, as repositories of the hub have them.

    A split is a file, the shards of a file (train-00000-of-00002), or a folder, of a name of STEMS. Where none is, its
    name ends in one of them, or else begins with one, next to anything but a letter: sts-train.csv, corpus.dev.conll,
    dev_mismatched.jsonl. A folder's only file, of whatever name, is its training split.

    Raises:
        DataError: a shard is missing; the folder has several configurations.
    """
    wanted = [folder / config, folder / "data" / config] if config else []
    places = [place for place in (*wanted, folder, folder / "data") if place.is_dir()]
    found = [_in_folder(place) for place in places]
    for splits in found:
        if TRAIN in splits.files:
            return splits
    for splits in found:
        if len(splits.others) == 1 and not splits.files:
            return SplitFiles({TRAIN: list(splits.others)})
    own = _in_folder(folder)
    if own.others:  # files of rows lie here: which is meant is the user's to say
        return own
    configs = {place.name: splits for place in _folders(folder) if TRAIN in (splits := _in_folder(place)).files}
    if len(configs) > 1:
        raise DataError(
            f"dataset.path {folder}: has several configurations: set dataset.path to the folder of one of them: "
            f"{', '.join(configs)}"
        )
    return next(iter(configs.values()), own)


def _in_folder(folder: Path) -> SplitFiles:
    units = _units(folder)
    files: dict[str, list[Path]] = {}
    in_parts = set()
    for matches in (_is, _ends_in, _begins_with):
        left = [unit for unit in units if not any(unit.paths[0] in paths for paths in files.values())]
        for split, stems in STEMS.items():
            named = [unit for unit in left if split not in files and matches(unit.name, stems)]
            chosen = _first_sort(named)
            if chosen:
                files[split] = [path for unit in chosen for path in unit.paths]
                in_parts |= {split} if len(chosen) == 1 and chosen[0].is_parts else set()
    taken = {path for paths in files.values() for path in paths}
    others = (path for path in _files(folder) if path not in taken and format_of(path) in SUFFIXES)
    return SplitFiles(files, frozenset(in_parts), tuple(others))


def _first_sort(units: list[_Unit]) -> list[_Unit]:
    """Files of rows, or else other files, or else shards and folders."""
    sorts: tuple[Callable[[_Unit], bool], ...] = (
        lambda unit: not unit.is_parts and format_of(unit.paths[0]) in SUFFIXES,
        lambda unit: not unit.is_parts,
        lambda unit: True,
    )
    return next((found for sort in sorts if (found := [unit for unit in units if sort(unit)])), [])


def _units(folder: Path) -> list[_Unit]:
    files, shards = _files(folder), _shards(folder)
    in_shards = {path for unit in shards for path in unit.paths}
    units = [_Unit(stem_of(path), [path]) for path in files if path not in in_shards]
    folders = [(place, [p for p in _files(place) if format_of(p) in SUFFIXES]) for place in _folders(folder)]
    return [*units, *shards, *(_Unit(place.name, paths, is_parts=True) for place, paths in folders if paths)]


def _shards(folder: Path) -> list[_Unit]:
    """Raises DataError where some of them are there, and others are not."""
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in _files(folder):
        match = _SHARD.fullmatch(stem_of(path))
        if match and format_of(path) in SUFFIXES:
            found.setdefault((match["name"], int(match["count"])), {})[int(match["number"])] = path
    for (name, count), paths in found.items():
        missing = sorted(set(range(count)) - set(paths))
        if missing:
            raise DataError(
                f"dataset.path {folder}: {name} has {count} parts, and {len(missing)} of them are missing, the first "
                f"{name}-{missing[0]:05}-of-{count:05}"
            )
    return [_Unit(name, [paths[i] for i in sorted(paths)], is_parts=True) for (name, _), paths in found.items()]


def _files(folder: Path) -> list[Path]:
    there = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in there if p.name not in _WITHOUT_ROWS)


def refuse_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a link that leads out of the dataset's folder: one that came from somebody else would have any file of
    this machine read as rows. A snapshot in the hub's cache is links into the blobs beside it.

    Args:
        folder: that the user named.
        files: those in it that would be read.

    Raises:
        DataError: the link and what it leads to.
    """
    inside = Path(os.path.realpath(folder))
    in_cache = inside.parent.name == "snapshots"
    for path in files:
        to = Path(os.path.realpath(path))
        if not to.is_relative_to(inside) and not (in_cache and to.is_relative_to(inside.parents[1] / "blobs")):
            raise DataError(
                f"{path}: leads out of the dataset's folder, to {to}, and is not followed. Put that file in its place, "
                "or give it as dataset.path"
            )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is(name: str, stems: tuple[str, ...]) -> bool:
    return name.lower() in stems


def _ends_in(name: str, stems: tuple[str, ...]) -> bool:
    """Behind anything but a letter: wnut17train ends in train, latest does not end in test."""
    return re.search(rf"(?:^|[^a-z])(?:{'|'.join(stems)})$", name.lower()) is not None


def _begins_with(name: str, stems: tuple[str, ...]) -> bool:
    return re.match(rf"(?:{'|'.join(stems)})(?:[^a-z]|$)", name.lower()) is not None
