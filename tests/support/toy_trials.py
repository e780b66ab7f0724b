"""Trials of sweeps that train nothing: jobs of their processes, with learning curves that are known."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from fastpeft.config import RunConfig, load_run
from fastpeft.sweep.worker import Channel, Message

_JOBS = "quadratic", "crash", "always_crash", "infinite", "ten_joules", "costly", "resumable"
QUADRATIC, CRASH, ALWAYS_CRASH, INFINITE, TEN_JOULES, COSTLY, RESUMABLE = (f"{__name__}:{job}" for job in _JOBS)
RATE, BATCH = "training.learning_rate", "training.batch_size"
BEST_RATE, BEST_BATCH = 1e-3, 32
SPACE = {
    RATE: {"type": "loguniform", "low": 1e-5, "high": 1e-1},
    BATCH: {"type": "categorical", "choices": [8, 32, 128]},
}
_EVALUATIONS = 4


def toy_run(seconds: float = 0.0, **optuna: Any) -> RunConfig:
    """A run whose trials take so long; `optuna` over the section's defaults."""
    section = {"space": SPACE, "trials": 40} | optuna
    settings = {f"optuna.{key}": value for key, value in section.items()}
    return load_run("lora_mnli", settings | {"training.epochs": seconds or 1e-9})


def score(params: dict[str, Any], share: float = 1.0) -> float:
    """Highest, 1, at BEST_RATE and BEST_BATCH; it is reached as the share of training goes to 1."""
    off = math.log10(params[RATE] / BEST_RATE) ** 2 + 0.2 * (params[BATCH] != BEST_BATCH)
    return (1 - 0.1 * off) * (1 - math.exp(-3 * share)) / (1 - math.exp(-3))


def quadratic(spec: Message, channel: Channel) -> Message:
    """Leaves a folder, as a trial does; waits, evaluates, and is pruned where the sweep says so."""
    folder = Path(spec["results_dir"]) / spec["name"]
    (folder / "adapter").mkdir(parents=True)
    (folder / "pid").write_text(str(os.getpid()))
    value, seconds = math.nan, spec["run"]["training"]["epochs"]
    for evaluation in range(1, _EVALUATIONS + 1):
        time.sleep(seconds / _EVALUATIONS)
        value = score(spec["params"], evaluation / _EVALUATIONS)
        if evaluation < _EVALUATIONS and channel.report(evaluation, value):
            return _ended("pruned", value, seconds)
    return _ended("done", value, seconds)


def crash(spec: Message, channel: Channel) -> Message:
    """Every third trial fails, in three ways by turns."""
    number = int(spec["name"])
    if number % 9 == 1:
        raise RuntimeError("out of luck")
    if number % 9 == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if number % 9 == 7:
        os._exit(3)
    return quadratic(spec, channel)


def always_crash(spec: Message, channel: Channel) -> Message:
    raise RuntimeError("out of luck")


def _ended(status: str, value: float | None, seconds: float) -> Message:
    return {"status": status, "value": value, "metric": "accuracy", "elapsed_s": seconds, "energy_j": None}


def infinite(spec: Message, channel: Channel) -> Message:
    """Every other trial says minus infinity, in the end or before."""
    number = int(spec["name"])
    if number % 4 == 3 and channel.report(1, -math.inf):
        return _ended("pruned", None, 0.0)
    value = -math.inf if number % 2 else 0.5
    return _ended("done", value, 0.0)


def ten_joules(spec: Message, channel: Channel) -> Message:
    return _ended("done", score(spec["params"]), 0.0) | {"energy_j": 10.0}


def costly(spec: Message, channel: Channel) -> Message:
    return _ended("done", score(spec["params"]), 0.0) | {"energy_j": float(spec["params"][BATCH])}


def resumable(spec: Message, channel: Channel) -> Message:
    """Prints each evaluation once; stops at SIGTERM behind the one under way, and goes on from there."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    folder = Path(spec["results_dir"]) / spec["name"]
    kept = folder / "evaluations"
    done = int(kept.read_text()) if spec["resume"] else 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").touch()
    seconds = spec["run"]["training"]["epochs"]
    for evaluation in range(done + 1, _EVALUATIONS + 1):
        until = time.monotonic() + seconds / _EVALUATIONS
        while time.monotonic() < until:
            time.sleep(0.01)
        print(evaluation, flush=True)
        kept.write_text(str(evaluation))
        if evaluation < _EVALUATIONS:
            channel.report(evaluation, score(spec["params"], evaluation / _EVALUATIONS))
            if stopped:
                return _ended("stopped", None, seconds)
    return _ended("done", score(spec["params"]), seconds)
