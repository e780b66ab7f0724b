"""Curves, and how those of one plot are told apart: by colour, dashes and marks."""

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
    """#rrggbb; the palette's next where empty."""
    mark: str = ""
    """A sign that tells it from others of its colour, and without colour from more than there are dashes."""


@dataclass(frozen=True)
class Look:
    """How a curve is told from the others of its plot."""

    color: str
    dash: int
    """Of DASHES."""
    mark: str

    @property
    def sign(self) -> str:
        return _LINE_SIGNS[self.dash] + self.mark


def looks(curves: Sequence[Curve], no_color: bool) -> list[Look]:
    """No two alike, as long as curves have marks of their own or are no more than there are colours and dashes."""
    found: list[Look] = []
    for i, curve in enumerate(curves):
        color = curve.color or curve_color(i)
        before = i if no_color else sum(look.color == color for look in found)
        found.append(Look(color, before % len(DASHES), curve.mark))
    return found
