"""Full training of a sweep's best settings: once per seed, with trackers and one score of the test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import FrozenTrial

from fastpeft.config import RunConfig, parse_seeds, run_values, with_values
from fastpeft.errors import UserError
from fastpeft.runs.events import Event
from fastpeft.runs.store import Result, RunFolder
from fastpeft.sweep.worker import Worker, wait

TRAIN_BEST = "fastpeft.sweep.trial:train_best"
AGAIN = "the same command goes on"
_POLL_S = 0.5


class Listener(Protocol):
    def say(self, message: str) -> None: ...

    def on_event(self, event: Event) -> None: ...


class Stop(Protocol):
    def __call__(self) -> bool: ...


@dataclass(frozen=True)
class BestRun:
    number: int
    """Number of the best trial."""
    value: float
    params: dict[str, Any]
    results: list[Result]
    """Results of its full trainings, one per seed."""


def train_best(
    run: RunConfig, best: FrozenTrial, name: str, results_dir: Path, listener: Listener, stop: Stop
) -> BestRun:
    """Train the trial `best` of the sweep `name` in full. Seeds that are done are not trained again.

    The folders are `<name>-best<number>-seed<seed>`, so that a better trial found later gets folders of its own.

    Raises:
        UserError: a full training failed.
    """
    assert best.value is not None
    group, results = f"{name}-best{best.number:04d}", []
    for seed in parse_seeds(run.optuna.seeds) if run.optuna.seeds else [run.training.seed]:
        folder = RunFolder.at(results_dir, f"{group}-seed{seed}")
        result = folder.read_result()
        if result is None or result.status not in ("done", "diverged"):
            if stop():
                break
            settings = with_values(run, best.params | {"training.seed": seed})
            listener.say(f"\nthe best settings, of trial {best.number}, in full with seed {seed}: {folder.path}")
            _train(settings, folder, group, results_dir / name / f"{folder.path.name}.log", listener, stop)
            result = folder.read_result()
        if result is not None:
            results.append(result)
    return BestRun(best.number, best.value, dict(best.params), results)


def _train(run: RunConfig, folder: RunFolder, group: str, log: Path, listener: Listener, stop: Stop) -> None:
    spec = {
        "run": run_values(run),
        "results_dir": str(folder.path.parent),
        "name": folder.path.name,
        "resume": folder.config.is_file(),
        "group": group,
    }
    worker, asked = Worker(TRAIN_BEST, spec, log), False
    try:
        while (ended := worker.outcome()) is None:
            wait([worker], _POLL_S)
            _pass_on(worker, listener)
            if stop() and not asked:
                asked = True
                worker.stop()
        _pass_on(worker, listener)
    except BaseException:
        worker.kill()
        raise
    if "failed" in ended and not asked:
        error = UserError(f"the full training {folder.path} failed: {ended['failed']}. Its output is in {log}; {AGAIN}")
        error.exit_code = ended["exit_code"]
        raise error


def _pass_on(worker: Worker, listener: Listener) -> None:
    for message in worker.messages():
        if "say" in message:
            listener.say(message["say"])
        else:
            listener.on_event(message["event"])
