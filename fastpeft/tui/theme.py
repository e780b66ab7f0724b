"""Colours that colour-blind people can distinguish, and symbols that replace them without colour."""

from __future__ import annotations

from textual.theme import Theme

# Okabe and Ito, "Color Universal Design", 2008, without black. Yellow is last, since it is faint on white.
CURVES = ("#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")

SPARK = "#3D8FC4"
"""Colour of sparklines, visible on dark and light backgrounds."""
NOTE, WRONG = "#E69F00", "#D55E00"
"""Colours of notes, and of errors."""

STATUS = {
    "running": ("●", "#56B4E9"),
    "done": ("✔", "#009E73"),
    "stopped": ("■", "#E69F00"),
    "dead": ("✖", "#D55E00"),
    "failed": ("✖", "#D55E00"),
    "diverged": ("▲", "#CC79A7"),
    "pruned": ("◆", "#999999"),
    "no result": ("?", "#999999"),
}
"""Status -> (symbol, colour). The symbol alone is sufficient."""

# Stops of cividis (Nunez, Anderton and Renslow 2018), which looks the same with and without red-green vision.
_CIVIDIS = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115),
    (138, 134, 120), (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip
# RdBu (Brewer 2003) from blue to red, which red-green blind people can distinguish.
_DIVERGING = (
    (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (247, 247, 247),
    (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43),
)  # fmt: skip
SHADES = " ░▒▓█"
"""Characters for a value's share of the scale, used without colour."""

THEMES = (
    Theme(
        name="fastpeft-dark",
        primary="#56B4E9",
        secondary="#009E73",
        accent="#E69F00",
        warning="#E69F00",
        error="#D55E00",
        success="#009E73",
        background="#101418",
        surface="#171c22",
        panel="#222932",
        dark=True,
    ),
    Theme(
        name="fastpeft-light",
        primary="#0072B2",
        secondary="#00674B",
        accent="#9A5B00",
        warning="#9A5B00",
        error="#B34700",
        success="#00674B",
        background="#FFFFFF",
        surface="#F4F5F6",
        panel="#E4E7EA",
        dark=False,
    ),
)


def curve_color(i: int) -> str:
    return CURVES[i % len(CURVES)]


def scale_color(share: float) -> tuple[int, int, int]:
    """(red, green, blue) for a share of the scale in 0..1."""
    return _between(_CIVIDIS, share)


def ratio_color(share: float) -> tuple[int, int, int]:
    """(red, green, blue) on a diverging scale: blue below its middle, red above."""
    return _between(_DIVERGING, share)


def _between(stops: tuple[tuple[int, int, int], ...], share: float) -> tuple[int, int, int]:
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    red, green, blue = (round(a + (b - a) * (at - i)) for a, b in zip(stops[i], stops[i + 1]))
    return red, green, blue


def shade(share: float) -> str:
    """The character of SHADES for a share of the scale in 0..1. The least value is not blank."""
    return SHADES[1 + min(int(min(max(share, 0.0), 1.0) * 4), 3)]
