"""Whole runs against a real clock, on a machine that may have other work: the rule holds all the same."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from fastpeft.trainer import train
from tests.support.tiny_runs import Listener, strict_events, tiny_run, write_run


@pytest.mark.parametrize(("budget_s", "method"), [(20, "iw_lora"), pytest.param(60, "lora", marks=pytest.mark.soak)])
def test_seconds_are_kept_and_used(budget_s: int, method: str, tmp_path: Path) -> None:
    write_run(tmp_path, num_dev=600)
    run = tiny_run(
        tmp_path,
        method=method,
        budget=f"{budget_s}s",
        regulariser={"warmup_steps": 150},
        training={"checkpoint_steps": 200},
        evaluation={"every": "20%", "batch_tokens": 64},  # hundreds of batches: an evaluation is worth a reserve
    )
    listener = Listener()
    began = time.monotonic()
    result = train(run, results_dir=tmp_path, name="r", reporter=listener)
    wall_s = time.monotonic() - began
    assert result.status == "done"
    events = strict_events(tmp_path / "r")
    assert result.budget["kind"] == "seconds"
    assert result.budget["spent"] == pytest.approx(result.elapsed_s, abs=0.05)
    # The clock is the wall's: nothing but the set-up is outside.
    assert result.elapsed_s + result.setup_s == pytest.approx(wall_s, abs=0.5)
    slack_s = max(0.01 * budget_s, longest_step_s(events))
    assert result.elapsed_s <= budget_s + slack_s
    if budget_s >= 60:
        assert result.elapsed_s >= 0.95 * budget_s
    steps = [e for e in events if e["type"] == "step"]
    assert [e["step"] for e in steps] == list(range(result.steps))
    assert steps[-1]["progress"] > 0.97
    assert steps[-1]["lr"] < 0.05 * max(e["lr"] for e in steps)  # the rate has come down when the time is up
    evaluations = [e for e in events if e["type"] == "eval"]
    assert 2 <= len(evaluations) <= 6  # on a busy machine one takes longer than it is to the next
    assert evaluations[-1]["step"] == result.steps
    assert result.metric["value"] == evaluations[-1]["value"]
    if method == "iw_lora":
        calibration = next(e for e in events if e["type"] == "importance")
        assert calibration["seconds"] < 0.05 * budget_s
    beats = [e["elapsed_s"] for e in events if e["type"] == "system"]
    assert len(beats) >= budget_s / 2 * 0.7


def longest_step_s(events: list[dict]) -> float:
    """Longest time between two steps with nothing else in between."""
    pairs = itertools.pairwise(events)
    return max(b["elapsed_s"] - a["elapsed_s"] for a, b in pairs if a["type"] == b["type"] == "step")
