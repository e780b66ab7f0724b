"""From a `dataset` section to its splits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.hub_datasets import HubSource
from fastpeft.data.known import KnownDataset
from fastpeft.data.local import FileSource
from fastpeft.data.source import GeneratedSource, Source


def open_source(config: DatasetConfig, known: KnownDataset | None, names: Iterable[str] = ()) -> Source:
    """The splits that a `dataset` section names.

    Args:
        known: what is known of `config.name`.
        names: of all datasets that are known by name.

    Raises:
        DataError: a path that is not there, a split that is not.
        UnavailableError: a dataset of the hub that cannot be had.
    """
    if config.path is not None:
        path = Path(config.path).expanduser()
        name = config.name if config.name != "local" else path.resolve().name
        header = not names_by_number(config.columns)
        source: Source = FileSource(path, name, header, config.config)
        source.known = known
        return source
    if known is not None and known.generated is not None:
        return GeneratedSource(config.name, known)
    return HubSource(config, known, names)


def names_by_number(columns: ColumnsConfig) -> bool:
    """Whether `dataset.columns` counts columns, because the file has no header."""
    labels = columns.label if isinstance(columns.label, list) else [columns.label]
    return any(isinstance(column, int) for column in (columns.text, columns.text_pair, *labels))
