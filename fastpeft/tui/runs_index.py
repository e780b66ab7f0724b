"""All runs under a results folder, read cheaply: small files when they change, and a log at a few places only."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fastpeft.runs.events import Event, number, parse_event
from fastpeft.runs.store import DEAD_AFTER_S, Result, RunFolder
from fastpeft.tui.format import printable
from fastpeft.tui.parse import parse
from fastpeft.tui.series import RATE_ROWS

TAIL_BYTES = 1 << 15
"""Bytes read at a log's end, about a hundred steps."""
SPARK_POINTS = 32
_SPARK_BYTES = 1 << 10


@dataclass(frozen=True)
class RunRow:
    """A run as the list shows it. Unknown values are None or empty."""

    name: str
    path: Path
    status: str
    """running, dead, done, stopped, pruned, diverged, failed; "no result" if result.json is missing or unreadable."""
    created_s: float
    """Unix time of run.yaml."""
    method: str = ""
    model: str = ""
    dataset: str = ""
    stand_in: bool = False
    group: str | None = None
    """Group of related runs, such as those of --seeds."""
    seed: int | None = None
    budget_kind: str = ""
    budget_limit: float | None = None
    budget_spent: float | None = None
    progress: float | None = None
    """Spent share of the budget, 0..1."""
    eta_s: float | None = None
    """Seconds to the end, only while the run is running."""
    elapsed_s: float | None = None
    steps: int | None = None
    tokens: int | None = None
    last_loss: float | None = None
    """May be nan."""
    metric_name: str = ""
    metric: float | None = None
    """Metric of the last evaluation; at most 1."""
    best: float | None = None
    test: float | None = None
    """Score of the test split."""
    tokens_per_s: float | None = None
    """Mean over the last 32 steps while the run is running, else over the whole run."""
    energy_j: float | None = None
    energy_method: str = "none"
    sparkline: tuple[float, ...] = ()
    """Finite losses at up to SPARK_POINTS evenly spaced places of the log, ending with the last step's."""


class RunsIndex:
    """Lists a results folder repeatedly. For one thread at a time."""

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = Path(results_dir)
        self._known: dict[str, _Run] = {}

    def refresh(self) -> list[RunRow]:
        """Every run, oldest first. Only changed files are read; a folder that cannot be read is left out."""
        try:
            with os.scandir(self.results_dir) as entries:
                names = sorted(entry.name for entry in entries if _may_be_run(entry))
        except OSError:
            names = []
        self._known = {name: self._known.get(name) or _Run(self.results_dir / name) for name in names}
        rows = [row for run in self._known.values() if (row := run.row()) is not None]
        return sorted(rows, key=lambda row: (row.created_s, row.name))


def groups(rows: Iterable[RunRow]) -> dict[str, list[RunRow]]:
    """Rows by group, or by their own name if they have none."""
    found: dict[str, list[RunRow]] = {}
    for row in rows:
        found.setdefault(row.group or row.name, []).append(row)
    return found


def _may_be_run(entry: os.DirEntry) -> bool:
    """Whether this is a folder with a printable name that is not hidden. Folders being deleted are hidden."""
    try:
        return entry.name.isprintable() and not entry.name.startswith(".") and entry.is_dir()
    except OSError:  # a broken link, or no permission
        return False


