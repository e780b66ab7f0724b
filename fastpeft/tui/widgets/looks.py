"""Curves, and how those of one plot are distinguished: by colour, dashes and marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastpeft.tui.series import Series
from fastpeft.tui.theme import curve_color
from fastpeft.tui.widgets.raster import DASHES

_LINE_SIGNS = ("━", "╍", "┅", "┉")


@dataclass(frozen=True)
class Curve:
    label: str
    series: Series
    color: str = ""
    """#rrggbb; the next of the palette if empty."""
    mark: str = ""
    """A symbol that distinguishes curves of equal colour, and without colour, curves of equal dashes."""


@dataclass(frozen=True)
class Look:
    """How a curve is distinguished from the others of its plot."""

    color: str
    dash: int
    """Index into DASHES."""
    mark: str

    @property
    def sign(self) -> str:
        return _LINE_SIGNS[self.dash] + self.mark


def looks(curves: Sequence[Curve], no_color: bool) -> list[Look]:
    """Distinct looks, provided that curves have distinct marks or do not outnumber colours and dashes."""
    found: list[Look] = []
    for i, curve in enumerate(curves):
        color = curve.color or curve_color(i)
        before = i if no_color else sum(look.color == color for look in found)
        found.append(Look(color, before % len(DASHES), curve.mark))
    return found
