"""Metrics of parts of the data, such as the precision of one entity type, as table cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft.runs.events import number

Groups = Mapping[str, Mapping[str, Any]]
"""part -> metric's name -> value, as in an `eval` event and result.json. Integers are counts."""


def table_of(groups: Groups) -> tuple[list[str], list[list[str]]]:
    """(names of the metrics, rows of a part's name and its metrics). A missing metric is a hyphen."""
    names = list(dict.fromkeys(name for metrics in groups.values() for name in metrics))
    return names, [[part, *(figure(metrics.get(name)) for name in names)] for part, metrics in groups.items()]


def figure(value: Any) -> str:
    """A metric as text. Counts have no decimals, and large values fewer than four."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{number(value):.4f}" if abs(number(value)) < 100 else f"{number(value):,.2f}"