class _Run:
    """A run's folder, and what was last read from it."""

    def __init__(self, path: Path) -> None:
        self._folder = RunFolder(path)
        self._result_key: tuple[int, ...] | None = None
        self._result: Result | None = None
        self._log_key: tuple[int, ...] | None = None
        self._sampled_at = 0
        self._spark: list[tuple[int, float]] = []
        self._row: RunRow | None = None

    def row(self) -> RunRow | None:
        folder = self._folder
        config = _key(folder.config)
        if config is None:
            return None
        result_key, log_key = _key(folder.result), _key(folder.events)
        if self._row is None or (result_key, log_key) != (self._result_key, self._log_key):
            if result_key != self._result_key:
                self._result = folder.read_result()
            try:
                self._row = self._read(config, log_key)
            except OSError:  # deleted in the meantime
                return None
            self._result_key, self._log_key = result_key, log_key
        status = self._status(log_key or result_key)
        return replace(self._row, status=status, eta_s=self._row.eta_s if status == "running" else None)

    def _status(self, written: tuple[int, ...] | None) -> str:
        """As RunFolder.status, from files already read."""
        if self._result is None or written is None or self._result.status != "running":
            return self._result.status if self._result else "no result"
        return "dead" if time.time() - written[1] / 1e9 > DEAD_AFTER_S else "running"

    def _read(self, config: tuple[int, ...], log_key: tuple[int, ...] | None) -> RunRow:
        row = RunRow(self._folder.path.name, self._folder.path, "", config[1] / 1e9)
        if log_key is not None:
            try:
                with self._folder.events.open("rb") as file:
                    row = self._from_log(row, file.fileno(), log_key)
            except (PermissionError, IsADirectoryError):
                pass  # result.json is still usable
        return row if self._result is None else _with_result(row, self._result)

    def _from_log(self, row: RunRow, file: int, key: tuple[int, ...]) -> RunRow:
        inode, _, size = key
        anew = self._log_key is None or self._log_key[0] != inode or size < self._log_key[2]
        start = max(0, size - TAIL_BYTES)
        lines = _whole_lines(os.pread(file, TAIL_BYTES, start), start == 0)
        if self._result is None:
            row = _with_header(row, parse(_whole_lines(os.pread(file, 1 << 16, 0), from_start=True)).header)
        row = _with_tail(row, lines)
        if anew or size > 1.1 * self._sampled_at:
            self._sampled_at, self._spark = size, _losses(file, size)
        last = [] if row.last_loss is None or not math.isfinite(row.last_loss) else [row.last_loss]
        return replace(row, sparkline=tuple([loss for _, loss in self._spark] + last))


def _key(path: Path) -> tuple[int, ...] | None:
    """(inode, modification time in ns, size); None if the file is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _whole_lines(data: bytes, from_start: bool) -> bytes:
    first = 0 if from_start else data.find(b"\n") + 1
    return data[first : data.rfind(b"\n") + 1]


def _losses(file: int, size: int) -> list[tuple[int, float]]:
    """(offset, loss) of a step near each of SPARK_POINTS - 1 evenly spaced offsets."""
    found: dict[int, float] = {}
    for i in range(SPARK_POINTS - 1):
        start = size * i // (SPARK_POINTS - 1)
        data = os.pread(file, _SPARK_BYTES, start)
        first = data.find(b"\n") + 1 if start else 0
        for line in data[first : data.rfind(b"\n") + 1].splitlines(keepends=True):
            loss = _loss(line)
            if loss is not None:
                found[start + first] = loss
                break
            first += len(line)
    return sorted(found.items())


def _loss(line: bytes) -> float | None:
    try:
        event = orjson.loads(line)
        loss = number(event["loss"]) if event["type"] == "step" else math.nan
    except (ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) else None


def _with_header(row: RunRow, event: Event | None) -> RunRow:
    """Fill in the first event's facts, for a run without a result.json."""
    if event is None:
        return row
    try:
        config, budget = event["config"], event["budget"]
        return replace(
            row,
            method=printable(str(config["method"])),
            model=printable(str(config["model"]["name"])),
            dataset=printable(str(config["dataset"]["name"])),
            seed=int(config["training"]["seed"]),
            stand_in=bool(event["stand_in"]),
            budget_kind=str(budget["kind"]),
            budget_limit=float(budget["limit"]),
        )
    except (KeyError, TypeError, ValueError):
        return row


