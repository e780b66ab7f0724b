"""The slowest rank is named by what the ranks computed, not by how long they waited."""

from __future__ import annotations

import time

import pytest

from fastpeft.launched import Place
from fastpeft.ranks import ALONE, Ranks
from fastpeft.trainer.pass_times import PassTimes


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> list[PassTimes]:
    """Of two ranks on a CPU, in one process."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return [PassTimes(Ranks(Place(rank=rank, size=2, local_rank=rank, local_size=2))) for rank in (0, 1)]


def exchange(ranks: list[PassTimes]) -> None:
    seconds = [sum(pair) for pair in zip(*(each.take_own() for each in ranks))]
    for each in ranks:
        each.add(seconds)


def test_the_slowest_rank_and_by_how_much(both: list[PassTimes]) -> None:
    for _ in range(3):
        for each, seconds in zip(both, (0.01, 0.03)):
            each.begin()
            time.sleep(seconds)
            each.end()
        exchange(both)
    found = both[0].skew()
    assert found == both[1].skew()
    assert found["slowest_rank"] == 1
    assert 25 < found["rank_skew"] < 60  # 0.03 over their mean of 0.02


def test_waiting_does_not_count(both: list[PassTimes]) -> None:
    for each in both:
        each.begin()
        each.end()
    time.sleep(0.05)
    assert all(sum(each.take_own()) < 0.02 for each in both)


def test_it_is_of_the_steps_since_it_was_asked_for_last(both: list[PassTimes]) -> None:
    assert both[0].skew() == {}
    both[0].add([1.0, 3.0])
    assert both[0].skew() == {"slowest_rank": 1, "rank_skew": 50.0}
    assert both[0].skew() == {}
    both[0].add([3.0, 1.0])
    assert both[0].skew() == {"slowest_rank": 0, "rank_skew": 50.0}


def test_passes_that_did_not_end_do_not_count(both: list[PassTimes]) -> None:
    """On a GPU their event was never recorded, and asking it for a time is an error."""
    first, _ = both
    first.begin()
    time.sleep(0.05)
    first.begin()
    first.end()
    first.end()
    assert sum(first.take_own()) < 0.02


def test_a_gpu_is_asked_for_passes_that_have_ended(both: list[PassTimes], monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.recorded = False

        def record(self) -> None:
            self.recorded = True

        def query(self) -> bool:
            return True  # as CUDA says of an event that was never recorded

        def elapsed_time(self, other: Event) -> float:
            assert self.recorded
            assert other.recorded
            return 250.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr(both[0], "_on_gpu", True)
    both[0].begin()
    assert both[0].take_own() == [0.0, 0.0]
    both[0].begin()
    both[0].end()
    assert both[0].take_own() == [0.25, 0.0]


def test_one_process_has_none() -> None:
    alone = PassTimes(ALONE)
    alone.add(alone.take_own())
    assert alone.skew() == {}
