"""One run's events.jsonl, read as it grows, no byte twice.

A long log is sampled at evenly spaced offsets first, so that the whole range is visible at once. The bytes between the
samples are then read from the beginning, and joined with the samples by file offset.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastpeft.tui.answer_list import MOST_SETS, AnswerSet, Pieces
from fastpeft.tui.parse import Blocks, Importance, Notable, Parsed, PartScores, Rates, SplitScore, columns_of, parse
from fastpeft.tui.series import Series, StepTable, Table

CHUNK_BYTES = 1 << 18
"""Bytes read and parsed at a time, in about 1 ms."""
MAX_LINE_BYTES = 1 << 22
"""A longer line is malformed, such as zeros left by a crash, or another file's."""
SAMPLED_FROM_BYTES = 32 << 20
"""A smaller log is read from its beginning, without samples."""
NUM_SAMPLES = 1024
SAMPLE_BYTES = 1 << 14
MAX_NOTABLE = 10_000
MAX_SNAPSHOTS = 256
"""Most snapshots kept of importances, and of rates."""
_FINGERPRINT_BYTES = 256

STEP_SERIES = ("loss", "penalty", "penalty_share", "grad_norm", "lr", "tokens", "tokens_per_s", "energy_j", "power_w")
_MAY_BE_MISSING = ("system/", "schedule/")
_ALWAYS_MEASURED = {"loss", "penalty", "grad_norm", "lr", "tokens"}
_Snapshot = TypeVar("_Snapshot", bound=Blocks)


class _Place(NamedTuple):
    """Identity of the log at the last read. Another inode, a smaller size or other bytes before `offset` mean another
    log."""

    inode: int
    offset: int
    fingerprint: bytes


@dataclass
class _Sample:
    """A part [start, end) of the file, read ahead. Its complete lines are between `head` and `tail`."""

    start: int
    end: int
    head: bytes
    tail: bytes
    fingerprint: bytes
    parsed: Parsed


@dataclass
class _State:
    """All that was read from one log. Another log starts a new state."""

    steps: StepTable = field(default_factory=StepTable)
    tables: dict[str, Table] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    notable: list[Notable] = field(default_factory=list)
    importance: list[Importance] = field(default_factory=list)
    rates: list[Rates] = field(default_factory=list)
    tests: list[SplitScore] = field(default_factory=list)
    parts: dict[str, PartScores] = field(default_factory=dict)
    """The newest metrics of parts, by split."""
    answers: list[AnswerSet] = field(default_factory=list)
    example: Pieces | None = None
    header: dict[str, Any] | None = None
    phase: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    malformed: int = 0
    num_events: int = 0
    carry: bytes = b""
    samples: list[_Sample] = field(default_factory=list)
    """Sorted by offset."""
    to_sample: list[int] = field(default_factory=list)
    """Offsets still to be sampled, the next one last."""


