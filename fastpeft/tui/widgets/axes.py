"""Ticks and labels of a plot's axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textual_plot.axis_formatter import AxisFormatter, DurationFormatter

from fastpeft.tui.format import scientific

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """At most seven characters: 12.3k, 0.5731, 1.2e-6."""
    if not math.isfinite(value):
        return str(value)
    for size, sign in _UNITS:
        if abs(value) >= size * (10 if size == 1e3 else 1):
            return f"{value / size:.4g}{sign}"
    if value and abs(value) < 1e-3:
        return scientific(value)
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """12.3s, 4:05, 3:04:05."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def position(axis: str, x: float) -> str:
    return clock(x) if axis == "time" else f"{x:,.0f} {axis}"


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    if not high > low or most < 1:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [min(max(i * step, low), high) for i in range(first, last + 1)]
    return []


class _Fitted(AxisFormatter):
    """At most `most` ticks, which the plot sets by its size. On an axis of `columns` cells no label ends beyond it."""

    most = 6
    columns: int | None = None
    """Length of a horizontal axis in cells; None for a vertical one."""

    def get_ticks_and_labels(self, min_: float, max_: float, max_ticks: int = 8) -> tuple[list[float], list[str]]:
        ticks, labels = super().get_ticks_and_labels(min_, max_, max_ticks)
        if self.columns is None:
            return ticks, labels
        places = [(tick - min_) / (max_ - min_) * self.columns for tick in ticks]
        fit = [i for i, label in enumerate(labels) if ticks[i] == max_ or places[i] + len(label) // 2 <= self.columns]
        return [ticks[i] for i in fit], [labels[i] for i in fit]


class Numbers(_Fitted):
    """Multiples of 1, 2 or 5 times a power of ten."""

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        return nice_ticks(min_, max_, min(self.most, max_ticks))

    def get_labels_for_ticks(self, ticks: Sequence[float]) -> list[str]:
        return _told_apart([round(tick, 12) if abs(tick) >= 1e-3 else tick for tick in ticks])


class Durations(_Fitted, DurationFormatter):
    """As Numbers, for seconds."""

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        _, unit = self._select_unit(min_, max_)
        return [tick * unit for tick in nice_ticks(min_ / unit, max_ / unit, min(self.most, max_ticks))]


class Powers(Numbers):
    """Ticks for log10 values: whole decades; within one decade, 1, 2 and 5 times a power of ten."""

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        most = min(self.most, max_ticks)
        whole = list(range(math.ceil(min_), math.floor(max_) + 1))
        if len(whole) >= 2:
            return [float(i) for i in whole[:: -(-len(whole) // most)]]
        within = [
            math.log10(digit) + power
            for power in range(math.floor(min_), math.ceil(max_) + 1)
            for digit in (1, 2, 5)
            if min_ <= math.log10(digit) + power <= max_
        ]
        if len(within) >= 2:
            return within[:most]
        return [math.log10(tick) for tick in nice_ticks(10**min_, 10**max_, most) if tick > 0]

    def get_labels_for_ticks(self, ticks: Sequence[float]) -> list[str]:
        return _told_apart([10**tick for tick in ticks])


def _told_apart(values: Sequence[float]) -> list[str]:
    """Labels with enough digits to be distinct."""
    labels = [short(value) for value in values]
    for digits in (5, 6):
        if len(set(labels)) == len(labels):
            break
        labels = [scientific(v, digits - 3) if 0 < abs(v) < 1e-3 else f"{v:.{digits}g}" for v in values]
    return labels
