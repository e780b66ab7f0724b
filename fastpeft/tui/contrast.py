"""Enough contrast between foreground and background in every theme: the palettes were chosen on a dark background."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rich.color import Color as RichColor
from rich.color_triplet import ColorTriplet
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter

# WCAG 2.2, 1.4.3 and 1.4.11: least contrast of text, and of lines and symbols.
LEAST_OF_TEXT = 4.5
LEAST_OF_SIGNS = 3.0
_STEPS = 32
_BLOCKS = range(0x2580, 0x25A0)
"""Block characters of scroll bars and borders, which have the colours of adjacent areas on purpose."""


class Contrast(LineFilter):
    """Blends a foreground of low contrast with black or white, as little as needed."""

    def apply(self, segments: Sequence[Segment], background: Color) -> list[Segment]:
        behind = background.rich_color
        return [_readable(segment, behind) for segment in segments]


def contrast(one: ColorTriplet, other: ColorTriplet) -> float:
    """The contrast ratio of WCAG 2.2: 1 for equal colours, 21 for black and white."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def least_contrast(text: str) -> float:
    """The contrast ratio that `text` needs; 0 if there is nothing to read."""
    if not text.strip() or all(char == " " or ord(char) in _BLOCKS for char in text):
        return 0.0
    return LEAST_OF_TEXT if any(map(str.isalnum, text)) else LEAST_OF_SIGNS


def _readable(segment: Segment, background: RichColor) -> Segment:
    text, style, control = segment
    if style is None or style.color is None or not (least := least_contrast(text)):
        return segment
    found = _readable_style(style, background, least)
    return segment if found is style else Segment(text, found, control)


@lru_cache(4096)
def _readable_style(style: Style, background: RichColor, least: float) -> Style:
    front = style.color.triplet if style.color is not None else None
    behind = (background if style.bgcolor is None or style.bgcolor.is_default else style.bgcolor).triplet
    if front is None or behind is None:  # the terminal's own colours
        return style
    found = readable(front, behind, least)
    return style if found == front else style + Style(color=RichColor.from_triplet(found))


def readable(front: ColorTriplet, behind: ColorTriplet, least: float) -> ColorTriplet:
    """The colour between `front` and black or white, whichever contrasts more, that first reaches `least`."""
    end = max(ColorTriplet(0, 0, 0), ColorTriplet(255, 255, 255), key=lambda color: contrast(color, behind))
    for i in range(_STEPS + 1):
        found = ColorTriplet(*(round(a + (b - a) * i / _STEPS) for a, b in zip(front, end)))
        if contrast(found, behind) >= least:
            return found
    return end


@lru_cache(4096)
def _luminance(color: ColorTriplet) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color.normalized]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
