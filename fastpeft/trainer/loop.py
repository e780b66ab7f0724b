"""The training loop: calibrate, step, evaluate, save, and stop inside the budget.

calibrate -> [ evaluate when due, checkpoint when due, one step ] until nothing more fits -> finish
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpeft.adapters import to_json
from fastpeft.config import run_values
from fastpeft.data.batches import Batch, collate, micro_batches
from fastpeft.evaluate.score import score
from fastpeft.runs.events import EventLog
from fastpeft.runs.store import Result, RunFolder
from fastpeft.signals import Rates, Signals
from fastpeft.trainer.checkpoint import Checkpoint, rng_state, save_checkpoint, set_rng_state
from fastpeft.trainer.setup import Job
from fastpeft.trainer.step import forward_backward, train_step

MAX_NON_FINITE = 20
CALIBRATION_CAP = 0.02
MIN_CALIBRATION_BATCHES = 8
FETCH_S = 0.5
FETCH_STEPS = 32
_MEASURES = ("loss", "penalty", "penalty_share", "grad_norm", "skipped")


@dataclass
class _Pending:
    """A step whose measurements still lie on the device."""

    step: int
    elapsed_s: float
    progress: float
    lr: float
    num_tokens: int
    signals: Signals


class Loop:
    """Trains `job` and keeps `result`, the event log and the run folder up to date."""

    def __init__(self, job: Job, folder: RunFolder, log: EventLog, result: Result, stop: Callable[[], bool]) -> None:
        self.job, self.folder, self.result, self.stop = job, folder, result, stop
        self._log = log
        self._pending: list[_Pending] = []
        self._fetched_at = time.perf_counter()
        self._num_non_finite = 0
        self._num_skipped = 0
        self._checkpointed_at = 0
        self._evaluated_at = -1
        self._importance_logged = 0
        self._save_s = 0.0

    # ---- the run ---------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None) -> str:
        """Train to the end of the budget. Returns the status: done, stopped or diverged."""
        clock = self.job.clock
        clock.start()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._announce(checkpoint)
        if self.job.adapter.calibration_batches:
            self._calibrate()
        while not self._over():
            due = clock.steps > 0 and self.job.evaluation_due(clock)
            if due and not self._evaluate_if_it_fits():
                break
            if clock.steps - self._checkpointed_at >= self.job.run.training.checkpoint_steps:
                self._save_checkpoint()
            self._step()
        self._fetch()
        if self.stop():
            self._save_checkpoint()
            self._save_weights()
            return "stopped"
        return self._finish()

    def event(self, type: str, **fields: Any) -> None:
        clock = self.job.clock
        self._log.write(type, elapsed_s=clock.elapsed_s, step=clock.steps, **fields)

    def warn(self, message: str) -> None:
        self.event("warning", message=message)

    def _over(self) -> bool:
        if self.stop() or self._num_non_finite >= MAX_NON_FINITE:
            return True
        clock = self.job.clock
        rows = self.job.batches.rows(clock.steps)
        return not clock.fits(int(self.job.batches.encoded.lengths[rows].sum()))

    def _announce(self, checkpoint: Checkpoint | None) -> None:
        clock = self.job.clock
        self.event(
            "run",
            pid=os.getpid(),
            host=socket.gethostname(),
            config=run_values(self.job.run),
            budget={"kind": clock.budget.kind, "limit": clock.budget.limit},
            steps_per_epoch=len(self.job.batches),
            stand_in=self.result.stand_in,
            notes=self.job.notes,
            resumed=checkpoint is not None,
        )

    def _finish(self) -> str:
        diverged = self._num_non_finite >= MAX_NON_FINITE
        if diverged:
            self.warn(f"{MAX_NON_FINITE} steps in a row were not finite: the run is ended")
        elif self._evaluated_at != self.job.clock.steps:
            self._evaluate()
            if self.stop():
                self._save_checkpoint()
                self._save_weights()
                return "stopped"
        self._save_weights()
        return "diverged" if diverged else "done"

    # ---- calibration -----------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Let the adapter see the first batches; neither the RNG nor the data order moves."""
        adapter, clock = self.job.adapter, self.job.clock
        wanted, start_s, start_tokens = adapter.calibration_batches, clock.elapsed_s, clock.tokens
        with _rng_restored(), adapter.calibrating():
            num_batches = 0
            while num_batches < wanted and not self.stop():
                spent = {
                    "seconds": clock.elapsed_s - start_s,
                    "tokens": clock.tokens - start_tokens,
                    "steps": num_batches,
                }[clock.budget.kind]
                capped = spent >= CALIBRATION_CAP * clock.budget.limit
                if capped and num_batches >= MIN_CALIBRATION_BATCHES:
                    self.warn(
                        f"calibration ended after {num_batches} of {wanted} batches: it is capped at "
                        f"{CALIBRATION_CAP:.0%} of the budget"
                    )
                    break
                began = time.perf_counter()
                adapter.before_calibration_batch()
                rows = self.job.batches.rows(num_batches)
                scale = self.job.optimizer.loss_scale
                signals = forward_backward(adapter, self._micro_batches(rows), len(rows), scale)
                measured = adapter.after_calibration_batch(1.0 if scale is None else float(scale))
                clock.count_tokens(signals.num_tokens, time.perf_counter() - began)
                if measured:
                    num_batches += 1
                else:
                    self.job.optimizer.adjust_scale(torch.ones((), device=self.job.device))
        if not self.stop():
            adapter.finish_calibration()
            self._log_importance(num_batches=num_batches, seconds=clock.elapsed_s - start_s)

    def _log_importance(self, **more: Any) -> None:
        """If the importances have changed since they were last logged."""
        adapter = self.job.adapter
        if adapter.importance_version == self._importance_logged:
            return
        self._importance_logged = adapter.importance_version
        importance = adapter.importance()
        assert importance is not None
        self.event("importance", **to_json(importance), **more)

    # ---- one step --------------------------------------------------------------------------

    def _step(self) -> None:
        job, clock = self.job, self.job.clock
        began, progress = time.perf_counter(), clock.progress
        rows = job.batches.rows(clock.steps)
        batches = self._micro_batches(rows)
        signals, rates = train_step(job.adapter, job.schedule, job.optimizer, batches, len(rows), progress)
        self._note(signals, rates, progress)
        clock.count_step(signals.num_tokens, time.perf_counter() - began)
        if job.schedule.note:
            self.warn(job.schedule.note)
            job.schedule.note = None

    def _micro_batches(self, rows: np.ndarray) -> Iterator[Batch]:
        encoded = self.job.batches.encoded
        for part in micro_batches(encoded, rows, self.job.run.training.micro_batch_tokens):
            yield collate(encoded, part, self.job.device)

    def _note(self, signals: Signals, rates: Rates, progress: float) -> None:
        """Queue the step's measurements; fetch the queue now and then, in one transfer."""
        clock = self.job.clock
        pending = _Pending(clock.steps, clock.elapsed_s, progress, rates.lr, signals.num_tokens, signals)
        self._pending.append(pending)
        if len(self._pending) >= FETCH_STEPS or time.perf_counter() - self._fetched_at >= FETCH_S:
            self._fetch()

    def _fetch(self) -> None:
        """Wait for the device, log the queued steps, count those that were not finite."""
        self._fetched_at = time.perf_counter()
        if not self._pending:
            return
        missing = torch.full((), math.nan, device=self.job.device)
        table = torch.stack(
            [
                torch.stack([missing if (v := getattr(p.signals, m)) is None else v for m in _MEASURES])
                for p in self._pending
            ]
        ).tolist()
        for pending, values in zip(self._pending, table):
            measured = dict(zip(_MEASURES, values))
            skipped = bool(measured.pop("skipped"))
            if pending.signals.penalty is None:
                measured["penalty"] = 0.0
                del measured["penalty_share"]
            self._log.write(
                "step",
                elapsed_s=pending.elapsed_s,
                step=pending.step,
                progress=round(pending.progress, 6),
                lr=pending.lr,
                tokens=pending.num_tokens,
                energy_j=None,
                **measured,
            )
            self._num_non_finite = self._num_non_finite + 1 if skipped else 0
            if skipped:
                self._num_skipped += 1
                self._log.write(
                    "warning",
                    elapsed_s=pending.elapsed_s,
                    step=pending.step,
                    message=f"step {pending.step}: loss or gradient is not finite, so nothing was updated "
                    f"({self._num_non_finite} in a row, {self._num_skipped} in all)",
                )
        self._pending.clear()

    # ---- evaluation, saving ----------------------------------------------------------------

    def _evaluate_if_it_fits(self) -> bool:
        """A periodic evaluation, unless only the final one still fits. False if it was interrupted."""
        clock = self.job.clock
        if clock.fits(0, more_s=clock.final_s):
            self._evaluate()
        else:
            self.job.evaluation_due.done(clock)
        return not self.stop()

    def _evaluate(self) -> None:
        """Score the validation split; keep the adapter if it is the best so far."""
        self._fetch()
        job, clock = self.job, self.job.clock
        start_s = clock.elapsed_s
        batch_tokens = job.run.evaluation.batch_tokens
        measured = score(job.adapter.model, job.validation, batch_tokens, job.device, self.stop)
        if measured is None:
            return
        self._evaluated_at = clock.steps
        self.event(
            "eval",
            split="validation",
            metric=job.task.metric,
            value=measured.value,
            loss=measured.loss,
            num=measured.num_rows,
        )
        self._log_importance()
        evaluation_s = clock.elapsed_s - start_s
        self.result.metric = {"name": job.task.metric, "value": measured.value}
        if measured.value > self.result.best.get("value", -1.0):
            self.result.best = {"value": measured.value, "step": clock.steps}
            self._save_weights(best=True)
        clock.final_s = evaluation_s + 2 * self._save_s
        job.evaluation_due.done(clock)
        self._write_result()

    def _save_weights(self, best: bool = False) -> None:
        """Through a temporary folder, so that what is there is always whole."""
        began = time.perf_counter()
        target = self.folder.weights(self.job.adapter.saved_as, best)
        temporary = target.with_name(f".{target.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self.job.adapter.save(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        self._save_s = time.perf_counter() - began

    def _write_result(self) -> None:
        clock = self.job.clock
        self.result.budget = {
            "kind": clock.budget.kind,
            "limit": clock.budget.limit,
            "spent": clock.spent,
        }
        self.result.elapsed_s, self.result.tokens = clock.elapsed_s, clock.tokens
        self.result.steps = clock.steps
        self.folder.write_result(self.result)

    def _save_checkpoint(self) -> None:
        self._fetch()
        job, clock = self.job, self.job.clock
        self.event("checkpoint")  # before its place in the log is taken, so that a resume keeps it
        rng_tensors, rng_values = rng_state()
        tensors = {"flat": job.adapter.flat.data} | rng_tensors
        tensors |= {f"optimizer.{k}": v for k, v in job.optimizer.state().items()}
        tensors |= {f"adapter.{k}": v for k, v in job.adapter.state().items()}
        values = {
            "steps": clock.steps,
            "elapsed_s": clock.elapsed_s,
            "tokens": clock.tokens,
            "final_s": clock.final_s,
            "schedule": job.schedule.state(),
            "evaluations": job.evaluation_due.count,
            "evaluated_at": self._evaluated_at,
            "metric": self.result.metric,
            "best": self.result.best,
            "dtype": str(job.dtype),
            "non_finite": [self._num_non_finite, self._num_skipped],
            "events_bytes": self._log.offset(),
            "rng": rng_values,
        }
        save_checkpoint(self.folder.checkpoints, clock.steps, Checkpoint(tensors, values))
        self._checkpointed_at = clock.steps
        self._write_result()

    def _restore(self, checkpoint: Checkpoint) -> None:
        job, clock = self.job, self.job.clock
        tensors, values = checkpoint.tensors, checkpoint.values

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        job.adapter.flat.data.copy_(tensors["flat"])
        job.optimizer.load_state(part("optimizer."))
        job.adapter.load_state(part("adapter."))
        job.schedule.load_state(values["schedule"])
        clock.steps, clock.tokens, clock.final_s = (
            values["steps"],
            values["tokens"],
            values["final_s"],
        )
        clock.start(values["elapsed_s"])
        job.evaluation_due.count = values["evaluations"]
        self._evaluated_at, self._checkpointed_at = values["evaluated_at"], values["steps"]
        self.result.metric, self.result.best = values["metric"], values["best"]
        self._num_non_finite, self._num_skipped = values["non_finite"]
        set_rng_state(tensors, values["rng"])
        if values["dtype"] != str(job.dtype):
            self.warn(f"the run began in {values['dtype']} and goes on in {job.dtype}: not the same bits")


@contextmanager
def _rng_restored() -> Iterator[None]:
    tensors, values = rng_state()
    try:
        yield
    finally:
        set_rng_state(tensors, values)
