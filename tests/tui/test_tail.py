"""A growing log is read once, in any pieces, and another log is noticed."""

from __future__ import annotations

import json
import os
import random
import threading
import time

import numpy as np
import pytest

from fastpeft.runs.events import EventLog
from fastpeft.tui import tail as tail_module
from fastpeft.tui.parse import parse
from fastpeft.tui.tail import STEP_SERIES, RunTail
from tests.support.tui_logs import TOKENS, evaluation, event, header, heartbeat, importance, lines, step, usual


@pytest.fixture
def small_samples(monkeypatch):
    """Samples of a log that a test can afford; chunks smaller than one."""
    monkeypatch.setattr(tail_module, "SAMPLED_FROM_BYTES", 1 << 14)
    monkeypatch.setattr(tail_module, "NUM_SAMPLES", 16)
    monkeypatch.setattr(tail_module, "SAMPLE_BYTES", 1 << 10)
    monkeypatch.setattr(tail_module, "CHUNK_BYTES", 700)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "events.jsonl"


def read_all(path, tail=None):
    tail = tail or RunTail(path)
    for _ in range(100_000):
        tail.poll(0.01)
        if tail.is_caught_up:
            return tail
    raise AssertionError("never caught up")


def same(a, b):
    assert list(a.series) == list(b.series) or set(a.series) == set(b.series)
    for key in a.series:
        for axis in ("time", "steps", "tokens", "joules"):
            for got, want in zip(a.series[key].xy(axis), b.series[key].xy(axis)):
                np.testing.assert_array_equal(got, want, err_msg=f"{key} {axis}")
    assert a.notable == b.notable
    assert [i.step for i in a.importance] == [i.step for i in b.importance]
    assert (a.header, a.end, a.malformed, a.num_events) == (b.header, b.end, b.malformed, b.num_events)


# ---- what is read --------------------------------------------------------------------------


def test_a_run_as_the_trainer_writes_it(log):
    log.write_bytes(lines(usual(200)))
    tail = read_all(log)
    assert set(tail.series) == {*STEP_SERIES, "eval/accuracy", "eval/loss", "system/util", "system/memory_mb"}
    assert len(tail.series["loss"]) == 200
    assert tail.series["loss"].y[1] == pytest.approx(1.5)
    assert tail.series["tokens"].last == 200 * TOKENS
    assert tail.series["power_w"].last == pytest.approx(200.0)
    assert tail.series["eval/accuracy"].y.tolist() == [0.495, 0.995]
    assert tail.series["eval/accuracy"].x("steps").tolist() == [100, 200]
    assert tail.series["eval/accuracy"].x("tokens").tolist() == [100 * TOKENS, 200 * TOKENS]
    assert tail.series["system/util"].y.tolist() == [90.0] * 10
    kinds = [n.kind for n in tail.notable]
    assert kinds == ["run", "importance", "eval", "checkpoint", "eval", "checkpoint", "end"]
    assert tail.notable[2].text == "accuracy 0.4950, loss 0.9000 on 2,000 rows"
    assert tail.header["pid"] == 4321
    assert tail.end["status"] == "done"
    assert (tail.malformed, tail.num_events, tail.progress) == (0, 217, 1.0)
    assert tail.bytes_read == tail.size == log.stat().st_size


def test_what_was_never_measured_has_no_series(log):
    bare = {"energy_j": None, "penalty_share": None}
    events = [step(i, **bare) for i in range(3)]
    for e in events:
        del e["penalty_share"]
    log.write_bytes(lines([header(), *events]))
    tail = read_all(log)
    assert set(tail.series) == set(STEP_SERIES) - {"energy_j", "power_w", "penalty_share"}
    log.write_bytes(lines([header(), *events, step(3)]))
    assert set(read_all(log).series) == set(STEP_SERIES)


def test_numbers_that_are_not_finite_come_back(log):
    nan, inf = float("nan"), float("inf")
    log.write_bytes(lines([step(0), step(1, loss=nan), step(2, loss=inf, grad_norm=-inf), evaluation(2, loss=nan)]))
    tail = read_all(log)
    np.testing.assert_array_equal(tail.series["loss"].y, [2.0, nan, inf])
    assert tail.series["loss"].window("steps").num_not_finite == 2
    assert tail.series["eval/loss"].window("steps").num_not_finite == 1


