"""Rank processes that the tests of this folder share: each takes seconds to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.rank_processes import RankProcesses

Ranks = Callable[[int], RankProcesses]


@pytest.fixture(scope="session")
def float64_ranks() -> Iterator[Ranks]:
    """So many ranks, all of whose fp32 is float64."""
    started: dict[int, RankProcesses] = {}

    def ranks(size: int) -> RankProcesses:
        if size not in started or not started[size].alive:
            started[size] = RankProcesses(size, float64=True)
        return started[size]

    yield ranks
    for each in started.values():
        each.end()
