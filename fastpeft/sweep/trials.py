"""Runs the trials of a sweep in parallel until the requested number has ended.

Only this process talks to Optuna, on behalf of its trials' processes: it asks, reports, prunes and tells. It notices at
once if a trial's process is killed. Trials of a sweep that was itself killed are found by their leases.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from fastpeft.config import ConfigError, RunConfig, parse_budget, run_values, with_values
from fastpeft.config.search import OWN_METRIC
from fastpeft.errors import UserError, first_line
from fastpeft.sweep import lease
from fastpeft.sweep.lease import HEARTBEAT, HEARTBEAT_EVERY_S, LEASE, Lease, is_alive
from fastpeft.sweep.space import distributions, trial_settings
from fastpeft.sweep.study import ask, best_of, counted
from fastpeft.sweep.trial_rows import DURATION_S, ENERGY_J, METRIC, OUTCOME, PAUSED, Listener, Standing, TrialRow
from fastpeft.sweep.worker import Message, Worker, wait

_POLL_S = 0.5
_OPTUNA_STATE = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.PRUNED}
"""A configuration that diverges is bad, not failed: the sampler has to learn to avoid it, and it ignores trials that
FAIL."""


class SweepError(UserError):
    """The sweep cannot go on; the message says why."""

    exit_code = 1


@dataclass
class _Running:
    trial: Trial
    worker: Worker
    slot: int
    began_s: float = field(default_factory=time.monotonic)
    lost: bool = False
    """Another sweep has declared this trial dead."""


class Trials:
    """Runs the trials of `run` in worker processes.

    Args:
        folder: folder of the sweep. The run folder of a trial is trials/NNNN in it, and its output trials/NNNN.log.
        target: job of a trial, `package.module:function`.
        is_shared: whether other sweeps may use the same storage.
        spent_s: seconds that earlier calls of this sweep took.
        stop: returns True once the sweep is to be interrupted.
    """

    def __init__(
        self,
        run: RunConfig,
        study: Study,
        folder: Path,
        listener: Listener,
        *,
        num_workers: int,
        target: str,
        is_shared: bool = False,
        spent_s: float = 0.0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run, self.study, self.folder = run, study, folder / "trials"
        self._config = run.optuna
        self._space: dict[str, BaseDistribution] = distributions(run.optuna.space)
        self._listener, self._target, self._stop = listener, target, stop
        self._num_workers = num_workers
        self._running: list[_Running] = []
        self._before_s, self._began_s = spent_s, time.monotonic()
        self._failures = 0
        """Consecutive failures."""
        self._is_ending = False
        self._lease, self._beaten_s = Lease.mine(), -math.inf
        self._is_shared = is_shared
        self._nobodys_since: dict[int, float] = {}
        """Number of a trial without a lease -> monotonic time at which this sweep first saw it."""
        self._budget = parse_budget(self._config.budget) if self._config.budget else None

    @property
    def spent_s(self) -> float:
        return self._before_s + time.monotonic() - self._began_s

    def run_all(self) -> str:
        """Run trials until the sweep ends. Returns the reason: done, budget or stopped.

        Raises:
            SweepError: too many consecutive trials failed, or one failed for a cause that all trials share.
        """
        try:
            self._bury_dead()
            self._continue_paused()
            while True:
                self._begin_more()
                if not self._running and not self._waits_for_others():
                    return self._why_over()
                wait([one.worker for one in self._running], _POLL_S)
                for one in list(self._running):
                    self._hear(one)
                self._beat()
                if self._stop() or self._is_over_time():
                    return self._wind_up()
        finally:
            self._kill_all()

    # ---- beginning -------------------------------------------------------------------------

    def _begin_more(self) -> None:
        while len(self._running) < self._num_workers and self._wants_more():
            trial = ask(self.study, self._config, self._space)
            try:
                self._own(trial)
            except UpdateFinishedTrialError:  # sampling took so long that another sweep declared it dead
                continue
            self._start(trial, resume=False)

    def _wants_more(self) -> bool:
        if self._stop():
            return False
        if self._budget is not None and self._is_spent():
            return False
        running = len(self._running) + len(self._elsewhere())
        return len(counted(self.study)) + running < self._config.trials

    def _elsewhere(self) -> list[FrozenTrial]:
        """Trials that other sweeps are running on the same storage."""
        mine = {one.trial.number for one in self._running}
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial.number not in mine and not self._is_paused_here(trial)]

    def _waits_for_others(self) -> bool:
        """Whether to wait for the trials of other sweeps: if one dies, this sweep has to repeat it."""
        is_spent = self._budget is not None and self._is_spent()
        return not self._stop() and not is_spent and bool(self._elsewhere())

    def _is_spent(self) -> bool:
        """Whether the budget leaves no room for a further trial. For seconds, its expected duration is included."""
        assert self._budget is not None
        if self._budget.kind == "joules":
            return self._spent_j() >= self._budget.limit
        return self.spent_s + self._expected_s() > self._budget.limit

    def _expected_s(self) -> float:
        """Expected seconds of a further trial: the mean over complete trials, 0 without any."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        took = [trial.user_attrs[DURATION_S] for trial in trials if DURATION_S in trial.user_attrs]
        return sum(took) / len(took) if took else 0.0

    def _spent_j(self) -> float:
        return sum(trial.user_attrs.get(ENERGY_J) or 0.0 for trial in self.study.get_trials(deepcopy=False))

    def _own(self, trial: Trial) -> None:
        trial.set_user_attr(LEASE, self._lease.to_json())
        trial.set_user_attr(HEARTBEAT, time.time())

    def _start(self, trial: Trial, resume: bool) -> None:
        slot = min(set(range(self._num_workers)) - {one.slot for one in self._running})
        name = f"{trial.number:04d}"
        try:
            run = with_values(self.run, trial_settings(self._config, trial.params))
        except ConfigError as error:  # each value is valid alone, but not in this combination
            self._tell_failed(trial, f"refused: {'; '.join(error.problems)}", 0.0)
            return
        if not resume:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # left over from a storage that was emptied
        spec = {
            "run": run_values(run),
            "params": trial.params,
            "results_dir": str(self.folder),
            "name": name,
            "resume": resume,
            "metric": self._config.metric,
            "direction": self._config.direction,
            "worker": slot,
            "num_workers": self._num_workers,
        }
        worker = Worker(self._target, spec, self.folder / f"{name}.log")
        self._running.append(_Running(trial, worker, slot))

    # ---- trials of earlier sweeps ----------------------------------------------------------

    def _bury_dead(self) -> None:
        """Set RUNNING trials to FAIL if their sweep is dead."""
        for trial in self._elsewhere():
            if not is_alive(trial.user_attrs) and not self._is_new(trial):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                self._listener.say(f"trial {trial.number} was left by a sweep that is gone: it is made again")

    def _is_new(self, trial: FrozenTrial) -> bool:
        """Whether another sweep may still be sampling its values. It writes its lease only after that."""
        if not self._is_shared or LEASE in trial.user_attrs:
            return False
        now_s = time.monotonic()
        return now_s - self._nobodys_since.setdefault(trial.number, now_s) <= lease.DEAD_AFTER_S

    def _is_paused_here(self, trial: FrozenTrial) -> bool:
        return trial.user_attrs.get(PAUSED) == self._place()

    def _place(self) -> str:
        return f"{self._lease.host.partition(' ')[0]}:{self.folder.resolve()}"

    def _continue_paused(self) -> None:
        """Resume trials that an interrupted sweep paused, unless the time is over."""
        if self._is_over_time():
            return
        for found in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._is_paused_here(found):
                continue
            trial = Trial(self.study, found._trial_id)  # ask() only creates new trials
            self._own(trial)
            if len(self._running) < self._num_workers:
                trial.set_user_attr(PAUSED, None)
                self._start(trial, resume=self._can_go_on(trial))
            else:  # fewer workers than before
                self._tell_failed(trial, "not continued", 0.0)

    # ---- messages of the workers -----------------------------------------------------------

    def _hear(self, one: _Running) -> None:
        for message in one.worker.messages():
            evaluation, value = message["report"]
            one.worker.answer(self._reported(one, evaluation, value))
        outcome = one.worker.outcome()
        if outcome is not None:
            self._running.remove(one)
            self._end(one, outcome)
            self._listener.on_standing(self.standing())

    def _reported(self, one: _Running, evaluation: int, value: float) -> bool:
        """Report an evaluation to Optuna. Returns whether the trial has to end."""
        if not math.isfinite(value):  # -inf would be the best value of a minimisation
            return True
        try:
            one.trial.report(value, evaluation)
            return bool(one.trial.should_prune())
        except UpdateFinishedTrialError:
            one.lost = True
            return True

    def _end(self, one: _Running, outcome: Message) -> None:
        if not one.lost:
            try:
                self._note_end(one, outcome)
                return
            except UpdateFinishedTrialError:  # by another sweep, while the network failed
                pass
        self._listener.say(f"trial {one.trial.number} was taken for dead by another sweep: its result is left out")

    def _note_end(self, one: _Running, outcome: Message) -> None:
        took_s = round(time.monotonic() - one.began_s + one.trial.user_attrs.get(DURATION_S, 0.0), 3)
        if "failed" in outcome:
            self._end_failed(one, outcome, took_s)
            return
        status, value, energy_j = outcome["status"], outcome["value"], outcome["energy_j"]
        one.trial.set_user_attr(DURATION_S, took_s)
        one.trial.set_user_attr(ENERGY_J, energy_j)
        one.trial.set_user_attr(METRIC, outcome["metric"] if self._config.metric == OWN_METRIC else self._config.metric)
        if status == "stopped":
            if self._is_ending:
                one.trial.set_user_attr(PAUSED, self._place())
            else:
                self._tell_failed(one.trial, "stopped by a signal", took_s)
            return
        if status == "done" and (value is None or not math.isfinite(value)):
            status, value = "diverged", None
        self._tell(one.trial, status, value, energy_j)
        self._failures = 0
        self._remove_weights(one.trial.number)
        self._listener.on_trial(
            TrialRow(one.trial.number, status, value, one.trial.params, took_s, energy_j, counts=True)
        )

    def _end_failed(self, one: _Running, outcome: Message, took_s: float) -> None:
        if outcome.get("ends_sweep"):
            self._forget(one)
            error = SweepError(f"{outcome['failed']}. The trial's output is in {one.worker.log}")
            error.exit_code = outcome["exit_code"]
            raise error
        if self._is_ending and self._can_go_on(one.trial):  # the signal came during loading
            one.trial.set_user_attr(PAUSED, self._place())
            return
        self._tell_failed(one.trial, outcome["failed"], took_s)

    def _can_go_on(self, trial: Trial) -> bool:
        """Whether it has a run folder. Without a checkpoint it starts again from step 0."""
        return (self.folder / f"{trial.number:04d}" / "run.yaml").is_file()

    def _tell(self, trial: Trial, status: str, value: float | None, energy_j: float | None) -> None:
        trial.set_user_attr(OUTCOME, status)
        limit_j = self._config.max_trial_energy_j
        if limit_j is not None and energy_j is not None:
            trial.set_constraint(ENERGY_J, energy_j - limit_j)
        state = _OPTUNA_STATE[status]
        values = value if state == TrialState.COMPLETE else None
        self.study.tell(trial, values, state=state, skip_if_finished=True)

    def _tell_failed(self, trial: Trial, cause: str, took_s: float) -> None:
        try:
            trial.set_user_attr(OUTCOME, cause)
        except UpdateFinishedTrialError:
            return
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        if self._is_ending:
            return
        self._failures += 1
        self._listener.on_trial(TrialRow(trial.number, cause, None, trial.params, took_s, None, counts=False))
        if self._failures >= self._config.max_failures:
            raise SweepError(
                f"{self._failures} trials failed one after another (optuna.max_failures), the last {trial.number}: "
                f"{first_line(cause)}. Its output is in {self.folder}"
            )

    def _remove_weights(self, number: int) -> None:
        """Delete the trial's subfolders with weights. The best trial is trained in full afterwards; files are kept."""
        for path in (self.folder / f"{number:04d}").glob("*/"):
            shutil.rmtree(path, ignore_errors=True)

    # ---- time ------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Write the heartbeat of every running trial, and check the leases of other sweeps."""
        now_s = time.monotonic()
        if now_s - self._beaten_s < HEARTBEAT_EVERY_S:
            return
        self._beaten_s = now_s
        for one in self._running:
            try:
                one.trial.set_user_attr(HEARTBEAT, time.time())
            except UpdateFinishedTrialError:
                one.lost = True
                one.worker.stop()
        self._bury_dead()
        self._listener.on_standing(self.standing())

    def _is_over_time(self) -> bool:
        return self._budget is not None and self._budget.kind == "seconds" and self.spent_s >= self._budget.limit

    def standing(self) -> Standing:
        is_metered = any(trial.user_attrs.get(ENERGY_J) is not None for trial in self.study.get_trials(deepcopy=False))
        return Standing(
            counted=len(counted(self.study)),
            wanted=self._config.trials,
            running=len(self._running),
            best=best_of(self.study),
            spent_s=self.spent_s,
            spent_j=self._spent_j() if is_metered else None,
        )

    def _why_over(self) -> str:
        if self._stop():
            return "stopped"
        return "done" if len(counted(self.study)) >= self._config.trials else "budget"

    def _wind_up(self) -> str:
        """End early: running trials save a checkpoint, and the same command resumes them. Returns stopped or budget."""
        self._is_ending = True
        for one in self._running:
            one.worker.stop()
        while self._running:
            wait([one.worker for one in self._running], _POLL_S)
            for one in list(self._running):
                self._hear(one)
        return "stopped" if self._stop() else "budget"

    def _kill_all(self) -> None:
        """Kill the workers that are still running when an error ends the sweep."""
        for one in self._running:
            one.worker.kill()
            self._forget(one)
        self._running.clear()

    def _forget(self, one: _Running) -> None:
        try:
            self.study.tell(one.trial, state=TrialState.FAIL, skip_if_finished=True)
        except (UserError, optuna.exceptions.StorageInternalError):
            return  # the storage itself failed; the next sweep decides by the lease
