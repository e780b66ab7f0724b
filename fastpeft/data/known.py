"""Datasets that are known by name: where they are, and what their columns and labels mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    repository: str | None = None
    """On the hub."""
    config: str | None = None
    """Its configuration there; None: the repository's default."""
    one_config: bool = False
    """The name stands for this configuration alone: dataset.config may not choose another."""
    revision: str = "main"
    """Of the repository, where dataset.revision leaves it at `main`."""
    validation: str | None = None
    """Its validation split, where that has an unusual name."""
    labels: tuple[str, ...] | None = None
    """In the order of their numbers on the hub."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """text, text_pair, label -> column, where the usual names do not tell."""
    f1_label: str | None = None
    """The class whose F1 is reported beside accuracy."""
    generated: str | None = None
    """`module:function` that makes {split: rows as dicts} of a dataset that ships with the package."""
