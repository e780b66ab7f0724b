"""Metrics of parts of the data as texts."""

from __future__ import annotations

import pytest

from fastpeft.runs.parts import figure, table_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5000"),
        (-0.25, "-0.2500"),
        (1.0, "1.0000"),
        (12345, "12,345"),
        (0, "0"),
        (99.5, "99.5000"),
        (1234.567, "1,234.57"),
        ("nan", "nan"),
        ("-inf", "-inf"),
        (None, "-"),
    ],
)
def test_a_figure_is_told_as_what_it_is(value, text):
    assert figure(value) == text


def test_a_metric_that_a_part_lacks_is_a_hyphen_and_keeps_its_column():
    groups = {"PER": {"f1": 0.5, "support": 7}, "LOC": {"recall": 0.25, "f1": 1.0}}
    assert table_of(groups) == (
        ["f1", "support", "recall"],
        [["PER", "0.5000", "7", "-"], ["LOC", "1.0000", "-", "0.2500"]],
    )
    assert table_of({}) == ([], [])