def test_lines_that_are_no_events_are_counted_and_the_rest_is_read(log):
    bad = [
        b"\n", b"null\n", b"[1]\n", b'"x"\n', b"{}\n", b'{"type":1}\n', b"{\n", b"\xff\xfe\n", b"\0\0\n",
        b'{"type":"step"}\n', b'{"type":"step","elapsed_s":"x","step":1}\n',
        b'{"type":"eval","elapsed_s":1,"step":1}\n',
        b'{"type":"system","elapsed_s":1,"step":1,"util":{}}\n', b'{"type":"importance","elapsed_s":1,"step":1}\n',
        json.dumps(importance(0, [0.1])).encode() + b"\n", b'{"type":"step",' * 3 + b"\n",
        b'{"type":"run"}{"type":"run"}\n', b'{"type":"a"},{"type":"b"}\n', b'{"type":"step","step":[1\n', b"2]}\n",
        b'{"type":"end","elapsed_s":"nan","step":1,"status":"done"}\n', b'{"type":"a"}\r{"type":"b"}\n',
        b'{"type":"end","elapsed_s":1,"step":"inf","status":"done"}\n',
    ]  # fmt: skip
    good = [lines([step(i)]) for i in range(len(bad))]
    log.write_bytes(b"".join(part for pair in zip(good, bad) for part in pair) + lines([step(99)]))
    tail = read_all(log)
    assert tail.malformed == len(bad)
    assert tail.series["loss"].x("steps").tolist() == [*range(len(bad)), 99]
    alone = [parse(line).malformed for line in bad]
    assert alone == [1] * len(bad)


