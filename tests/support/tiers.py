"""Which of a test's cases `make test` runs, and which wait for `make soak`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def some(cases: Sequence[Any], quick: Sequence[int] = (0,), *, unpack: bool = False) -> list[Any]:
    """The cases, for parametrize; those at other places than `quick` are soak tests.

    Args:
        unpack: a case is a tuple of values for several arguments.
    """
    assert all(i < len(cases) for i in quick)
    marks = [() if i in quick else pytest.mark.soak for i in range(len(cases))]
    return [pytest.param(*(case if unpack else (case,)), marks=mark) for case, mark in zip(cases, marks)]


HOSTS = ("_bert_large", "_distilbert", "_tinybert")
"""Ends of the names of presets that differ from another in the model alone."""


def presets(named: Sequence[Any]) -> list[Any]:
    """Presets, by name or path; those that differ from another in the model alone are soak tests."""
    names = [getattr(one, "stem", one) for one in named]
    marks = [pytest.mark.soak if name.endswith(HOSTS) else () for name in names]
    return [pytest.param(one, id=name, marks=mark) for one, name, mark in zip(named, names, marks)]
