"""Numbers and texts as cells."""

from __future__ import annotations

import math
import random

import pytest
from rich.text import Text

from fastpeft.tui.format import decimal, fitted, flowed, headed, joined, printable, sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.56051, "0.5605"),
        (-0.71951, "-0.7195"),
        (12.34567, "12.3457"),
        (1234.5678, "1234.57"),
        (12345.6, "1.2e4"),
        (2.3e12, "2.3e12"),
        (-3.4e38, "-3.4e38"),
        (5e-5, "5.0e-5"),
        (0.0, "0.0000"),
        (-math.inf, "-inf"),
        (None, "-"),
    ],
)
def test_a_decimal_is_never_cut_off_to_a_smaller_number(value, text):
    assert decimal(value) == text


def test_every_decimal_fits_its_column(seed):
    rng = random.Random(seed)
    for _ in range(2000):
        value = rng.choice((1, -1)) * rng.uniform(1, 10) * 10.0 ** rng.randint(-38, 37)
        text = decimal(value)
        assert len(text) <= 7, value
        assert float(text) == pytest.approx(value, rel=0.5 if value < 0 else 0.06)


def test_a_sparkline_of_any_finite_values():
    assert sparkline((1e308, -1e308, 1e308, -1e308), 4) == "█▁█▁"
    assert sparkline((1.7e308, 1.7e308, -1.7e308, -1.7e308), 2) == "█▁"
    assert sparkline((2.0, 2.0), 2) == "▁▁"
    assert sparkline((), 8) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07end", "red end"),
        ("0%\r50%\r100%\nnext", "100%\nnext"),
        ("windows\r\nlines\r\n", "windows\nlines\n"),
        ("a\tb", "a   b"),
        ("bell\x07 \u202eabc", "bell� �abc"),
        ("漢字 ünï 🦥", "漢字 ünï 🦥"),
    ],
)
def test_a_text_cannot_steer_the_terminal(text, shown):
    assert printable(text) == shown


PARTS = ("compare", "", Text("4 runs", "bold"), Text(" STAND-IN ", "reverse"), "several metrics")


def test_parts_have_blanks_between_them_and_those_without_room_are_left_out_whole():
    assert joined(PARTS).plain == "compare  4 runs   STAND-IN   several metrics"
    assert [str(span.style) for span in joined(PARTS).spans] == ["bold", "reverse"]
    assert joined([]).plain == ""
    for width in range(1, 50):
        assert fitted(PARTS, width).cell_len <= width
        assert all(len(line) <= width for line in flowed(PARTS, width).plain.split("\n"))
    assert fitted(PARTS, 28).plain == "compare  4 runs   STAND-IN "
    assert fitted(PARTS, 26).plain == "compare  4 runs"
    assert fitted(PARTS, 5).plain == "comp…"
    assert flowed(PARTS, 26).plain == "compare  4 runs\n STAND-IN \nseveral metrics"


def test_a_heading_keeps_its_facts_and_cuts_what_is_long():
    name, last = "a-name-of-thirty-characters-xyz", "iw_lora on a-model, a-dataset"
    assert headed(name, ["done"], last, 80).plain == f"{name}  done  {last}"
    for width in range(20, 80):
        found = headed(name, ["done"], last, width).plain
        assert len(found) <= width
        assert "  done" in found
    assert headed("a", [], "", 10).plain == "a"
