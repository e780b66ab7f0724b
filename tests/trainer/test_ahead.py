"""Batches made on a thread are those that were asked for, in their order, and a run is the same with and without it."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpeft.data.batches import Batch
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer import run as run_module
from fastpeft.trainer.ahead import NUM_AHEAD, Ahead
from fastpeft.trainer.build import build_job
from tests.support.tiny_runs import Listener, assert_same_weights, strict_events, tiny_run, weights

NO_TENSOR = torch.empty(0)


def parts(*firsts: int) -> list[np.ndarray]:
    return [np.arange(first, first + 3) for first in firsts]


def batch_of(rows: np.ndarray) -> Batch:
    return Batch({}, NO_TENSOR, int(rows[0]))


class Collated:
    """Notes what was made, and by which thread."""

    def __init__(self, fails_at: int = -1, slow_s: float = 0.0) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.fails_at, self.slow_s = fails_at, slow_s

    def __call__(self, rows: np.ndarray) -> Batch:
        time.sleep(self.slow_s)
        self.threads.add(threading.current_thread().name)
        self.made.append(int(rows[0]))
        if self.made[-1] == self.fails_at:
            raise ValueError(f"row {rows[0]} is broken")
        return batch_of(rows)

    def wait_for(self, count: int) -> None:
        until = time.monotonic() + 10
        while len(self.made) < count and time.monotonic() < until:
            time.sleep(0.001)


@pytest.fixture
def thread():
    opened: list[Ahead] = []

    def make(*args: Any) -> Ahead:
        opened.append(Ahead(*args))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastpeft-ahead")]


def numbers(batches: Any) -> list[int]:
    return [batch.num_tokens for batch in batches]


def test_they_come_in_their_order_from_one_thread(thread) -> None:
    collate = Collated(slow_s=0.001)
    ahead = thread(collate)
    assert numbers(ahead.batches(parts(*range(0, 60, 3)))) == list(range(0, 60, 3))
    assert numbers(ahead.batches(parts(7))) == [7]
    assert collate.made == [*range(0, 60, 3), 7]
    assert len(collate.threads) == 1
    assert next(iter(collate.threads)).startswith("fastpeft-ahead")


def test_so_many_are_ready_before_they_are_asked_for(thread) -> None:
    collate = Collated()
    batches = thread(collate).batches(parts(*range(20)))
    next(batches)
    collate.wait_for(1 + NUM_AHEAD)
    time.sleep(0.02)
    assert collate.made == list(range(1 + NUM_AHEAD))


def test_those_of_the_next_step_are_begun(thread) -> None:
    collate = Collated()
    ahead = thread(collate)
    assert numbers(ahead.batches(parts(0, 1), parts(2, 3, 4, 5, 6))) == [0, 1]
    collate.wait_for(2 + NUM_AHEAD - 1)
    assert numbers(ahead.batches(parts(2, 3, 4))) == [2, 3, 4]
    assert collate.made[:5] == [0, 1, 2, 3, 4]
    assert collate.made.count(2) == 1


def test_what_was_foreseen_wrongly_is_forgotten(thread) -> None:
    """The memory was short: the same rows come in other parts."""
    collate = Collated()
    ahead = thread(collate)
    batches = ahead.batches(parts(0, 1, 2, 3))
    assert next(batches).num_tokens == 0
    halves = [np.arange(0, 2), np.arange(2, 3)]
    assert numbers(ahead.batches([*halves, *parts(1, 2)], parts(9))) == [0, 2, 1, 2]
    assert numbers(ahead.batches(parts(5), ())) == [5]


def test_the_same_parts_twice_are_the_same_batches(thread) -> None:
    ahead = thread(Collated())
    for _ in range(3):
        assert numbers(ahead.batches(parts(4, 2, 8))) == [4, 2, 8]


def test_an_error_comes_where_its_batch_would_have(thread) -> None:
    ahead = thread(Collated(fails_at=2))
    batches = ahead.batches(parts(0, 1, 2, 3))
    assert [next(batches).num_tokens for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="row 2 is broken"):
        next(batches)
    assert numbers(ahead.batches(parts(6, 7))) == [6, 7]


def test_closing_waits_for_the_batch_in_work_and_makes_no_other(thread) -> None:
    collate = Collated(slow_s=0.02)
    ahead = thread(collate)
    next(ahead.batches(parts(*range(30))))
    ahead.close()
    made = len(collate.made)
    time.sleep(0.06)
    assert len(collate.made) == made <= 3


# ---- in a run ------------------------------------------------------------------------------


@pytest.fixture
def on_a_thread(monkeypatch: pytest.MonkeyPatch) -> list[Ahead]:
    """Of every run from here on."""
    opened: list[Ahead] = []

    def build(*args: Any) -> Any:
        job = build_job(*args)
        job.ahead = Ahead(lambda rows: job.task.collate(rows, job.device))
        opened.append(job.ahead)
        return job

    monkeypatch.setattr(run_module, "build_job", build)
    return opened


SETTINGS: dict[str, Any] = {"budget": "30steps", "training": {"micro_batch_tokens": 60, "checkpoint_steps": 4}}


@pytest.mark.soak
def test_a_run_is_the_same_to_the_bit(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Calibration, dropout, more than two epochs, a stop in between."""
    train(tiny_run(tmp_path, **SETTINGS), results_dir=tmp_path, name="plain")
    opened = request.getfixturevalue("on_a_thread")
    train(tiny_run(tmp_path, **SETTINGS), results_dir=tmp_path, name="thread")
    stop = StopRequest()
    listener = Listener(lambda e: e["step"] >= 14 and setattr(stop, "signal", signal.SIGTERM))
    run = tiny_run(tmp_path, **SETTINGS)
    assert train(run, results_dir=tmp_path, name="cut", reporter=listener, stop=stop).status == "stopped"
    assert train(None, results_dir=tmp_path, name="cut", resume=True).status == "done"
    for name in ("thread", "cut"):
        assert_same_weights(weights(tmp_path / name), weights(tmp_path / "plain"))
    losses = [[e["loss"] for e in strict_events(tmp_path / n) if e["type"] == "step"] for n in ("plain", "thread")]
    assert losses[0] == losses[1]
    assert len(opened) == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("fastpeft-ahead")]


def test_its_error_ends_the_run_and_the_thread(
    tmp_path: Path, on_a_thread: list[Ahead], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpeft.tasks.sequences import task

    original, calls = task.collate, []

    def collate(*args: Any) -> Batch:
        if threading.current_thread().name.startswith("fastpeft-ahead"):
            calls.append(None)
            if len(calls) == 12:
                raise OSError("the file is gone")
        return original(*args)

    monkeypatch.setattr(task, "collate", collate)
    with pytest.raises(OSError, match="the file is gone"):
        train(tiny_run(tmp_path, method="lora"), results_dir=tmp_path, name="r")
    end = strict_events(tmp_path / "r")[-1]
    assert (end["type"], end["status"]) == ("end", "failed")
    assert not [t for t in threading.enumerate() if t.name.startswith("fastpeft-ahead")]


def test_on_a_cpu_there_is_no_thread(tmp_path: Path) -> None:
    assert build_job(tiny_run(tmp_path)).ahead is None
