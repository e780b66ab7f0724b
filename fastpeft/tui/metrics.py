"""Metrics of evaluations: which of them share a plot, and a table of metrics of parts of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from fastpeft.runs.parts import table_of
from fastpeft.tui.parse import PartScores
from fastpeft.tui.series import Series

_DRAWN_ELSEWHERE = ("eval/loss", "eval/decode_s")


def shares(series: Mapping[str, Series]) -> tuple[str, ...]:
    """Names of the series that share a plot: shares and correlations, which lie within -1 and 1."""
    return tuple(name for name in series if _is_metric(name) and not _is_large(series[name]))


def others(series: Mapping[str, Series]) -> tuple[str, ...]:
    """Names of metrics on scales of their own, such as a squared error."""
    return tuple(name for name in series if _is_metric(name) and _is_large(series[name]))


def parts_table(found: Sequence[PartScores]) -> Table:
    """One line per part, split after split."""
    names = list(dict.fromkeys(name for one in found for name in table_of(one.groups)[0]))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", header_style="dim")
    for i, one in enumerate(found):
        own, rows = table_of(one.groups)
        if i:
            table.add_row()
        table.add_row(Text(f"{one.split}, step {one.step:,}", "bold"))
        for part, *figures in rows:
            told = dict(zip(own, figures))
            table.add_row(Text(part), *(told.get(name, "-") for name in names))
    return table


def _is_metric(name: str) -> bool:
    return name.startswith("eval/") and name not in _DRAWN_ELSEWHERE


def _is_large(series: Series) -> bool:
    y = series.y
    return bool((np.abs(y[np.isfinite(y)]) > 1).any())
