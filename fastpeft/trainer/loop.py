"""The training loop: calibrate, step, evaluate, save, and stop inside the budget.

calibrate -> [ evaluate when due, checkpoint when due, one step ] until nothing more fits -> finish
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from fastpeft.adapters import to_json
from fastpeft.config import run_values
from fastpeft.device_memory import OutOfMemory, TokenLimits
from fastpeft.runs.curves import VALIDATION, Budgets, Evaluation, auc_of
from fastpeft.runs.events import EventLog, number
from fastpeft.runs.store import Result, RunFolder, read_json, recover_folder, replaced_folder, write_json
from fastpeft.signals import Rates
from fastpeft.tasks.base import Score
from fastpeft.trainer.build import Job
from fastpeft.trainer.calibrate import calibrate
from fastpeft.trainer.checkpoint import Checkpoint, rng_state, save_checkpoint, set_rng_state
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.step import train_step
from fastpeft.trainer.step_log import StepLog

MAX_NON_FINITE = 20
RATES_STEPS = 32
"""Steps between two events of the rates of each matrix."""
BEST = "best.json"


class Loop:
    """Trains `job` and keeps `result`, the event log and the run folder up to date."""

    def __init__(self, job: Job, folder: RunFolder, log: EventLog, result: Result, stop: Callable[[], bool]) -> None:
        self.job, self.folder, self.result, self.stop = job, folder, result, stop
        self._log = log
        self._steps = StepLog(log, job.device)
        self._micro_batches = MicroBatches(job, self.warn)
        self._checkpointed_at = 0
        self._evaluated_at = -1
        self._importance_logged = 0
        self._rates_logged_at = -RATES_STEPS
        self._schedule_finished = False
        self._save_s = 0.0
        self._last_evaluation = 0.0, 0.0
        """Seconds and joules."""
        self._curve: list[Evaluation] = []

    # ---- the run ---------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None) -> str:
        """Train to the end of the budget. Returns the status: done, stopped or diverged."""
        clock = self.job.clock
        clock.meter.start()
        clock.start()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._announce(checkpoint)
        try:
            return self._train()
        except OutOfMemory:  # nothing of the step that did not fit has been taken
            if clock.steps > self._checkpointed_at:
                self._save_checkpoint()
            raise

    def _train(self) -> str:
        clock = self.job.clock
        if self.job.adapter.calibration_batches:
            self._calibrate()
        while not self._over():
            due = clock.steps > 0 and self.job.evaluation_due(clock)
            if due and not self._evaluate_if_it_fits():
                break
            if clock.steps - self._checkpointed_at >= self.job.run.training.checkpoint_steps:
                self._save_checkpoint()
            self._step()
        self._steps.fetch()
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

    def watch_meter(self) -> None:
        """Say it once when the energy meter is lost."""
        clock = self.job.clock
        fault = clock.meter.check(clock.elapsed_s)
        if fault is None:
            return
        then = "the joules of this run are not known"
        if clock.budget.kind == "joules":
            then += f"; its budget goes on at {clock.meter.power_w:.0f} W, the mean until now"
        self.warn(f"the energy meter is lost ({clock.meter.method}): {fault}. From now on {then}")

    def _over(self) -> bool:
        if self.stop() or self._steps.num_non_finite >= MAX_NON_FINITE:
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
            energy_method=clock.meter.method,
            notes=self.job.notes,
            resumed=checkpoint is not None,
        )

    def _finish(self) -> str:
        if not self._schedule_finished:
            self._schedule_finished = True
            self.job.schedule.finish(self.job.clock.progress)
            self.job.schedule.save(self.folder.path)
            self._pass_on()
        diverged = self._steps.num_non_finite >= MAX_NON_FINITE
        if diverged:
            self.warn(f"{MAX_NON_FINITE} steps in a row were not finite: the run is ended")
        elif self._evaluated_at != self.job.clock.steps:
            self._evaluate()
            if self.stop():
                self._save_checkpoint()
                self._save_weights()
                return "stopped"
        self._save_weights()
        if not diverged and self.job.task.has_test and not self._score_test():
            self._save_checkpoint()
            return "stopped"
        return "diverged" if diverged else "done"

    # ---- calibration -----------------------------------------------------------------------

    def _calibrate(self) -> None:
        adapter, clock, start_s = self.job.adapter, self.job.clock, self.job.clock.elapsed_s
        num_batches = calibrate(self.job, self._micro_batches, self.stop, self.warn)
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
        job.probes.begin(clock.steps + 1, progress, clock.elapsed_s)
        signals, rates = self._micro_batches.fit(
            lambda: train_step(
                job.adapter,
                job.schedule,
                job.optimizer,
                job.task.loss,
                self._micro_batches(rows),
                job.task.num_items(rows),
                progress,
                job.probes,
            ),
            len(rows),
            f"at step {clock.steps}",
        )
        self._steps.note(clock, progress, rates, signals)
        self._log_rates(rates)
        clock.count_step(signals.num_tokens, time.perf_counter() - began)
        self.watch_meter()
        self._pass_on()

    def _log_rates(self, rates: Rates) -> None:
        """Now and then, where matrices have rates of their own."""
        clock, blocks = self.job.clock, self.job.adapter.flat.blocks
        if rates.multiplier_K is None or clock.steps - self._rates_logged_at < RATES_STEPS:
            return
        self._rates_logged_at = clock.steps
        self._steps.fetch()  # the log stays in the steps' order
        names = {"names": blocks.names, "layer": blocks.layers, "projection": blocks.projections}
        self.event("rates", **names, multipliers=[float(m) for m in rates.multiplier_K])

    def _pass_on(self) -> None:
        """Log what the schedule has to tell."""
        told = self.job.schedule.told()
        if told:
            self._steps.fetch()  # the log stays in the steps' order
        for type, fields in told:
            self.event(type, **fields)

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
        self._steps.fetch()
        job, clock = self.job, self.job.clock
        start_s, start_j = clock.elapsed_s, clock.meter.estimate_j
        with job.optimizer.averaged():
            measured = job.task.evaluate(job.adapter.model, job.limits, self.stop, self._shrink)
        if measured is None:
            return
        self._evaluated_at = clock.steps
        value = self._log_score(VALIDATION, measured)
        self._curve.append(Evaluation(clock.steps, clock.elapsed_s, clock.meter.joules, measured.value))
        self._log_importance()
        evaluation_s = clock.elapsed_s - start_s
        evaluation_j = clock.meter.spent_since(start_j, evaluation_s)
        self.result.metric = {"name": job.task.metric} | value
        if self._is_best(measured):
            self.result.best = value | {"step": clock.steps, "loss": measured.loss}
            self._save_weights(best=self.result.best)
        # The larger of the last two: what decoding costs goes up and down with how many answers end.
        longest_s, longest_j = map(max, zip(self._last_evaluation, (evaluation_s, evaluation_j)))
        self._last_evaluation = evaluation_s, evaluation_j
        clock.final_s = longest_s * (1 + job.task.test_cost) + 2 * self._save_s
        clock.final_j = longest_j * (1 + job.task.test_cost) + 2 * self._save_s * clock.meter.power_w
        job.evaluation_due.done(clock)
        self._write_result()

    def _is_best(self, measured: Score) -> bool:
        """Of two with one score that of the lower loss is better."""
        best = self.result.best
        if not best or measured.value != best["value"]:
            return measured.value > best.get("value", -1.0)
        return measured.loss < number(best.get("loss", math.inf))

    def _score_test(self) -> bool:
        """Score the test split, once, with the best weights. False if it was interrupted."""
        job, best = self.job, self.result.best
        is_last = best["step"] == self._evaluated_at
        kept = job.adapter.flat.data.clone()
        try:
            if not is_last:
                job.adapter.load(self.folder.weights(job.adapter.saved_as, best=True))
            with job.optimizer.averaged() if is_last else nullcontext():
                measured = job.task.evaluate_test(job.adapter.model, job.limits, self.stop, self._shrink)
        finally:
            job.adapter.flat.data.copy_(kept)
        if measured is None:
            return False
        value = self._log_score("test", measured)
        which = {"weights": "best", "step": best["step"]}
        self.result.test = {"name": job.task.metric, "num": measured.num_rows} | value | which
        self._write_result()
        return True

    def _shrink(self, num_rows: int, width: int) -> int:
        limits = self.job.limits
        self.warn(limits.halve_evaluation(num_rows, width, f"in the evaluation at step {self.job.clock.steps}"))
        return limits.evaluation

    def _log_score(self, split: str, measured: Score) -> dict[str, Any]:
        """Returns what results hold of it."""
        value: dict[str, Any] = {"value": measured.value}
        value |= {key: found for key in ("more", "groups") if (found := getattr(measured, key))}
        costs = {"decode_s": measured.decode_s, "decode_tokens": measured.decode_tokens}
        self.event(
            "eval",
            split=split,
            metric=self.job.task.metric,
            **value,
            **{name: cost for name, cost in costs.items() if cost is not None},
            loss=measured.loss,
            num=measured.num_rows,
            energy_j=self.job.clock.meter.joules,
        )
        return value

    def _save_weights(self, best: dict[str, Any] | None = None) -> None:
        """The last weights, or those whose score `best` holds: it lies beside them, so that a kill cannot part them."""
        began = time.perf_counter()
        adapter = self.job.adapter
        with replaced_folder(self.folder.weights(adapter.saved_as, best is not None)) as temporary:
            with self.job.optimizer.averaged():
                adapter.save(temporary)
            if best is not None:
                write_json(temporary / BEST, best)
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
        self.result.energy_j, self.result.energy_method = clock.meter.joules, clock.meter.method
        self.result.auc = auc_of(self._curve, Budgets.of(self.result.budget, clock.elapsed_s, clock.meter.joules))
        self.folder.write_result(self.result)

    def _save_checkpoint(self) -> None:
        self._steps.fetch()
        job, clock = self.job, self.job.clock
        self.event("checkpoint")  # before its place in the log is taken, so that a resume keeps it
        rng_tensors, rng_values = rng_state()
        tensors = {"flat": job.adapter.flat.data} | rng_tensors
        tensors |= {f"optimizer.{k}": v for k, v in job.optimizer.state().items()}
        tensors |= {f"adapter.{k}": v for k, v in job.adapter.state().items()}
        probe_tensors, probe_values = job.probes.state()
        tensors |= {f"probes.{k}": v for k, v in probe_tensors.items()}
        values = {
            "steps": clock.steps,
            "elapsed_s": clock.elapsed_s,
            "tokens": clock.tokens,
            "seconds_per_token": clock.seconds_per_token,
            "final_s": clock.final_s,
            "final_j": clock.final_j,
            "energy": clock.meter.state(),
            "limits": dataclasses.asdict(job.limits),
            "schedule": job.schedule.state(),
            "schedule_finished": self._schedule_finished,
            "probes": probe_values,
            "rates_logged_at": self._rates_logged_at,
            "evaluations": job.evaluation_due.count,
            "evaluated_at": self._evaluated_at,
            "metric": self.result.metric,
            "best": self.result.best,
            "curve": self._curve,
            "last_evaluation": self._last_evaluation,
            "dtype": str(job.dtype),
            "non_finite": [self._steps.num_non_finite, self._steps.num_skipped],
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
        job.probes.load_state(part("probes."), values["probes"])
        self._schedule_finished, self._rates_logged_at = values["schedule_finished"], values["rates_logged_at"]
        clock.steps, clock.tokens = values["steps"], values["tokens"]
        clock.seconds_per_token = values["seconds_per_token"]
        clock.final_s, clock.final_j = values["final_s"], values["final_j"]
        clock.meter.load_state(values["energy"])
        clock.start(values["elapsed_s"])
        job.limits = TokenLimits(**values["limits"])
        job.evaluation_due.count = values["evaluations"]
        self._evaluated_at, self._checkpointed_at = values["evaluated_at"], values["steps"]
        self._last_evaluation = tuple(values["last_evaluation"])
        self._curve = [Evaluation(*one) for one in values["curve"]]
        kept = self.folder.weights(job.adapter.saved_as, best=True)
        recover_folder(kept)
        self.result.metric = values["metric"]
        self.result.best = read_json(kept / BEST) or values["best"]  # a kill may have come after a new best
        self._steps.num_non_finite, self._steps.num_skipped = values["non_finite"]
        set_rng_state(tensors, values["rng"])
        if values["dtype"] != str(job.dtype):
            self.warn(f"the run began in {values['dtype']} and goes on in {job.dtype}: not the same bits")
