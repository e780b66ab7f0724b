"""Metrics of parts of the data, such as one entity type's precision, as texts for a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft.runs.events import number

Groups = Mapping[str, Mapping[str, Any]]
"""As an `eval` event and result.json have them: part -> metric's name -> value; whole numbers are counts."""


def table_of(groups: Groups) -> tuple[list[str], list[list[str]]]:
    """(names of the metrics, and for each part its name and its metrics). What a part lacks is a hyphen."""
    names = list(dict.fromkeys(name for metrics in groups.values() for name in metrics))
    return names, [[part, *(figure(metrics.get(name)) for name in names)] for part, metrics in groups.items()]


def figure(value: Any) -> str:
    """Counts are whole; what is large needs no four decimals."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{number(value):.4f}" if abs(number(value)) < 100 else f"{number(value):,.2f}"
