"""A sweep from start to end: resolve the run, search, train the best settings in full, write the summary.

results/NAME/ holds sweep.json, trials.csv, best.yaml, figures/, journal.log, and trials/ with one run folder and one
log per trial. It has no run.yaml, so that the list of runs shows no trials. The full trainings are runs beside it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from optuna.exceptions import StorageInternalError
from optuna.study import Study

from fastpeft.config import ConfigError, RunConfig, run_from_values, run_values
from fastpeft.config.search import parse_sweep_budget
from fastpeft.errors import UserError, first_line
from fastpeft.runs.events import Event
from fastpeft.runs.store import RunError, RunFolder, read_json
from fastpeft.sweep import trial_rows
from fastpeft.sweep.best import AGAIN, BestRun, train_best
from fastpeft.sweep.space import check_space, identity
from fastpeft.sweep.study import JOURNAL, best_of, counted, open_storage, open_study
from fastpeft.sweep.sweep_summary import SUMMARY, write_summary
from fastpeft.sweep.trials import Trials
from fastpeft.sweep.worker import Message, Worker, wait, warm_up

LOOK = "fastpeft.sweep.trial:look"
TRAIN_TRIAL = "fastpeft.sweep.trial:train_trial"
_POLL_S = 0.5
_GOES_ON = "What was found is kept; the same command goes on when that is mended"


class Listener(trial_rows.Listener, Protocol):
    """Receives the progress of a sweep."""

    def on_event(self, event: Event) -> None:
        """Called with every event of the full training."""


@dataclass(frozen=True)
class Plan:
    """Arguments of `fastpeft sweep`."""

    run: RunConfig
    name: str
    results_dir: Path
    storage: str | None = None
    num_workers: int = 1
    allow_stand_in: bool = True
    trains_best: bool = True

    @property
    def folder(self) -> Path:
        return self.results_dir / self.name


@dataclass(frozen=True)
class Outcome:
    status: str
    """done; budget, if the sweep's budget ended the search; or stopped, by a signal."""
    counted: int
    best: BestRun | None
    stand_in: bool
    signal: int | None
    """The signal that stopped the sweep."""


