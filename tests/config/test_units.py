"""Budgets and intervals, as users write them and as they had better not."""

from __future__ import annotations

import random
import re
import string
import time

import pytest

from fastpeft.config import Budget, Interval, parse_budget, parse_interval

BUDGETS = {
    "90s": ("seconds", 90),
    "30m": ("seconds", 1800),
    "30min": ("seconds", 1800),
    "2h": ("seconds", 7200),
    "1.5h": ("seconds", 5400),
    ".5h": ("seconds", 1800),
    "0.25s": ("seconds", 0.25),
    "2000steps": ("steps", 2000),
    "1step": ("steps", 1),
    "1e3steps": ("steps", 1000),
    "5Mtok": ("tokens", 5e6),
    "0.5ktok": ("tokens", 500),
    "2btok": ("tokens", 2e9),
    "7tok": ("tokens", 7),
    "50kJ": ("joules", 50e3),
    "1.5MJ": ("joules", 1.5e6),
    "900j": ("joules", 900),
    "  90 S  ": ("seconds", 90),
}

NO_BUDGETS = [
    "", " ", "s", "30", "-30s", "+30s", "0s", "0steps", "nan s", "nans", "infs", "1e999s", "1e-999s", "1_000s",
    "1,000s", "1:30", "90 s s", "90s90s", "30 minutes", "1..5h", "1.h", "0x10s", "1e", "1es", "2.5steps", "0.1tok",
    "90s\n;rm -rf /", "٣٠s", "3０s", "½h", "90ſ", "90s\x00", "None", "True", "[90s]", "20%", "end", "epoch", "s90",
]  # fmt: skip

INTERVALS = {
    "20%": Interval("fraction", 0.2),
    "100%": Interval("fraction", 1.0),
    "0.5 %": Interval("fraction", 0.005),
    "500steps": Interval("steps", 500),
    "1e2steps": Interval("steps", 100),
    "0.2steps": Interval("steps", 1),
    "60s": Interval("seconds", 60),
    "5m": Interval("seconds", 300),
    "epoch": Interval("epoch"),
    "end": Interval("end"),
}

NO_INTERVALS = [
    "", "20", "0%", "-5%", "100.1%", "200%", "nan%", "%", "0steps", "0s", "5Mtok", "50kJ", "Epoch", "end ", "epochs",
    "every", "1e999s", "1e999steps", "1e999%", "1e-999steps", "20%%", "٢٠%", "20% of it", "None",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BUDGETS.items())
def test_a_budget_is_read_in_its_unit(text, expected):
    assert parse_budget(text) == Budget(*expected)


@pytest.mark.parametrize("text", NO_BUDGETS)
def test_what_is_no_budget_is_refused_with_the_text_in_the_message(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_budget(text)


@pytest.mark.parametrize(("text", "expected"), INTERVALS.items())
def test_an_interval_is_read_in_its_unit(text, expected):
    assert parse_interval(text) == expected


@pytest.mark.parametrize("text", NO_INTERVALS)
def test_what_is_no_interval_is_refused_with_the_text_in_the_message(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_interval(text)


def test_the_message_shows_how_to_write_it():
    with pytest.raises(ValueError, match="90s, 30m, 2h, 2000steps, 5Mtok or 50kJ"):
        parse_budget("30")
    with pytest.raises(ValueError, match="20%, 500steps, 60s, epoch or end"):
        parse_interval("30")


@pytest.mark.parametrize("parse", [parse_budget, parse_interval])
def test_random_text_is_read_or_refused_and_nothing_else(parse, seed):
    rng = random.Random(seed)
    alphabet = string.digits * 3 + ".eE+-% smhkMJtokstep" + "\n\t\x00é٣"
    num_read = 0
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 8)))
        try:
            got = parse(text)
        except ValueError:
            continue
        num_read += 1
        assert (got.limit if isinstance(got, Budget) else got.value) > 0, text
    assert num_read > 0


@pytest.mark.parametrize("parse", [parse_budget, parse_interval])
@pytest.mark.parametrize("text", ["1" * 30_000 + "!", "1." * 15_000, "1e" + "1" * 30_000 + "s", "1" + "s" * 30_000])
def test_long_text_does_not_keep_the_parser_busy(parse, text):
    began = time.process_time()
    with pytest.raises(ValueError, match=r"budget|interval"):
        parse(text)
    assert time.process_time() - began < 2  # a pattern that backtracks takes half a minute


def test_a_budget_prints_with_its_unit():
    assert [str(parse_budget(t)) for t in ("2h", "0.25s", "50kJ", "5Mtok", "2000steps")] == [
        "7,200s", "0.25s", "50,000J", "5,000,000 tokens", "2,000 steps",
    ]  # fmt: skip
