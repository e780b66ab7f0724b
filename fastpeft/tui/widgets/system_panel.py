"""The load of a run's machine, from its heartbeats: of the GPU, or of the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.text import Text
from textual.widgets import Static

from fastpeft.tui.format import sparkline
from fastpeft.tui.series import Series
from fastpeft.tui.theme import SPARK

FIGURES = {
    "system/util": ("load", "{:.0f} %"),
    "system/memory_mb": ("memory", "{:,.0f} MB"),
    "system/power_w": ("power", "{:.0f} W"),
    "system/temp_c": ("temp.", "{:.0f} °C"),
    "system/rank_skew": ("skew", "{:+.0f} %"),
    "system/slowest_rank": ("slowest", "rank {:.0f}"),
}
_RECENT = 512


class SystemPanel(Static):
    """One line per quantity: the last value, and the recent ones as a curve."""

    def show(self, series: Mapping[str, Series]) -> None:
        lines = []
        width = max(8, min(60, self.size.width - 24))
        for key, (label, form) in FIGURES.items():
            found = series.get(key)
            last = found.last if found is not None else None
            if found is None or last is None:
                continue
            recent = found.y[-_RECENT:]
            curve = sparkline(tuple(recent[np.isfinite(recent)].tolist()), width)
            value = form.format(last)
            lines.append(Text.assemble((f"{label:<8}", "dim"), f"{value:>10}  ", (curve, SPARK)))
        self.update(Text("\n").join(lines) if lines else Text("no heartbeat yet", style="dim"))