class StopSignals:
    """A context in which Ctrl-C and SIGTERM request a clean end. A second signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def sweep(plan: Plan, listener: Listener, stop: StopSignals) -> Outcome:
    """Search the run's space, and train the best settings in full.

    Raises:
        UserError: invalid input, before anything is trained; a storage that fails; no usable trial.
    """
    check_space(plan.run)
    warm_up()
    with _owned(plan), stop:
        looked = _look(plan, listener, stop)
        if looked is None:
            return Outcome("stopped", 0, None, False, stop.signal)
        run = run_from_values(looked["run"], plan.run.run_id)
        if looked["stand_in"]:
            listener.say(f"STAND-IN: {run.model.name} on {run.dataset.name} ({looked['reason']})")
        check_space(run)  # a stand-in changes the run
        _check_meter(run, looked["meter"])
        try:
            study = _open(plan, run, listener)
            status, trained = _search(plan, run, study, looked["stand_in"], listener, stop)
        except (OSError, StorageInternalError) as error:
            cause = error.strerror if isinstance(error, OSError) else first_line(error.__cause__ or error)
            raise UserError(f"{plan.folder}: {cause}. {_GOES_ON}") from None
        return Outcome(status, len(counted(study)), trained, looked["stand_in"], stop.signal)


def _search(
    plan: Plan, run: RunConfig, study: Study, stand_in: bool, listener: Listener, stop: StopSignals
) -> tuple[str, BestRun | None]:
    """Returns (reason that the search ended, full training of the best settings or None)."""
    earlier = read_json(plan.folder / SUMMARY) or {}
    spent_s = float(earlier.get("spent_s", 0.0))
    trials = Trials(
        run, study, plan.folder, listener, num_workers=plan.num_workers, target=TRAIN_TRIAL,
        is_shared=plan.storage is not None, spent_s=spent_s, stop=stop,
    )  # fmt: skip
    try:
        status = trials.run_all()
    except BaseException:
        with suppress(OSError, StorageInternalError, UserError):  # the cause of the failure may prevent this too
            write_summary(plan.folder, run, study, "failed", trials.spent_s, stand_in)
        raise
    spent_s = trials.spent_s
    write_summary(plan.folder, run, study, status, spent_s, stand_in)
    if status == "stopped" or not plan.trains_best:
        return status, None
    best = best_of(study)
    if best is None:
        raise UserError(f"no trial came to its end with a finite value{_why_none(run)}: there is no best one to train")
    trained = train_best(run, best, plan.name, plan.results_dir, listener, stop)
    write_summary(plan.folder, run, study, status, spent_s, stand_in, trained)
    return "stopped" if stop() else status, trained


def _open(plan: Plan, run: RunConfig, listener: Listener) -> Study:
    """Open or create the study, before any trial starts."""
    study, is_new = open_study(open_storage(plan.storage, plan.folder), plan.name, run.optuna, identity(run))
    if is_new and next((plan.folder / "trials").glob("*"), None) is not None:
        raise UserError(
            f"{plan.folder} holds trials of another study; choose another --name, or give the --storage that it had"
        )
    num_counted = len(counted(study))
    goes_on = f", which has {num_counted} of them" if num_counted else ""
    where = "the storage that was given" if plan.storage else plan.folder / JOURNAL
    listener.say(f"{run.optuna.trials} trials of {', '.join(run.optuna.space)} in {where}{goes_on}")
    return study


@contextmanager
def _owned(plan: Plan) -> Iterator[None]:
    """Lock the sweep's folder, so that one process at a time uses it."""
    folder = RunFolder.at(plan.results_dir, plan.name)
    if folder.config.exists():
        raise RunError(f"{folder.path} is a run; choose another --name")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder.path} cannot be made: {error.strerror}") from None
    folder.check_links()
    try:
        folder.lock()
    except RunError:
        raise RunError(f"{folder.path} is a sweep that another process runs; choose another --name") from None
    except OSError as error:
        raise RunError(f"{folder.path} cannot be locked: {error.strerror}") from None
    try:
        yield
    finally:
        folder.unlock()


def _look(plan: Plan, listener: Listener, stop: StopSignals) -> Message | None:
    """The run as resolved on this machine, see trial.look; None if the sweep was stopped meanwhile."""
    spec = {"run": run_values(plan.run), "allow_stand_in": plan.allow_stand_in}
    listener.say(f"loading torch, then {plan.run.model.name} and {plan.run.dataset.path or plan.run.dataset.name}")
    worker = Worker(LOOK, spec, plan.folder / "look.log")
    while (found := worker.outcome()) is None:
        wait([worker], _POLL_S)
        worker.messages()
        if stop():
            worker.kill()
            return None
    if "failed" in found:
        told = found["failed"]
        if "ends_sweep" not in found:  # not a message for users, but the exit of the process
            told = f"looking at the model and the data failed: {told}. Its output is in {worker.log}; {AGAIN}"
        error = UserError(told)
        error.exit_code = found["exit_code"]
        raise error
    return found


def _check_meter(run: RunConfig, fault: str) -> None:
    """Raises ConfigError if a setting in joules has no energy meter."""
    config = run.optuna
    asked = {"optuna.max_trial_energy_j": config.max_trial_energy_j is not None}
    asked["optuna.budget"] = config.budget is not None and parse_sweep_budget(config.budget).kind == "joules"
    problems = [
        f"{key}: joules need an energy meter, and none can be read here: {fault}"
        for key, is_asked in asked.items()
        if is_asked and fault
    ]
    if problems:
        raise ConfigError(run.run_id, problems)


def _why_none(run: RunConfig) -> str:
    limit_j = run.optuna.max_trial_energy_j
    return f" within {limit_j:g} J (optuna.max_trial_energy_j)" if limit_j is not None else ""
