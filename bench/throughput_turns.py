"""Workers of bench/throughput.py, their turns, and the table of results."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.interleave import Round, Times, interleave
from bench.throughput_presets import BASE, PEERS, ROWS, Plan
from fastpeft.budget import EnergyMeter

HERE = Path(__file__).resolve().parent
END_S = 30.0
"""Seconds that a worker has to end by itself."""

Answer = dict[str, Any]


class RowFailed(Exception):
    """A worker has ended too early; the message says how."""


def _environment(plan: Plan) -> dict[str, str]:
    threads = {name: str(plan.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | threads | offline


def prepare(folder: Path, plan: Plan) -> None:
    """Make the rows' inputs, in a separate process, so that its memory is freed.

    Raises:
        SystemExit: the inputs cannot be made; the process has printed the reason.
    """
    command = [sys.executable, str(HERE / "throughput_inputs.py"), str(folder)]
    done = subprocess.run(command, env=_environment(plan), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(_last_line(done.stderr), file=sys.stderr)
        raise SystemExit(2)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


class Worker:
    """One row's process."""

    def __init__(self, folder: Path, row: str, plan: Plan, seed: int = 0, curve: bool = False) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        command = [sys.executable, str(HERE / "throughput_worker.py"), str(folder), row, str(seed)]
        self._process = subprocess.Popen(
            [*command, "--curve"] if curve else command,
            env=_environment(plan),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.communicate(timeout=0 if exception[0] else END_S)  # it stops at the end of its input
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        self._log.close()

    def ready(self) -> Answer:
        """Wait until the worker is set up and warmed up. Raises RowFailed."""
        return self._read()

    def turn(self, steps: int) -> Answer:
        """Take a turn: {seconds, steps, tokens, peak_mb}. Raises RowFailed."""
        self._write(steps=steps)
        return self._read()

    def finish(self) -> list[float]:
        """Losses of all its steps. Raises RowFailed."""
        self._write(stop=True)
        return self._read()["losses"]

    @classmethod
    def curve(cls, folder: Path, row: str, plan: Plan, seed: int) -> list[float]:
        """Losses of a whole run. Raises RowFailed."""
        with cls(folder, row, plan, seed, curve=True) as worker:
            worker.ready()
            worker.turn(plan.num_steps)
            return worker.finish()

    def _write(self, **order: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> RowFailed:
        code = self._process.wait(END_S)
        self._log.seek(0)
        said = _last_line(self._log.read())
        if code == -signal.SIGKILL:
            return RowFailed("killed (SIGKILL), as the system does where the memory is short")
        return RowFailed(f"ended by {signal.Signals(-code).name}" if code < 0 else said)


class Timed:
    """Turns of the rows' workers."""

    def __init__(self, folder: Path, plan: Plan, steps: int, rows: list[str]) -> None:
        self._folder, self._plan, self._steps, self._rows = folder, plan, steps, rows
        self.turns: dict[str, list[Answer]] = {row: [] for row in rows}
        self.failed: dict[str, str] = {}
        self._meter = EnergyMeter.open(_gpu_uuid(plan))
        self._workers: dict[str, Worker] = {}
        self._open = ExitStack()

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def set_up(self) -> None:
        """Set up the workers: all at once on a GPU, one by one on a CPU, where memory may allow one warm-up only."""
        together = self._plan.device == "cuda"
        for row in self._rows:
            self._workers[row] = self._open.enter_context(Worker(self._folder, row, self._plan))
            if not together:
                self._try(row, self._workers[row].ready)
        for row in self._rows if together else ():
            self._try(row, self._workers[row].ready)

    def take_turns(self, rounds: int, over: Callable[[], bool]) -> None:
        alternatives = {row: lambda _, row=row: self._turn(row) for row in self._rows if row not in self.failed}
        if alternatives:
            interleave(alternatives, 1, rounds, over, lambda turn: turn())

    def _turn(self, row: str) -> float:
        """Seconds of the row's turn; NaN if the row has failed."""
        if row in self.failed:
            return math.nan
        if self._meter.works:
            self._meter.start()
        turn = self._try(row, lambda: self._workers[row].turn(self._steps))
        self._meter.stop()
        if turn is None:
            return math.nan
        self.turns[row].append(turn | {"joules": self._meter.joules})
        return turn["seconds"]

    def _try(self, row: str, work: Callable[[], Answer]) -> Answer | None:
        try:
            return work()
        except RowFailed as error:
            self.failed[row] = str(error)
            print(f"{row}: {error}", file=sys.stderr, flush=True)
            return None

    # ---- the report ------------------------------------------------------------------------

    def times(self, clock: str = "seconds") -> Times:
        """`seconds` or `cpu_s` per token, in whole rounds."""
        times = Times()
        for i in range(max(map(len, self.turns.values()), default=0) // 2):
            pairs = {row: turns[2 * i : 2 * i + 2] for row, turns in self.turns.items() if len(turns) >= 2 * i + 2}
            paces = {row: sum(t[clock] for t in pair) / sum(t["tokens"] for t in pair) for row, pair in pairs.items()}
            times.rounds.append(Round(0, {row: (pace, pace) for row, pace in paces.items()}))
        return times

    def report(self, missing: Mapping[str, str]) -> dict[str, Any]:
        """Report of the turns so far. `missing`: requested rows that cannot run here -> the reason."""
        times, cpu_times = self.times(), self.times("cpu_s")
        named = [name for name in ROWS if name in self.turns or name in missing]
        rows = [self._row(name, times, cpu_times, missing.get(name)) for name in named]
        energy = self._meter.method if self._meter.works else f"none: {self._meter.reason or self._meter.fault}"
        return {"rounds": len(times.rounds), "energy_method": energy, "rows": rows, "turns": self.turns}

    def _row(self, name: str, times: Times, cpu_times: Times, missing: str | None) -> dict[str, Any]:
        turns, base = self.turns.get(name, []), self.turns.get(BASE, [])
        ratio, low, high = _speed(times, name)
        joules = [turn["joules"] for turn in turns]
        row: dict[str, Any] = {
            "name": name,
            "missing": missing,
            "failed": self.failed.get(name),
            "void": _other_tokens(name, turns, base),
            "tokens_a_s": None,
            "step_ms": None,
            "ratio": ratio,
            "ratio_low": low,
            "ratio_high": high,
            "cpu_ratio": _speed(cpu_times, name)[0],
            "peak_mb": None,
            "memory_ratio": None,
            "joules_a_ktoken": None,
            "tokens": [turn["tokens"] for turn in turns],
        }
        if turns:
            row["tokens_a_s"] = statistics.median(turn["tokens"] / turn["seconds"] for turn in turns)
            row["step_ms"] = statistics.median(1e3 * turn["seconds"] / turn["steps"] for turn in turns)
            row["peak_mb"] = turns[-1]["peak_mb"]
            if base:
                row["memory_ratio"] = row["peak_mb"] / base[-1]["peak_mb"]
            if None not in joules:
                row["joules_a_ktoken"] = 1e3 * sum(joules) / sum(row["tokens"])
        return row


def _gpu_uuid(plan: Plan) -> str | None:
    if plan.device != "cuda":
        return None
    from fastpeft.trainer.build import gpu_uuid  # importing it takes seconds

    return gpu_uuid(torch.device(plan.device))


def _speed(times: Times, name: str) -> tuple[float | None, float | None, float | None]:
    """Speed as a multiple of BASE's, with its interval."""
    return times.ratio(BASE, name) if name in times and BASE in times else (None, None, None)


def _other_tokens(name: str, turns: list[Answer], base: list[Answer]) -> str | None:
    """Message if a row's turns had other batches than BASE's; None if not."""
    if name in PEERS and PEERS[name].own_batches:
        return None
    pairs = [(own["tokens"], theirs["tokens"]) for own, theirs in zip(turns, base)]
    differ = [(own, theirs) for own, theirs in pairs if own != theirs]
    if not differ:
        return None
    return f"its turns held other tokens than {BASE}'s, such as {differ[0][0]:,} for {differ[0][1]:,}"
