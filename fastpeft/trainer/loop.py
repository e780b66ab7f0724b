"""The training loop: calibrate, step, evaluate, save, and stop inside the budget.

fit the head, calibrate -> [ evaluate when due, checkpoint when due, one step ] until nothing more fits -> finish
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastpeft import phases
from fastpeft.config import run_values
from fastpeft.data.batches import Batch
from fastpeft.device_memory import OutOfMemory
from fastpeft.runs.events import EventLog
from fastpeft.runs.store import Result, RunFolder
from fastpeft.signals import Rates, Signals
from fastpeft.tasks.base import Score
from fastpeft.trainer.build import Job
from fastpeft.trainer.calibrate import calibrate
from fastpeft.trainer.checkpoint_files import Checkpoint
from fastpeft.trainer.checkpointing import Checkpointing, Stateful
from fastpeft.trainer.evaluator import Evaluator
from fastpeft.trainer.first_step import FirstStep
from fastpeft.trainer.fitted_head import fit_head
from fastpeft.trainer.graphs import GraphedSteps
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.rng import GlobalRng
from fastpeft.trainer.step import train_step
from fastpeft.trainer.step_log import StepLog

MAX_NON_FINITE = 20

Prune = Callable[[int, Score], bool]
"""Called after each evaluation before the final one, with its number (1 to 4 at `every: 20%`) and its score. Returns
whether to end the run there."""


def take_step(
    job: Job,
    batches: MicroBatches,
    progress: float,
    elapsed_s: float,
    watched: Iterable[Batch] | None = None,
    graphs: GraphedSteps | None = None,
) -> tuple[Signals, Rates]:
    """The optimizer step of these micro-batches, on all ranks.

    Args:
        watched: wraps `batches` and is iterated instead of them. The step is then not replayed from a graph.
        graphs: the captured steps, which replay the batches that have a bucket.
    """
    bucket = None if graphs is None or watched is not None else graphs.bucket_of(batches)
    if graphs is not None and bucket is not None:
        return graphs.take(bucket, batches, progress)
    job.probes.begin(batches.position + 1, progress, elapsed_s)
    step = job.adapter, job.schedule, job.optimizer, job.task.loss, watched or batches, batches.num_items
    return train_step(*step, progress, job.probes, batches.until_it_fits, batches.reduce)


class Loop:
    """Trains `job`, and keeps `result`, the event log and the run folder up to date."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        log: EventLog,
        result: Result,
        stop: Callable[[], bool],
        prune: Prune | None = None,
        graphs: GraphedSteps | None = None,
    ) -> None:
        self.job, self.folder, self.result, self.stop = job, folder, result, stop
        self._prune, self._graphs = prune, graphs
        self.log = StepLog(log, job.clock, job.device)
        self._evaluator = Evaluator(job, folder, result, self.log, stop)
        self._checkpointing = Checkpointing(folder.checkpoints, self._parts())
        self._schedule_finished = False
        self._is_first_step = True

    def _parts(self) -> dict[str, Stateful]:
        """The parts of a checkpoint, in the order in which a resume restores them."""
        job = self.job
        return {
            "parameters": job.adapter.flat,
            "adapter": job.adapter,
            "optimizer": job.optimizer,
            "schedule": job.schedule,
            "probes": job.probes,
            "clock": job.clock,
            "limits": job.limits,
            "evaluation_due": job.evaluation_due,
            "evaluator": self._evaluator,
            "log": self.log,
            "loop": self,
            "rng": GlobalRng(),  # last: no part may draw random numbers after it
        }

    # ---- the run ---------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None) -> str:
        """Train to the end of the budget. Returns the status: done, stopped, pruned or diverged."""
        clock = self.job.clock
        clock.meter.start()
        clock.start()
        if checkpoint is not None:
            self._checkpointing.restore(checkpoint)
        changed = self.job.plan.keep_within()
        self._announce(resumed=checkpoint is not None)
        for warning in changed:
            self.log.warn(warning)
        with self._checkpointing, phases.told_to(self.log.phase):
            try:
                return self._train()
            except OutOfMemory:  # the step that did not fit changed no parameter
                if clock.steps > self._checkpointing.saved_at:
                    self._save_checkpoint()
                raise

    def _train(self) -> str:
        clock = self.job.clock
        if self.job.run.training.fit_head and clock.steps == 0:
            phases.begin("head", "fitting the head's output layer")
            fit_head(self.job)
        if self.job.adapter.calibration_batches:
            self._calibrate()
        while not self._is_over():
            if clock.steps > 0 and self.job.evaluation_due(clock):
                score = self._evaluator.evaluate_if_it_fits()
                if self.stop():
                    break
                if score is not None and self._is_pruned(score):
                    return "pruned"
            if clock.steps - self._checkpointing.saved_at >= self.job.run.training.checkpoint_steps:
                self._save_checkpoint()
            self._step()
        self.log.fetch()
        return self._stopped() if self.stop() else self._finish()

    def _is_pruned(self, score: Score) -> bool:
        return self._prune is not None and self._prune(self.job.evaluation_due.count, score)

    def _is_over(self) -> bool:
        if self.stop() or self.log.num_non_finite >= MAX_NON_FINITE:
            return True
        clock = self.job.clock
        rows = self.job.batches.rows(clock.steps)
        return not clock.fits(int(self.job.batches.encoded.lengths[rows].sum()))

    def _calibrate(self) -> None:
        adapter, clock, start_s = self.job.adapter, self.job.clock, self.job.clock.elapsed_s
        num_batches = calibrate(self.job, self.stop, self.log.warn)
        if not self.stop():
            self.job.orders.finish_calibration()
            adapter.finish_calibration()
            self.log.importance(adapter, num_batches=num_batches, seconds=clock.elapsed_s - start_s)

    def _step(self) -> None:
        job, clock = self.job, self.job.clock
        began, progress, elapsed_s = time.perf_counter(), clock.progress, clock.elapsed_s
        job.orders.step(clock.steps, progress, elapsed_s)
        batches = MicroBatches(job, clock.steps, f"at step {clock.steps}", self.log.warn)
        with self._watched(batches) as watched:
            signals, rates = take_step(job, batches, progress, elapsed_s, watched, self._graphs)
        self.log.step(progress, rates, signals)
        self.log.rates(job.adapter.flat.blocks, rates)
        clock.count_step(signals.num_tokens, time.perf_counter() - began)
        self.watch_meter()
        self._log_schedule()

    def _watched(self, batches: MicroBatches) -> AbstractContextManager[FirstStep | None]:
        """Reports progress within this process's first step."""
        if not self._is_first_step:
            return nullcontext()
        self._is_first_step = False
        num_tokens = int(self.job.batches.encoded.lengths[batches.rows].sum())
        return FirstStep(self.job, batches, num_tokens, self.log.phase)

    # ---- the end ---------------------------------------------------------------------------

    def _finish(self) -> str:
        if not self._schedule_finished:
            self._schedule_finished = True
            self.job.schedule.finish(self.job.clock.progress)
            self.job.schedule.save(self.folder.path)
            self._log_schedule()
        diverged = self.log.num_non_finite >= MAX_NON_FINITE
        if diverged:
            self.log.warn(f"{MAX_NON_FINITE} steps in a row were not finite: the run is ended")
        elif not self._evaluator.is_current:
            self._evaluator.evaluate()
            if self.stop():
                return self._stopped()
        self._evaluator.save_weights()
        if not diverged and self.job.task.has_test and not self._evaluator.score_test():
            self._save_checkpoint()
            return "stopped"
        return "diverged" if diverged else "done"

    def _stopped(self) -> str:
        self._save_checkpoint()
        self._evaluator.save_weights()
        return "stopped"

    # ---- checkpoints -----------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        self.log.fetch()
        self.log.event("checkpoint")  # before the log's offset is taken, so that a resume keeps the event
        self._checkpointing.save(self.job.clock.steps, self.log.offset())
        self._evaluator.write_result()

    def state_dict(self) -> dict[str, Any]:
        return {"schedule_finished": self._schedule_finished, "dtype": str(self.job.dtype)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._schedule_finished = state["schedule_finished"]

    # ---- the log ---------------------------------------------------------------------------

    def _announce(self, resumed: bool) -> None:
        clock = self.job.clock
        self.log.event(
            "run",
            pid=os.getpid(),
            host=socket.gethostname(),
            config=run_values(self.job.run),
            budget={"kind": clock.budget.kind, "limit": clock.budget.limit},
            steps_per_epoch=len(self.job.batches),
            stand_in=self.result.stand_in,
            energy_method=clock.meter.method,
            memory=self.job.plan.to_json(),
            notes=[*self.job.notes, *self._evaluator.notes],
            resumed=resumed,
        )
        if self.job.task.predicts_tokens:
            first = self.job.task.first_rows(self.job.backbone.tokenizer, self.job.run.model.name, 1)
            self.log.event("example", pieces=first.rows[0])
        if self.job.precision.warning:
            self.log.warn(self.job.precision.warning)
        for warning in self.job.task.warnings():
            self.log.warn(warning)

    def watch_meter(self) -> None:
        """Warn, once, if the energy meter has failed."""
        clock = self.job.clock
        fault = clock.meter.check(clock.elapsed_s)
        if fault is None:
            return
        then = "the joules of this run are not known"
        if clock.budget.kind == "joules":
            then += f"; its budget goes on at {clock.meter.power_w:.0f} W, the mean until now"
        self.log.warn(f"the energy meter is lost ({clock.meter.method}): {fault}. From now on {then}")

    def _log_schedule(self) -> None:
        """Log the schedule's events."""
        told = self.job.schedule.told()
        if told:
            self.log.fetch()  # keeps the log in step order
        for type, fields in told:
            self.log.event(type, **fields)
