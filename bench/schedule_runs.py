"""One run of bench/schedules.py with its measures, and a schedule's step cost relative to another's."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.interleave import INTERVAL_ROUNDS, Measure, Times, host_timer, interleave
from fastpeft.config import RunConfig, with_values
from fastpeft.errors import UnavailableError, UserError
from fastpeft.runs.events import Event, EventLog, finite, number
from fastpeft.runs.store import Result, RunFolder
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.loop import Loop

FIRST_STEPS = 16
WINDOW_STEPS, DIVERGED_FACTOR, DIVERGED_STEPS = 20, 2.0, 50
WARM_ROUNDS = 3


class _Watcher:
    """Keeps all events but the system's."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def say(self, message: str) -> None: ...

    def on_event(self, event: Event) -> None:
        if event["type"] != "system":
            self.events.append(event)

    def of(self, type: str) -> list[Event]:
        return [event for event in self.events if event["type"] == type]


def measure_run(run: RunConfig) -> dict[str, Any]:
    """Train `run` in a temporary folder. Returns values that JSON can hold.

    Raises:
        UserError: as from `fastpeft.train`, in a form that can be sent between processes.
        KeyboardInterrupt: the run was stopped.
    """
    watcher = _Watcher()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = train(run, results_dir=folder, name="run", reporter=watcher)
    except UnavailableError as error:
        raise UnavailableError(str(error)) from None
    except UserError as error:
        raise UserError(str(error)) from None
    if result.status == "stopped":
        raise KeyboardInterrupt
    steps, scores = watcher.of("step"), {event["split"]: event for event in watcher.of("eval")}
    losses = [number(step["loss"]) for step in steps]
    return finite(
        {
            "status": result.status,
            "diverged": diverged(losses, result.status),
            "metric_name": result.metric.get("name"),
            **{key: _score(scores, "validation", of) for key, of in (("metric", "value"), ("loss", "loss"))},
            **{key: _score(scores, "test", of) for key, of in (("test", "value"), ("test_loss", "loss"))},
            **{f"num_{split}": scores[split]["num"] for split in scores},
            "steps": result.steps,
            "tokens": result.tokens,
            "elapsed_s": round(result.elapsed_s, 3),
            "setup_s": round(result.setup_s, 3),
            "budget": result.budget,
            "energy_j": result.energy_j,
            "energy_method": result.energy_method,
            "start": _start(steps),
            "told": _told(watcher),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
    )


def diverged(losses: Sequence[float], status: str = "done") -> bool:
    """Whether `status` says so, the last loss is not finite, or the mean of WINDOW_STEPS losses was above
    DIVERGED_FACTOR times its running minimum for DIVERGED_STEPS steps in a row."""
    if status == "diverged" or (losses and not math.isfinite(losses[-1])):
        return True
    finite_losses = [loss for loss in losses if math.isfinite(loss)]
    if len(finite_losses) < WINDOW_STEPS:
        return False
    means = np.convolve(finite_losses, np.full(WINDOW_STEPS, 1 / WINDOW_STEPS), "valid")
    above = 0
    for is_above in means > DIVERGED_FACTOR * np.minimum.accumulate(means):
        above = above + 1 if is_above else 0
        if above >= DIVERGED_STEPS:
            return True
    return False


def _score(scores: dict[str, Event], split: str, of: str) -> float | None:
    return number(scores[split][of]) if split in scores else None


def _start(steps: list[Event]) -> dict[str, Any]:
    """Values that depend only on the initial weights and the order of the data. At LoRA's start B is 0, so that the
    loss does not depend on A, but the gradient does."""
    first = steps[0] if steps else {"loss": "nan", "grad_norm": "nan"}
    return {
        "loss": number(first["loss"]),
        "grad_norm": number(first["grad_norm"]),
        "tokens": [step["tokens"] for step in steps[:FIRST_STEPS]],
    }


def _told(watcher: _Watcher) -> list[Event]:
    """The schedule's warnings, each once, and its last figures: for FoT the errors of its forecasts."""
    warnings = {event["message"]: event for event in watcher.of("warning")}
    kept = [*warnings.values(), *watcher.of("schedule")[-1:]]
    return [{key: value for key, value in event.items() if key != "time_s"} for event in kept]


# ---- what a step costs ---------------------------------------------------------------------


class _Steps:
    """The trainer's own steps of one run, one per call."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        folder.mkdir()
        self._log = EventLog(folder / "events.jsonl")
        result = Result(run_id=run.run_id, name=folder.name)
        self.loop = Loop(build_job(run), RunFolder(folder), self._log, result, lambda: False)
        self.loop.job.clock.start()

    def __call__(self, index: int) -> None:
        self.loop._step()

    def close(self) -> None:
        self._log.close()


def step_cost(base: RunConfig, other: RunConfig, rounds: int, calls: int = 1) -> dict[str, Any]:
    """Cost of `other`'s step relative to `base`'s: the same batches at the same progress, in turns (bench.interleave),
    over the whole schedule, from the warm-up to the end, in `rounds` rounds of two turns of `calls` steps. On a GPU by
    the wall clock; on a CPU by the process's CPU time, which excludes other processes.

    Returns:
        `ratio`: the median of the rounds' ratios. `mean_ratio`: total seconds over total seconds, which includes
        periodic work (a fit, a probe) in proportion. Each with `_low` and `_high`, a 95 % bootstrap interval over the
        rounds, None for fewer than INTERVAL_ROUNDS.
    """
    budget = f"{2 * calls * (WARM_ROUNDS + rounds)}steps"
    runs = {name: with_values(run, {"budget": budget}) for name, run in (("base", base), ("other", other))}
    with tempfile.TemporaryDirectory() as folder, _threads(base):
        steps = {name: _Steps(run, Path(folder) / name) for name, run in runs.items()}
        device = steps["base"].loop.job.device
        measure = host_timer(device, calls) if device.type == "cuda" else _cpu_timer(calls)
        times = interleave(steps, 1, WARM_ROUNDS + rounds, lambda: False, measure)
        for each in steps.values():
            each.close()
    times = Times(times.rounds[WARM_ROUNDS:])
    ratio, low, high = times.ratio("other", "base")
    mean, mean_low, mean_high = ratio_of_sums(times, "other", "base")
    figures = {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    figures |= {"mean_ratio": mean, "mean_ratio_low": mean_low, "mean_ratio_high": mean_high}
    clock = "wall" if device.type == "cuda" else "CPU time"
    counts = {"rounds": rounds, "steps": 2 * calls * rounds}
    return figures | counts | {"clock": clock, "base_step_ms": 1e3 * times.median_s("base")}


def _cpu_timer(calls: int) -> Measure:
    def measure(run: Callable[[], object]) -> float:
        began = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - began) / calls

    return measure


def ratio_of_sums(times: Times, name: str, base: str) -> tuple[float, float | None, float | None]:
    """Seconds of all rounds over those of `base`, and a 95 % bootstrap interval over rounds."""
    own, theirs = (np.array([sum(each.seconds[of]) for each in times.rounds]) for of in (name, base))
    ratio = float(own.sum() / theirs.sum())
    if len(own) < INTERVAL_ROUNDS:
        return ratio, None, None
    draws = np.random.default_rng(0).integers(len(own), size=(2000, len(own)))
    low, high = np.percentile(own[draws].sum(1) / theirs[draws].sum(1), [2.5, 97.5])
    return ratio, float(low), float(high)


@contextmanager
def _threads(run: RunConfig):
    before = torch.get_num_threads()
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