def test_a_line_without_an_end_is_not_kept(log, monkeypatch):
    monkeypatch.setattr(tail_module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(tail_module, "CHUNK_BYTES", 300)
    log.write_bytes(lines([step(0)]) + b"\0" * 5000)
    tail = read_all(log)
    assert len(tail._state.carry) <= 1000
    assert tail.malformed == 0
    with log.open("ab") as file:
        file.write(b"\0" * 700 + b"\n" + lines([step(1)]))
    while not tail.is_caught_up or tail.size < log.stat().st_size:
        tail.poll()
    assert tail.malformed == 1
    assert tail.series["loss"].x("steps").tolist() == [0, 1]


def test_unknown_events_and_unknown_fields_are_no_faults(log):
    log.write_bytes(lines([event("omen", 1.0, 1, at=3), step(0, more=[1, {"a": 2}]), heartbeat(1.0, 1, fan=33.0)]))
    tail = read_all(log)
    assert (tail.malformed, tail.num_events) == (0, 3)
    assert tail.series["system/fan"].last == 33.0


@pytest.mark.parametrize("missing", ["loss", "lr", "tokens", "energy_j", "grad_norm"])
def test_a_step_without_a_number_keeps_its_place(log, missing):
    lacking = step(1)
    del lacking[missing]
    log.write_bytes(lines([step(0), lacking, step(2)]))
    tail = read_all(log)
    assert tail.malformed == 0
    assert tail.series["loss"].x("steps").tolist() == [0, 1, 2]
    assert tail.series["tokens"].last == (2 if missing == "tokens" else 3) * TOKENS


def test_importance_is_kept_thinned_and_with_its_ends(log):
    events = [importance(i, [0.1 * i] * 4, ranks=[1, 2, 3, 4]) for i in range(2000)]
    log.write_bytes(lines(events))
    found = read_all(log).importance
    assert len(found) <= tail_module.MAX_SNAPSHOTS
    assert (found[0].step, found[-1].step) == (0, 1999)
    assert [i.step for i in found] == sorted({i.step for i in found})
    assert found[-1].ranks.tolist() == [1, 2, 3, 4]


def test_the_list_of_events_is_bounded(log, monkeypatch):
    monkeypatch.setattr(tail_module, "MAX_NOTABLE", 10)
    log.write_bytes(lines([event("warning", i, i, message=f"w{i}") for i in range(50)]))
    tail = read_all(log)
    assert [n.text for n in tail.notable] == [f"w{i}" for i in range(40, 50)]


# ---- as it grows ---------------------------------------------------------------------------


def test_no_file_then_an_empty_one_then_half_a_line(log):
    tail = RunTail(log)
    assert tail.poll() is False
    assert tail.is_caught_up
    log.touch()
    assert tail.poll() is False
    line = lines([step(0)])
    with log.open("ab", buffering=0) as file:
        file.write(line[:50])
        tail.poll()
        assert tail.series == {}
        assert tail.malformed == 0
        file.write(line[50:])
        assert tail.poll() is True
        assert len(tail.series["loss"]) == 1
        assert tail.poll() is False
    assert tail.generation == 0


def test_any_cuts_of_the_file_read_the_same(log, seed):
    rng = random.Random(seed)
    data = lines(usual(300)) + b"torn\n" + lines(usual(50))
    log.write_bytes(data)
    want = read_all(log)
    log.unlink()
    tail = RunTail(log)
    with log.open("ab", buffering=0) as file:
        at = 0
        while at < len(data):
            num = rng.choice([1, 7, 300, 5000])
            file.write(data[at : at + num])
            at += num
            tail.poll(rng.choice([0.0, 0.01]))
    read_all(log, tail)
    same(tail, want)
    assert tail.bytes_read == len(data)


def test_a_poll_keeps_to_its_time(log):
    log.write_bytes(lines(usual(20_000)))
    tail = RunTail(log)
    began = time.perf_counter()
    tail.poll(0.001)
    assert not tail.is_caught_up
    assert 0 < tail.progress < 1
    assert time.perf_counter() - began < 1.0
    read_all(log, tail)
    assert len(tail.series["loss"]) == 20_000


def test_a_writer_of_its_own_is_followed(log):
    num = 3000

    def write():
        writer = EventLog(log)
        for i in range(num):
            e = step(i)
            writer.write("step", **{k: v for k, v in e.items() if k not in ("type", "time_s")})
        writer.close()

    tail, thread = RunTail(log), threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        tail.poll(0.005)
    thread.join()
    read_all(log, tail)
    assert tail.series["loss"].x("steps").tolist() == list(range(num))
    assert (tail.malformed, tail.generation) == (0, 0)


def test_a_reader_beside_the_poller_sees_whole_states(log, small_samples):
    log.write_bytes(lines(usual(5000)))
    tail, faults, stop = RunTail(log), [], threading.Event()

    def look():
        while not stop.is_set():
            for key, series in tail.series.items():
                for axis in ("time", "tokens", "joules"):
                    x, y = series.xy(axis)
                    if len(x) != len(y) or (axis == "time" and (np.diff(x) < 0).any()):
                        faults.append(key)
                series.window("time", buckets=10, smoothing=0.9)

    thread = threading.Thread(target=look)
    thread.start()
    read_all(log, tail)
    stop.set()
    thread.join()
    assert not faults


# ---- another log ---------------------------------------------------------------------------


def test_a_resume_cuts_the_log_and_goes_on(log):
    events = usual(200)[:-1]
    log.write_bytes(lines(events))
    tail = read_all(log)
    cut = lines(events[:150])
    more = [header(resumed=True, pid=99), *(step(i, loss=9.0) for i in range(140, 150))]
    with log.open("r+b") as file:
        file.truncate(len(cut))
    with log.open("ab") as file:
        file.write(lines(more))
    read_all(log, tail)
    assert tail.generation == 1
    assert tail.header["pid"] == 99
    assert tail.series["loss"].last == 9.0
    log_again = read_all(log)
    same(tail, log_again)


def test_a_cut_that_has_grown_beyond_the_old_end_is_noticed(log):
    log.write_bytes(lines([step(i) for i in range(100)]))
    tail = read_all(log)
    inode = log.stat().st_ino
    with log.open("r+b") as file:
        file.truncate(len(lines([step(i) for i in range(50)])))
    with log.open("ab") as file:
        file.write(lines([step(i, loss=7.0) for i in range(50, 300)]))
    assert log.stat().st_ino == inode
    read_all(log, tail)
    assert tail.generation == 1
    assert len(tail.series["loss"]) == 300
    assert (tail.series["loss"].y == 7.0).sum() == 250


def test_a_file_in_its_place_is_noticed(log, tmp_path):
    log.write_bytes(lines([step(i) for i in range(100)]))
    tail = read_all(log)
    other = tmp_path / "other"
    other.write_bytes(lines([step(i, loss=3.0) for i in range(200)]))
    other.replace(log)
    assert tail.poll(1.0) is True
    assert tail.series["loss"].y.tolist() == [3.0] * 200
    log.unlink()
    assert tail.poll() is True
    assert tail.series == {}
    assert tail.generation == 2
    assert tail.poll() is False


def test_a_finished_run_that_is_resumed_has_no_end_any_more(log):
    log.write_bytes(lines(usual(10)))
    tail = read_all(log)
    assert tail.end["status"] == "done"
    with log.open("ab") as file:
        file.write(lines([header(resumed=True)]))
    read_all(log, tail)
    assert tail.end is None


# ---- samples of a long log -----------------------------------------------------------------


def test_a_long_log_shows_its_whole_range_at_once(log, small_samples):
    log.write_bytes(lines(usual(2000)))
    tail = RunTail(log)
    tail.poll(0.0)
    assert tail.series["loss"].limits("steps") == (0.0, 1999.0)
    assert tail.header["pid"] == 4321
    assert tail.end["status"] == "done"
    assert not tail.is_caught_up
    assert tail.progress < 0.1
    while tail._state.to_sample:
        tail.poll(0.0)
    x = tail.series["loss"].x("steps")
    assert (np.diff(x) > 0).all()
    assert np.diff(x).max() < 2 * 2000 / tail_module.NUM_SAMPLES
    tokens = tail.series["loss"].x("tokens")
    np.testing.assert_allclose(tokens, (x + 1) * TOKENS, rtol=1e-9)


@pytest.mark.parametrize("sample_bytes", [64, 200, 1 << 10, 1 << 13])
def test_a_sampled_log_reads_as_one_from_its_beginning_and_every_byte_once(
    log, small_samples, monkeypatch, sample_bytes
):
    """Whatever lies at a sample's edges: samples shorter than a line, and touching ones too."""
    data = b"".join(lines([e]) if i % 97 else lines([e]) + b"torn {\n" for i, e in enumerate(usual(1500)))
    log.write_bytes(data)
    monkeypatch.setattr(tail_module, "SAMPLED_FROM_BYTES", 1 << 30)
    want = read_all(log)
    monkeypatch.setattr(tail_module, "SAMPLED_FROM_BYTES", 1 << 14)
    monkeypatch.setattr(tail_module, "SAMPLE_BYTES", sample_bytes)
    tail = read_all(log)
    same(tail, want)
    assert tail.bytes_read == len(data)


def test_a_log_that_grows_while_its_samples_are_joined(log, small_samples):
    log.write_bytes(lines(usual(2000)[:-1]))
    tail = RunTail(log)
    for i in range(50):
        tail.poll(0.0)
        with log.open("ab") as file:
            file.write(lines([step(2000 + i)]))
    read_all(log, tail)
    same(tail, read_all(log))
    assert tail.generation == 0
    assert tail.series["loss"].last == pytest.approx(1 + 1 / 2050)


def test_a_cut_behind_what_is_read_and_before_the_samples_is_noticed(log, small_samples):
    events = [step(i) for i in range(2000)]
    log.write_bytes(lines(events))
    tail = RunTail(log)
    tail.poll(0.0)
    with log.open("r+b") as file:
        file.truncate(len(lines(events[:1000])))
    with log.open("ab") as file:
        file.write(lines([step(i, loss=5.0) for i in range(1000, 2500)]))
    read_all(log, tail)
    same(tail, read_all(log))
    assert tail.generation == 1


def test_no_handle_stays_open(log):
    log.write_bytes(lines(usual(100)))
    tail = read_all(log)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        tail.poll()
        RunTail(log).poll()
        RunTail(log.with_name("none")).poll()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- phases ------------------------------------------------------------------------------------


def phase(i, text, **fields):
    return event("phase", 0.0, i, name="first_step", text=text, **fields)


def test_a_phase_lasts_until_a_step_of_its_number_is_logged(log):
    events = [phase(0, "loading m"), header(), phase(0, "step 1 under way", done=5, total=9, unit="tokens")]
    log.write_bytes(lines(events))
    tail = read_all(log)
    assert tail.phase["done"] == 5
    assert [(n.kind, n.text) for n in tail.notable if n.kind == "phase"] == [("phase", "loading m")]
    with log.open("ab") as file:
        file.write(lines([step(0), step(1)]))
    assert read_all(log, tail).phase is None
    with log.open("ab") as file:
        file.write(lines([header(resumed=True), phase(2, "step 3 under way")]))
    assert read_all(log, tail).phase["text"] == "step 3 under way"
    with log.open("ab") as file:
        file.write(lines([event("end", 1.0, 2, status="stopped")]))
    assert read_all(log, tail).phase is None
    assert tail.malformed == 0
