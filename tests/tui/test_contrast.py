"""Colours against what is behind them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.color import Color as RichColor
from rich.color_triplet import ColorTriplet
from rich.segment import Segment
from rich.style import Style
from textual.color import Color

from fastpeft.tui.contrast import LEAST_OF_SIGNS, LEAST_OF_TEXT, Contrast, contrast, least_contrast, readable
from fastpeft.tui.theme import CURVES, SPARK, STATUS, THEMES

PARTS = st.integers(0, 255)
COLORS = st.builds(ColorTriplet, PARTS, PARTS, PARTS)
BLACK, WHITE = ColorTriplet(0, 0, 0), ColorTriplet(255, 255, 255)


def test_the_ratio_is_wcags():
    assert contrast(BLACK, WHITE) == pytest.approx(21)
    assert contrast(WHITE, WHITE) == 1
    assert contrast(ColorTriplet(0x77, 0x77, 0x77), WHITE) == pytest.approx(4.48, abs=0.01)


@given(COLORS, COLORS, st.sampled_from([LEAST_OF_SIGNS, LEAST_OF_TEXT]))
def test_every_colour_is_made_to_stand_out_and_one_that_does_is_left(front, behind, least):
    found = readable(front, behind, least)
    assert contrast(found, behind) >= least
    if contrast(front, behind) >= least:
        assert found == front


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_the_palettes_stay_apart(theme):
    behind = RichColor.parse(theme.background).triplet
    for least in (LEAST_OF_SIGNS, LEAST_OF_TEXT):
        found = [readable(RichColor.parse(color).triplet, behind, least) for color in CURVES]
        assert len(set(found)) == len(CURVES)
    assert contrast(RichColor.parse(SPARK).triplet, behind) >= LEAST_OF_SIGNS
    assert all(contrast(readable(RichColor.parse(c).triplet, behind, 4.5), behind) >= 4.5 for _, c in STATUS.values())


@pytest.mark.parametrize(
    ("text", "least"),
    [("done", 4.5), ("━━ 5", 4.5), ("⣿⡇", 3.0), ("━━", 3.0), ("✔", 3.0), ("   ", 0.0), ("▁▂█", 0.0), ("", 0.0)],
)
def test_what_a_text_asks_for(text, least):
    assert least_contrast(text) == least


def test_only_the_foreground_changes():
    behind = Color.parse("#ffffff")
    yellow, on_black = Style(color="#F0E442", bold=True), Style(color="#F0E442", bgcolor="#000000")
    segments = [
        Segment("a", yellow),
        Segment("b", on_black),
        Segment("  ", yellow),
        Segment("c"),
        Segment("d", Style()),
    ]
    found = Contrast().apply(segments, behind)
    assert found[1:] == segments[1:]
    assert found[0].style.bold
    assert contrast(found[0].style.color.triplet, WHITE) >= LEAST_OF_TEXT
    own = [Segment("a", Style(color="default")), Segment("a", Style(color="red"))]  # the terminal's, which may be any
    assert Contrast().apply(own, behind) == own
