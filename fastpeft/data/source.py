"""What a `dataset` section leads to: named splits of rows, from files, from the hub, or made by the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fastpeft.data.known import KnownDataset
from fastpeft.data.rows import Row, Split

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Source(ABC):
    """Splits by what they are for: train, validation, test. Rows are read when they are asked for."""

    def __init__(self, name: str, known: KnownDataset | None = None) -> None:
        self.name, self.known = name, known
        """As results name the dataset; what is known of it by name."""

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Those that there are."""

    def has(self, split: str) -> bool:
        return split in self.splits

    @property
    def needs_held_out(self) -> bool:
        """Training rows have to stand in for a validation split that nobody made. Where one is meant to be and is
        not, reading it raises DataError."""
        return not self.has(VALIDATION)

    @abstractmethod
    def columns(self, split: str) -> list[str]:
        """Names of a split's columns. Raises DataError where there is no such split."""

    def describe_split(self, split: str) -> str:
        """Its name in messages."""
        return f"dataset {self.name}"

    @abstractmethod
    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """Names of the class numbers that a column holds; None where the data have none."""

    def read(
        self,
        split: str,
        columns: Sequence[str] | None = None,
        names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Split:
        """The rows of a split.

        Args:
            columns: read no others, where the format allows it.
            names: column -> names of its class numbers; a number, or each of a list, becomes its name. One that is no
                class stays as it is.

        Raises:
            DataError: no such split, or a file that cannot be read.
        """
        found = self._rows(split, None if columns is None else tuple(columns))
        if not names:
            return found
        return replace(found, rows=[replace(row, values=_named(row.values, names)) for row in found.rows])

    def path(self, split: str) -> Path | None:
        """The file that holds a split; None where it is no file."""
        return None

    def paths(self, split: str) -> list[Path]:
        """Every file that may hold it: none, or several of which nothing tells the right one."""
        return []

    @abstractmethod
    def _rows(self, split: str, columns: tuple[str, ...] | None) -> Split: ...


class RowsSource(Source):
    """Rows in memory, from no file."""

    def __init__(
        self, name: str, made: Mapping[str, Sequence[dict[str, Any]]], known: KnownDataset | None = None
    ) -> None:
        super().__init__(name, known)
        self._made = {
            split: Split(f"{name} {split}", [Row(line, values) for line, values in enumerate(rows, 1)])
            for split, rows in made.items()
        }

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._made)

    def columns(self, split: str) -> list[str]:
        return list(self._made[split].rows[0].values)

    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        return None

    def _rows(self, split: str, columns: tuple[str, ...] | None) -> Split:
        return self._made[split]


class GeneratedSource(RowsSource):
    """Made by the package."""

    def __init__(self, name: str, known: KnownDataset) -> None:
        assert known.generated is not None
        module, _, function = known.generated.partition(":")
        super().__init__(name, getattr(import_module(module), function)(), known)


def _named(values: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    return {column: _name(value, names[column]) if column in names else value for column, value in values.items()}


def _name(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_name(one, names) for one in value]
    is_class = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if is_class else value
