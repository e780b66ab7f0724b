"""Sweeps of bench/chaos.py: SIGKILL of workers and of the sweep itself, until it ends."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

NUM_TRIALS = 4
MOST_KILLS = 8
"""Kills in one sweep."""
LINES_SHOWN = 20
"""Lines of a failed command's output that are shown."""
EVERY_S = 1.0, 8.0
"""Least and most seconds between two kills."""
SPACE = (
    "optuna.space={training.learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}, "
    "training.batch_size: {type: categorical, choices: [4, 8]}}"
)


def command(start: list[str], results: Path, name: str) -> list[str]:
    """Arguments of a sweep of the run `start` (its preset and settings)."""
    own = [SPACE, "optuna.seeds='1'", "optuna.max_failures=100", "optuna.pruner=none"]
    place = ["--trials", str(NUM_TRIALS), "--workers", "2", "--results-dir", str(results), "--name", name]
    return ["sweep", *start, *own, *place]


def run_killed(arguments: list[str], rng: random.Random, log: Path, kills: Counter[str]) -> None:
    """Repeat the sweep until it ends with 0. If a killed worker ran no trial, the sweep ends with 1 and says that the
    same command continues it."""
    left = MOST_KILLS
    while True:
        before = kills.total()
        with _started(arguments, log) as process:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(*EVERY_S))
                    continue
                if left and (victim := _victim(process.pid, rng)):
                    left -= 1
                    kills["a sweep" if victim.pid == process.pid else "a sweep's worker"] += 1
                    with suppress(psutil.NoSuchProcess):
                        victim.kill()
        if process.returncode not in (-9, 1) or kills.total() == before:
            break
    if process.returncode:
        raise SystemExit(failed(arguments, process.returncode, log))


def failed(arguments: list[str], code: int, log: Path) -> str:
    """Message of a command that should have ended well, with its last lines, since the folder of `log` is removed."""
    said = "\n".join(log.read_text(errors="replace").splitlines()[-LINES_SHOWN:])
    return f"{said}\nfastpeft {' '.join(arguments)} ended with {code}"


@contextmanager
def _started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("ab") as out:
        words = [sys.executable, "-m", "fastpeft", *arguments]
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=os.environ)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _victim(sweep: int, rng: random.Random) -> psutil.Process | None:
    """With probability 2/3 a worker, where there is one; otherwise the sweep, or None. Workers are children of the
    sweep's fork server."""
    with suppress(psutil.NoSuchProcess):
        whole = psutil.Process(sweep)
        workers = [grandchild for child in whole.children() for grandchild in child.children()]
        if workers and rng.random() < 2 / 3:
            return rng.choice(workers)
        return whole if rng.random() < 1 / 3 else None
    return None


def lost(folder: Path) -> list[str]:
    """Faults in the results of an ended sweep, in words."""
    summary = json.loads((folder / "sweep.json").read_text())
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    counted = [row for row in rows if row["outcome"] in ("done", "pruned")]
    drawn = {(row["training.learning_rate"], row["training.batch_size"]) for row in counted}
    found = [] if summary["status"] == "done" else [f"the sweep's status is {summary['status']}"]
    if not len(counted) == len(drawn) == summary["trials"] == NUM_TRIALS:
        found.append(f"{len(counted)} trials, {len(drawn)} of them different, for {NUM_TRIALS}")
    return found + [f"trial {row['trial']} was left {row['outcome']}" for row in rows if row["outcome"] == "running"]
