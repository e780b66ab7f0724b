"""One pass over a log: bounded, and no value lost on the way."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest

from fastpeft.compare.history import COLUMNS, MAX_HEARTBEATS, MAX_SNAPSHOTS, Thinned, binned, read_history
from fastpeft.runs.events import parse_event, read_events, read_lines
from tests.support.tui_logs import evaluation, event, header, heartbeat, importance, lines, step


def history_of(path, events):
    path.write_bytes(lines(events))
    return read_history(read_lines(path))


def test_steps_become_columns_and_what_is_missing_or_not_finite_is_told_apart(tmp_path):
    events = [header(), step(0), step(1, loss=math.inf, energy_j=None), step(2, loss=math.nan), event("end", 1.0, 3)]
    del events[2]["penalty"]
    found = history_of(tmp_path / "log", events)
    assert list(found.steps) == list(COLUMNS)
    assert found.steps["step"].tolist() == [0, 1, 2]
    assert found.steps["loss"].tolist()[:2] == [2.0, math.inf]
    for name, row in (("loss", 2), ("energy_j", 1), ("penalty", 1)):
        assert math.isnan(found.steps[name][row])
    assert (len(found), found.num_events, found.end["type"], found.config["method"]) == (3, 5, "end", "iw_lora")


def test_steps_written_otherwise_keep_their_order(tmp_path):
    """One with blanks, one without most of its numbers, and one that a kill cut off."""
    path = tmp_path / "log"
    cut = lines([step(9)])[:40] + b"\n"
    path.write_bytes(lines([step(0)]) + json.dumps(step(1)).encode() + b"\n" + cut + lines([step(2), header()]))
    found = read_history(read_lines(path))
    assert found.steps["step"].tolist() == [0, 1, 2]
    assert (found.steps["loss"][1], found.num_events) == (1.5, 4)
    path.write_bytes(lines([step(0)]) + cut + lines([step(2)]))
    assert read_history(read_lines(path)).steps["step"].tolist() == [0, 2]


def test_evaluations_are_kept_by_split_and_warnings_counted(tmp_path):
    test = evaluation(9, 0.7, split="test")
    warnings = [event("warning", 1.0, i, message=f"m{i}") for i in range(50)]
    found = history_of(tmp_path / "log", [evaluation(4, 0.5), evaluation(9, 0.6), test, *warnings])
    assert [one["value"] for one in found.validations] == [0.5, 0.6]
    assert [one["value"] for one in found.tests] == [0.7]
    assert (found.num_warnings, found.warnings[0], len(found.warnings)) == (50, "m0", 20)


def test_heartbeats_and_importances_are_thinned_to_the_last(tmp_path):
    beats = [heartbeat(float(i), i, power_w=float(i)) for i in range(3 * MAX_HEARTBEATS)]
    weights = [importance(i, [i, 0.0, 0.0, 0.0]) for i in range(200)]
    found = history_of(tmp_path / "log", [*beats, *weights])
    power = found.system["power_w"]
    assert len(power) <= MAX_HEARTBEATS + 1
    assert (power[0], power[-1]) == (0, 3 * MAX_HEARTBEATS - 1)
    assert len(set(np.diff(power[:-1]))) == 1, "evenly"
    assert len(found.importance) <= MAX_SNAPSHOTS + 1
    assert found.importance[-1].weights[0] == 199


@pytest.mark.parametrize("count", range(1, 12))
def test_thinned_keeps_the_first_and_the_last(count):
    kept = Thinned[int](4)
    for i in range(count):
        kept.add(i)
    items = kept.items()
    assert (items[0], items[-1]) == (0, count - 1)
    assert len(items) == min(count, len(items)) <= 5
    assert items == sorted(set(items))


def test_blocks_hold_every_whole_line(tmp_path, monkeypatch):
    """Also where a block ends within a line, a line is damaged, longer than a block, or not ended."""
    path = tmp_path / "log"
    events = [step(i) for i in range(40)] + [event("warning", 0.0, 0, message="x" * 3000)]
    path.write_bytes(lines(events) + b'{"type": 3}\n[1]\n\n{"half": \n' + lines([step(41)]) + b'{"type":"step","x":1}')
    for size in (7, 100, 1 << 18):
        monkeypatch.setattr("fastpeft.runs.events._BLOCK_BYTES", size)
        found = [parse_event(line) for lines in read_lines(path) for line in lines]
        assert [one for one in found if one is not None] == list(read_events(path))
        assert read_history(read_lines(path)).steps["step"].tolist() == [*range(40), 41]
    assert len(list(read_events(path))) == 42


def test_a_step_more_takes_its_columns_and_nothing_else(tmp_path, monkeypatch):
    """64 bytes in eight columns, twice that while they are joined; as an event it would take a kilobyte."""
    monkeypatch.setattr("fastpeft.runs.events._BLOCK_BYTES", 1 << 16)

    def peak(num_steps):
        path = tmp_path / "log"
        path.write_bytes(lines(step(i) for i in range(num_steps)))
        tracemalloc.start()
        assert len(read_history(read_lines(path))) == num_steps
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert (peak(16_000) - peak(4_000)) / 12_000 < 150


def test_bins_keep_the_mean_the_ends_and_pass_over_what_is_not_finite(seed):
    rng = np.random.default_rng(seed)
    x, values = np.arange(1000.0), rng.normal(size=1000)
    values[[3, 500]] = np.inf, np.nan
    found = binned(x, values, 100)
    assert (found.per_bin, len(found.x)) == (10, 100)
    first = np.delete(values[:10], 3)
    assert (found.mean[0], found.low[0], found.high[0]) == pytest.approx((first.mean(), first.min(), first.max()))
    assert found.x[0] == pytest.approx(4.5)
    few = binned(x[:3], np.array([1.0, np.nan, 3.0]), 100)
    assert (few.x.tolist(), few.mean.tolist(), few.per_bin) == ([0, 2], [1, 3], 1)
    assert len(binned(np.empty(0), np.empty(0), 100).x) == 0
