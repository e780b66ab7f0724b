"""A schedule's forecasts of the loss at the budget's end, compared with the actual loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from fastpeft.tui.parse import FORECAST
from fastpeft.tui.series import Floats, Series
from fastpeft.tui.tail import RunTail
from fastpeft.tui.widgets.axes import short
from fastpeft.tui.widgets.plot import Band

COLOR = "#CC79A7"
LAST_STEPS = 32
"""The actual loss is the mean over this many last steps, as forecasts are of a mean too."""
QUARTERS = (0.25, 0.5, 0.75)
_NEAR = 0.05
"""Largest distance, as a share of the budget, at which a forecast counts for a quarter."""
_COLUMNS = ("y", "at", "horizon", "low", "high", "progress")


@dataclass(frozen=True)
class Forecast:
    """Forecast of the mean task loss at the end, with its band; nan if there is no band."""

    value: float
    at: float
    """Step at which it was made."""
    horizon: float
    """Last step of the budget, as estimated then."""
    low: float
    high: float
    progress: float
    """Share of the budget spent at that time."""

    def __str__(self) -> str:
        band = f" ({_three(self.low)}–{_three(self.high)})" if math.isfinite(self.low + self.high) else ""
        return f"{_three(self.value)}{band}"


def newest(tail: RunTail) -> Forecast | None:
    """The last forecast that is not nan."""
    table = _table(tail)
    rows = np.flatnonzero(np.isfinite(table["value"])) if table else np.array([], dtype=np.intp)
    return _forecast(table, rows[-1]) if len(rows) else None


def at_quarters(tail: RunTail) -> list[tuple[float, Forecast]]:
    """The forecasts made at 25, 50 and 75 % of the budget, as far as they exist."""
    table, found = _table(tail), []
    if not table:
        return []
    rows = np.flatnonzero(np.isfinite(table["value"]) & np.isfinite(table["progress"]))
    for quarter in QUARTERS:
        away = np.abs(table["progress"][rows] - quarter)
        if len(away) and away.min() <= _NEAR:
            found.append((quarter, _forecast(table, rows[away.argmin()])))
    return found


def came(tail: RunTail) -> float | None:
    """The actual loss at the end: the mean of the last steps. None for a run that has not reached its end."""
    loss = tail.series.get("loss")
    if loss is None or (tail.end or {}).get("status") != "done":
        return None
    last = loss.y[-LAST_STEPS:]
    return float(last.mean()) if np.isfinite(last).all() else None


def band(forecast: Forecast, loss: Series, axis: str) -> Band | None:
    """The band from the forecast's step to the budget's end; None if the end's position on the axis is unknown."""
    first, last = (loss.at_step(axis, step) for step in (forecast.at, forecast.horizon))
    if first is None or last is None or not first <= last:
        return None
    low, high, value = (np.full(2, edge) for edge in (forecast.low, forecast.high, forecast.value))
    return Band(np.array([first, last]), low, high, COLOR, f"forecast {forecast}", value)


def summary(tail: RunTail) -> Text:
    """Three lines: the schedule's last values, the newest forecast, and earlier forecasts against the actual loss."""
    lines = []
    figures = {name: s.last for name, s in tail.series.items() if name.startswith("schedule/") and s.last is not None}
    if figures:
        said = [f"{name.removeprefix('schedule/').replace('_', ' ')} {short(value)}" for name, value in figures.items()]
        lines.append(_line("schedule", "  ".join(said)))
    last = newest(tail)
    if last is not None:
        made = f", {last.progress:.0%} of the budget" if math.isfinite(last.progress) else ""
        lines.append(_line("forecast", f"{last} at step {last.horizon:,.0f}, made at step {last.at:,.0f}{made}"))
        real = came(tail)
        if real is not None:
            lines.append(_line("came", f"{short(real)}, the mean of the last {LAST_STEPS} steps"))
        quarters = [f"{at:.0%} {_compared(one, real)}" for at, one in at_quarters(tail)]
        if quarters:
            lines.append(_line("made at", "  ".join(quarters)))
    return Text("\n").join(lines)


def _compared(forecast: Forecast, real: float | None) -> str:
    error = "" if not real else f" ({(forecast.value - real) / abs(real):+.1%})"
    return f"{_three(forecast.value)}{error}"


def _three(value: float) -> str:
    """A value with three significant digits, which a forecast justifies."""
    return short(float(f"{value:.3g}"))


def _line(name: str, said: str) -> Text:
    return Text.assemble((f"{name:<10}", "dim"), said)


def _table(tail: RunTail) -> dict[str, Floats]:
    series = tail.series.get(FORECAST)
    if series is None:
        return {}
    table = dict(zip(_COLUMNS, series.columns(*_COLUMNS)))
    return table | {"value": table["y"]}


def _forecast(table: dict[str, Floats], row: int) -> Forecast:
    return Forecast(**{name: float(table[name][row]) for name in Forecast.__dataclass_fields__})
