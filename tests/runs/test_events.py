"""events.jsonl: strict lines, whole lines, and a log that outlives its writer."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastpeft.runs.events import EventLog, finite, number, read_events


def strict(line: bytes) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def write_steps(log: EventLog, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        log.write("step", elapsed_s=i / 10, step=i, loss=1.0 / (i + 1))


def steps_of(path: Path, offset: int = 0) -> list[int]:
    return [event["step"] for event in read_events(path, offset)]


# ---- numbers -------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_strings_at_any_depth(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", elapsed_s=0.0, step=0, loss=math.nan, deep={"a": [math.inf, (-math.inf, 1.5)], "b": "nan"})
    (line,) = (tmp_path / "events.jsonl").read_bytes().splitlines()
    event = strict(line)
    assert event["loss"] == "nan"
    assert event["deep"] == {"a": ["inf", ["-inf", 1.5]], "b": "nan"}


def test_a_number_of_an_event_is_read_back():
    assert math.isnan(number(finite(math.nan)))
    for value in (math.inf, -math.inf, 0.0, -1.5, 3):
        assert number(finite(value)) == value


def test_numbers_survive_the_log_bit_for_bit(tmp_path, seed):
    rng = random.Random(seed)
    values = [rng.gauss(0, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(200)] + [math.nan, math.inf, 5e-324]
    log = EventLog(tmp_path / "events.jsonl")
    log.write("importance", elapsed_s=0.0, step=0, weights=values)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert [number(v).hex() for v in event["weights"]] == [v.hex() for v in values]


def test_every_event_says_what_when_and_where(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("eval", elapsed_s=1.23456789, step=7, value=0.5)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["type"], event["elapsed_s"], event["step"], event["value"]) == ("eval", 1.2346, 7, 0.5)
    assert event["time_s"] == pytest.approx((tmp_path / "events.jsonl").stat().st_mtime, abs=5)


def test_text_with_line_breaks_stays_in_its_line(tmp_path):
    path = tmp_path / "events.jsonl"
    text = "a\nb\r\nc\u2028d\x00é雪\ud800"
    EventLog(path).write("warning", elapsed_s=0.0, step=0, message=text)
    assert path.read_bytes().count(b"\n") == 1
    assert next(read_events(path))["message"] == text


# ---- reading while it is written -----------------------------------------------------------


def test_an_event_can_be_read_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for type in ("step", "system", "eval"):
        log.write(type, elapsed_s=0.0, step=0)
        assert [event["type"] for event in read_events(path)][-1] == type
    log.close()


def test_a_reader_beside_a_writer_sees_whole_events_in_order(tmp_path, seed):
    path, total = tmp_path / "events.jsonl", 2000
    rng = random.Random(seed)
    log = EventLog(path)

    def write() -> None:
        for i in range(total):
            log.write("step", elapsed_s=0.0, step=i, text="x" * rng.randint(0, 9000))

    writer = threading.Thread(target=write)
    writer.start()
    looks = 0
    while writer.is_alive() or not looks:
        seen = steps_of(path)
        assert seen == list(range(len(seen)))
        looks += 1
    writer.join()
    assert steps_of(path) == list(range(total))


def test_events_from_many_threads_are_all_there_and_whole(tmp_path):
    path, num_threads, each = tmp_path / "events.jsonl", 8, 200
    heard = []
    log = EventLog(path, (heard.append,))

    def write(name: int) -> None:
        for i in range(each):
            log.write("step", elapsed_s=0.0, step=i, thread=name, text="é" * 3000)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = [strict(line) for line in path.read_bytes().splitlines()]
    assert events == heard
    for name in range(num_threads):
        assert [event["step"] for event in events if event["thread"] == name] == list(range(each))


def test_reading_starts_at_an_offset(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    write_steps(log, 3)
    offset = log.offset()
    assert offset == path.stat().st_size
    write_steps(log, 2, start=3)
    assert steps_of(path, offset) == [3, 4]
    assert steps_of(path, log.offset()) == []


def test_the_offset_of_a_log_that_goes_on_counts_what_was_there(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    write_steps(log, 3)
    log.close()
    log = EventLog(path)
    assert log.offset() == path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(0)
    write_steps(log, 1, start=9)
    assert steps_of(path) == [9]


def test_cutting_back_to_an_offset_forgets_what_came_later(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    write_steps(log, 3)
    offset = log.offset()
    write_steps(log, 3, start=100)
    log.close()
    with path.open("r+b") as file:
        file.truncate(offset)
    write_steps(EventLog(path), 2, start=3)
    assert steps_of(path) == [0, 1, 2, 3, 4]


# ---- damage --------------------------------------------------------------------------------


def test_a_log_cut_at_any_byte_gives_its_whole_events_and_takes_new_ones(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    write_steps(log, 3)
    log.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        num_whole = whole[:cut].count(b"\n")
        assert steps_of(path) == list(range(num_whole)), cut
        log = EventLog(path)
        write_steps(log, 1, start=50)
        log.close()
        ends_on_a_brace = cut < len(whole) and whole[:cut].endswith(b"}")
        assert steps_of(path) == [*range(num_whole + ends_on_a_brace), 50], cut


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    path = tmp_path / "events.jsonl"
    good = b'{"type":"step","step":1}\n'
    bad = [
        b"\n",
        b"{\n",
        b"[]\n",
        b"null\n",
        b'{"type":3}\n',
        b'{"step":1}\n',
        b"\xff\xfe\x00\n",
        b"\x00" * 4096 + b"\n",
    ]
    path.write_bytes(b"".join(line + good for line in bad))
    assert steps_of(path) == [1] * len(bad)


def test_a_log_of_a_killed_process_holds_all_that_it_wrote(tmp_path):
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from fastpeft.runs.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for i in range(10**9):\n"
        "    log.write('step', elapsed_s=0.0, step=i, text='x' * 500)\n"
        "    if i >= 100: print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    said = max([said, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    process.wait()
    seen = steps_of(path)
    assert seen == list(range(len(seen)))
    assert len(seen) > said
    write_steps(EventLog(path), 1, start=10**6)
    assert steps_of(path) == [*seen, 10**6]


# ---- the rest of the contract --------------------------------------------------------------


def test_listeners_hear_what_the_file_holds(tmp_path):
    first, second = [], []
    log = EventLog(tmp_path / "events.jsonl", (first.append, second.append))
    log.write("step", elapsed_s=0.0, step=0, loss=math.nan)
    log.close()
    assert first == second == list(read_events(tmp_path / "events.jsonl"))
    assert first[0]["loss"] == "nan"


def test_a_closed_log_takes_no_events_and_closes_twice(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    write_steps(log, 1)
    log.close()
    write_steps(log, 1, start=1)  # the heartbeat may be late
    log.close()
    assert steps_of(tmp_path / "events.jsonl") == [0]


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    with pytest.raises(TypeError):
        log.write("step", elapsed_s=0.0, step=0, loss=object())
    write_steps(log, 1)
    assert path.read_bytes().count(b"\n") == 1
    assert os.path.getsize(path) == log.offset()