class RunTail:
    """Reads `path`, a run's events.jsonl, which need not exist yet.

    `poll` belongs to one thread at a time; everything else may be read from another thread meanwhile. Discard every
    Series when `generation` changes: it counts how often the file turned out to be another log, and was read anew. A
    resume truncates the log, and a new run may take its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.generation = 0
        self.is_caught_up = False
        """Whether everything that the file held at the last poll has been read."""
        self.size = 0
        """Size of the file at the last poll, in bytes."""
        self.bytes_read = 0
        """Total bytes read, samples included."""
        self._place: _Place | None = None
        self._state = _State()
        self._polling = threading.Lock()

    # ---- content ---------------------------------------------------------------------------

    @property
    def series(self) -> dict[str, Series]:
        """The series with at least one value: STEP_SERIES; eval/<metric> and eval/loss of the validation split;
        system/<name>, schedule/<name> and forecast."""
        return self._state.series

    @property
    def notable(self) -> list[Notable]:
        """The last MAX_NOTABLE events that are neither steps nor heartbeats, in order."""
        state = self._state
        found = [*state.notable, *(n for s in state.samples for n in s.parsed.notable)]
        return found[-MAX_NOTABLE:]

    @property
    def importance(self) -> list[Importance]:
        """Snapshots in order: the first, the last, and evenly thinned ones between."""
        state = self._state
        return [*state.importance, *(i for s in state.samples for i in s.parsed.importance)]

    @property
    def rates(self) -> list[Rates]:
        """As `importance`."""
        state = self._state
        return [*state.rates, *(r for s in state.samples for r in s.parsed.rates)]

    @property
    def tests(self) -> list[SplitScore]:
        """The last score of each split other than validation, in order."""
        state = self._state
        found = [*state.tests, *(t for s in state.samples for t in s.parsed.tests)]
        return list({test.split: test for test in found}.values())

    @property
    def parts(self) -> list[PartScores]:
        """The last metrics of parts of each split, ordered by when each split was first scored."""
        state = self._state
        ahead = {one.split: one for s in state.samples for one in s.parsed.parts}
        return [*(state.parts | ahead).values()]

    @property
    def answers(self) -> list[AnswerSet]:
        """The answers of the newest evaluations, in order."""
        state = self._state
        return [*state.answers, *(a for s in state.samples for a in s.parsed.answers)][-MOST_SETS:]

    @property
    def example(self) -> Pieces | None:
        """The first training row, as logged by the newest trainer process."""
        state = self._state
        return next((s.parsed.example for s in reversed(state.samples) if s.parsed.example), state.example)

    @property
    def header(self) -> dict[str, Any] | None:
        """The last run event, which is that of the newest trainer process."""
        state = self._state
        return next((s.parsed.header for s in reversed(state.samples) if s.parsed.header), state.header)

    @property
    def end(self) -> dict[str, Any] | None:
        """The end event; None while the run is running, or after a kill."""
        state = self._state
        for sample in reversed(state.samples):
            if sample.parsed.end or sample.parsed.header:
                return sample.parsed.end
        return state.end

    @property
    def phase(self) -> dict[str, Any] | None:
        """The trainer's phase before its first step has ended; None once there are steps, and after the end."""
        phase = self._state.phase
        if phase is None or self.end is not None:
            return None
        (step_N,) = self._state.steps.take("step")
        return None if len(step_N) and step_N[-1] >= phase["step"] else phase

    @property
    def malformed(self) -> int:
        """Number of malformed lines so far."""
        state = self._state
        return state.malformed + sum(s.parsed.malformed for s in state.samples)

    @property
    def num_events(self) -> int:
        state = self._state
        return state.num_events + sum(s.parsed.num_events for s in state.samples)

    @property
    def progress(self) -> float:
        """Share of the file that was read, in 0..1."""
        return 1.0 if self.is_caught_up or not self.size else min(1.0, self.bytes_read / self.size)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held in columns."""
        return self._state.steps.num_bytes + sum(table.num_bytes for table in self._state.tables.copy().values())

    # ---- reading ---------------------------------------------------------------------------

    def poll(self, seconds: float = 0.05) -> bool:
        """Read for about `seconds`. True if anything is new. A missing file raises nothing."""
        if not self._polling.acquire(blocking=False):
            return False
        try:
            return self._poll(time.perf_counter() + seconds)
        finally:
            self._polling.release()

    def _poll(self, until: float) -> bool:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            began_anew = self._place is not None
            if began_anew:
                self._begin(None)
            self.size, self.is_caught_up = 0, True
            return began_anew
        try:
            began_anew = self._check(file)
            grew = self._read(file, until)
            place = self._place
            assert place is not None
            self.is_caught_up = not self._state.samples and not self._state.to_sample and place.offset >= self.size
            return grew or began_anew
        finally:
            os.close(file)

    def _check(self, file: int) -> bool:
        """Start over if this is not the log that was read so far."""
        found, place = os.fstat(file), self._place
        self.size = found.st_size
        if place is not None and found.st_ino == place.inode:
            read = [(place.offset, place.fingerprint), *((s.end, s.fingerprint) for s in self._state.samples[-1:])]
            if all(os.pread(file, len(last), end - len(last)) == last for end, last in read):
                return False
        began_anew = self._place is not None
        self._begin(_Place(found.st_ino, 0, b""))
        if found.st_size >= SAMPLED_FROM_BYTES:
            self._state.to_sample = list(_places(found.st_size))
        return began_anew

    def _begin(self, place: _Place | None) -> None:
        if self._place is not None:
            self.generation += 1
        self._place, self._state, self.bytes_read = place, _State(), 0

    def _read(self, file: int, until: float) -> bool:
        """Read samples first, then the bytes between them, then appended bytes."""
        grew = bool(self._state.to_sample)
        if grew:
            self._look_ahead(file, until)
        while time.perf_counter() < until or not grew:
            if not self._read_on(file):
                break
            grew = True
        return grew

    def _look_ahead(self, file: int, until: float) -> None:
        """Take samples while there is time, at least at both ends of the file."""
        state, found = self._state, []
        while state.to_sample and (len(found) < 2 or time.perf_counter() < until):
            found.append(self._sample(file, state.to_sample.pop()))
        state.steps.put_ahead({sample.start: sample.parsed.steps_CN for sample in found})
        for key in {key for sample in found for key in sample.parsed.values}:
            rows = {s.start: s.parsed.values[key] for s in found if key in s.parsed.values}
            self._table(key).put_ahead(rows)
        num_steps = sum(sample.parsed.steps_CN.shape[1] for sample in found)
        state.steps.reserve(int(1.05 * num_steps * self.size / sum(s.end - s.start for s in found)))
        state.samples = sorted([*state.samples, *found], key=lambda sample: sample.start)
        for sample in found:
            self._name_series(sample.parsed)

    def _sample(self, file: int, start: int) -> _Sample:
        data = os.pread(file, min(SAMPLE_BYTES, self.size - start), start)
        self.bytes_read += len(data)
        first = data.find(b"\n") + 1 if start else 0
        last = data.rfind(b"\n") + 1
        parsed = parse(data[first:last]) if first < last else Parsed()
        return _Sample(start, start + len(data), data[:first], data[last:], data[-_FINGERPRINT_BYTES:], parsed)

    def _read_on(self, file: int) -> bool:
        """Read one chunk, or join the sample that follows."""
        state, place = self._state, self._place
        assert place is not None
        sample = state.samples[0] if state.samples else None
        num = min(CHUNK_BYTES, (sample.start if sample else self.size) - place.offset)
        data = os.pread(file, num, place.offset) if num > 0 else b""
        self.bytes_read += len(data)
        offset = place.offset + len(data)
        reached = sample if sample is not None and offset == sample.start else None
        if not data and reached is None:
            return False
        carry = state.carry + data + (b"" if reached is None else reached.head)
        cut = carry.rfind(b"\n") + 1
        state.carry = carry[cut:] if len(carry) - cut <= MAX_LINE_BYTES else b"\0"  # counted as malformed at its end
        if cut:
            self._take(parse(carry[:cut]))
        fingerprint = place.fingerprint + data
        if reached is not None:
            self._take_sample(reached)
            offset, fingerprint = reached.end, reached.fingerprint
        self._place = _Place(place.inode, offset, fingerprint[-_FINGERPRINT_BYTES:])
        return True

    # ---- keeping ---------------------------------------------------------------------------

    def _take(self, parsed: Parsed) -> None:
        self._state.steps.append(parsed.steps_CN)
        for key, rows_CN in parsed.values.items():
            self._table(key).append(rows_CN)
        self._name_series(parsed)
        self._take_events(parsed)

    def _take_sample(self, sample: _Sample) -> None:
        state, parsed = self._state, sample.parsed
        state.steps.append_ahead(sample.start)
        for key in parsed.values:
            self._table(key).append_ahead(sample.start)
        state.carry += sample.tail
        state.samples = state.samples[1:]
        self._take_events(parsed)

    def _take_events(self, parsed: Parsed) -> None:
        state = self._state
        state.malformed += parsed.malformed
        state.num_events += parsed.num_events
        if parsed.notable:
            state.notable = [*state.notable, *parsed.notable][-MAX_NOTABLE:]
        if parsed.importance:
            state.importance = _thinned([*state.importance, *parsed.importance])
        if parsed.rates:
            state.rates = _thinned([*state.rates, *parsed.rates])
        if parsed.parts:
            state.parts = state.parts | {one.split: one for one in parsed.parts}
        state.answers = [*state.answers, *parsed.answers][-MOST_SETS:]
        state.example = parsed.example or state.example
        if parsed.tests:
            state.tests = [*state.tests, *parsed.tests][-MAX_SNAPSHOTS:]
        if parsed.header is not None:
            state.header, state.end = parsed.header, None
        state.end = parsed.end or state.end
        state.phase = parsed.phase or state.phase

    def _table(self, key: str) -> Table:
        tables = self._state.tables
        if key not in tables:
            tables[key] = Table(*columns_of(key))
        return tables[key]

    def _name_series(self, parsed: Parsed) -> None:
        """Create the series that have their first value."""
        state = self._state
        new = {}
        for key in STEP_SERIES:
            if key not in state.series and self._is_measured(key, parsed):
                new[key] = Series(state.steps, key, state.steps, key not in _ALWAYS_MEASURED)
        for key in parsed.values:
            if key not in state.series:
                new[key] = Series(self._table(key), "y", state.steps, key.startswith(_MAY_BE_MISSING))
        if new:
            state.series = {**state.series, **new}

    def _is_measured(self, key: str, parsed: Parsed) -> bool:
        if not parsed.steps_CN.shape[1]:
            return False
        if key in _ALWAYS_MEASURED or key == "tokens_per_s":
            return True
        column = "energy_j" if key == "power_w" else key
        return bool(np.isfinite(parsed.steps_CN[StepTable.READ.index(column)]).any())


def _thinned(snapshots: list[_Snapshot]) -> list[_Snapshot]:
    """The first, the last, and evenly thinned ones between."""
    while len(snapshots) > MAX_SNAPSHOTS:
        snapshots = [*snapshots[:-1:2], snapshots[-1]]
    return snapshots


def _places(size: int) -> Iterator[int]:
    """Offsets of samples, to be popped from the end: both ends of the file first, then ever finer subdivisions."""
    last = size - SAMPLE_BYTES
    order = sorted(range(1, NUM_SAMPLES - 1), key=_reversed_bits, reverse=True)
    yield from (last * i // (NUM_SAMPLES - 1) for i in order)
    yield from (0, last)


def _reversed_bits(i: int) -> int:
    return int(f"{i:0{NUM_SAMPLES.bit_length()}b}"[::-1], 2)