def _with_tail(row: RunRow, lines: bytes) -> RunRow:
    parsed = parse(lines)
    elapsed_N, step_N, tokens_N, energy_N, loss_N = parsed.steps_CN[:5]
    found: dict[str, Any] = {}
    if parsed.notable:
        found["elapsed_s"] = parsed.notable[-1].elapsed_s
    for key, rows in parsed.values.items():
        found["elapsed_s"] = max(found.get("elapsed_s", 0.0), float(rows[0, -1]))
        if key.startswith("eval/") and key != "eval/loss" and "metric" not in found:
            found |= {"metric_name": key.removeprefix("eval/"), "metric": float(rows[2, -1])}
    if len(step_N):
        recent = slice(-RATE_ROWS - 1, None)
        seconds = elapsed_N[recent][-1] - elapsed_N[recent][0]
        if seconds > 0:
            found["tokens_per_s"] = float(tokens_N[recent][1:].sum() / seconds)
        if np.isfinite(energy_N[-1]):
            found["energy_j"] = float(energy_N[-1])
        found |= {"last_loss": float(loss_N[-1]), "steps": int(step_N[-1]) + 1}
        found["elapsed_s"] = max(found.get("elapsed_s", 0.0), float(elapsed_N[-1]))
        found |= _progress(lines)
    return replace(row, **found)


def _progress(lines: bytes) -> dict[str, float]:
    """Progress at the last step, and the remaining time at the speed of these lines."""
    places = (lines.find(b'{"type":"step"'), lines.rfind(b'{"type":"step"'))
    events = [parse_event(lines[place:].partition(b"\n")[0]) for place in places if place >= 0]
    try:
        first, last = ((float(e["progress"]), float(e["elapsed_s"])) for e in events if e is not None)
    except (KeyError, TypeError, ValueError):
        return {}
    found = {"progress": min(max(last[0], 0.0), 1.0)}
    if last[0] > first[0] and last[1] > first[1]:
        found["eta_s"] = max(0.0, (1.0 - last[0]) * (last[1] - first[1]) / (last[0] - first[0]))
    return found


def _with_result(row: RunRow, result: Result) -> RunRow:
    """Merge in result.json: everything once the run has ended, else only what the log's end lacks."""
    ended = result.status != "running"
    limit, spent = _float(result.budget.get("limit")), _float(result.budget.get("spent"))
    progress = row.progress
    if limit and spent is not None and (ended or progress is None):
        progress = min(1.0, spent / limit)
    eta_s = row.eta_s
    if not ended and result.budget.get("kind") == "seconds" and limit and row.elapsed_s is not None:
        eta_s = max(0.0, limit - row.elapsed_s)
        spent, progress = row.elapsed_s, min(1.0, row.elapsed_s / limit)
    elif not ended and limit and progress is not None:
        spent = max(spent or 0.0, progress * limit)
    metric = _float(result.metric.get("value"))
    rate = result.tokens / result.elapsed_s if ended and result.elapsed_s > 0 else row.tokens_per_s
    return replace(
        row,
        method=printable(result.method),
        model=printable(result.model),
        dataset=printable(result.dataset),
        stand_in=result.stand_in,
        group=result.group,
        seed=result.seed,
        budget_kind=str(result.budget.get("kind", "")),
        budget_limit=limit,
        budget_spent=spent,
        progress=progress,
        eta_s=None if ended else eta_s,
        elapsed_s=result.elapsed_s if ended else row.elapsed_s,
        steps=result.steps if ended else row.steps,
        tokens=result.tokens or None,
        metric_name=printable(str(result.metric.get("name", "") or row.metric_name)),
        metric=metric if metric is not None and (ended or row.metric is None) else row.metric,
        best=_float(result.best.get("value")),
        test=_float(result.test.get("value")),
        tokens_per_s=rate,
        energy_j=result.energy_j if result.energy_j is not None and (ended or row.energy_j is None) else row.energy_j,
        energy_method=result.energy_method,
    )


def _float(value: Any) -> float | None:
    """A number of result.json, in which non-finite ones are strings."""
    try:
        return None if value is None else number(value)
    except (KeyError, TypeError, ValueError):
        return None
