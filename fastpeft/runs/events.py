"""events.jsonl: one JSON object a line, append-only, safe to read while it is written.

Every event has `type`, `time_s` (Unix time), `elapsed_s` (the budget clock) and `step`. Numbers that
are not finite are written as the strings "nan", "inf" and "-inf", so that every line is strict JSON.

`phase` events come before the `run` event, and after it until the first step has ended. They hold name (data, model,
tokenise, check, memory, timing, graphs, head, calibrate, first_step), text, and progress as done, total and unit. The
first step also has estimates: left_s to its end, whole_s and whole_steps to the end of training.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

Event = dict[str, Any]

_BLOCK_BYTES = 1 << 20

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def finite(value: Any) -> Any:
    """`value` with every non-finite float, at any depth, replaced by its string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if value != value else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def number(value: Any) -> float:
    """A number of an event as a float. The inverse of `finite`."""
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def make_event(type: str, *, elapsed_s: float, step: int, **fields: Any) -> Event:
    """An event with the current time."""
    at = {"type": type, "time_s": round(time.time(), 3), "elapsed_s": round(elapsed_s, 4), "step": step}
    return at | finite(fields)


class EventLog:
    """Appends events; may be called from several threads. A line is in the file when `write` returns.

    `listeners` are called with every event, in the writing thread, so they must return quickly.
    """

    def __init__(self, path: Path, listeners: tuple[Callable[[Event], None], ...] = ()) -> None:
        self._file = path.open("ab")
        if self._file.tell() and _last_byte(path) != b"\n":
            self._file.write(b"\n")  # a line cut off by a kill stays separate, and malformed
        self._listeners = listeners
        self._lock = threading.Lock()

    def write(self, type: str, *, elapsed_s: float, step: int, **fields: Any) -> None:
        self.append(make_event(type, elapsed_s=elapsed_s, step=step, **fields), self._listeners)

    def append(self, event: Event, listeners: tuple[Callable[[Event], None], ...] = ()) -> None:
        """Append an event made earlier, which the log's own listeners have already received."""
        line = json.dumps(event, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._file.closed:
                return
            self._file.write(line)
            self._file.flush()
            for listener in listeners:
                listener(event)

    def offset(self) -> int:
        """Bytes written so far, all of them on disk when this returns."""
        with self._lock:
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        with self._lock:
            self._file.close()


class LogTail:
    """Yields the events that a growing log has gained since the last read."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self._offset = path, offset

    def read(self) -> Iterator[Event]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                event = parse_event(line)
                if event is not None:
                    yield event


def read_events(path: Path, offset: int = 0) -> Iterator[Event]:
    """Events from byte `offset` on. Malformed lines and an unfinished last line are skipped."""
    return LogTail(path, offset).read()


def read_lines(path: Path) -> Iterator[list[bytes]]:
    """The complete lines of a log, about a megabyte at a time. An unfinished last line is skipped."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            if lines:
                yield lines


def parse_event(line: bytes) -> Event | None:
    """The event in a line; None if it holds none."""
    try:
        event = orjson.loads(line)
    except ValueError:  # orjson refuses a lone surrogate, which a name may contain
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return event if isinstance(event, dict) and isinstance(event.get("type"), str) else None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
