"""Score the validation split when due and the test split once; save the last weights and the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from fastpeft.data.predictions import write_predictions
from fastpeft.device_memory import free_memory
from fastpeft.runs.curves import VALIDATION, Budgets, Evaluation, auc_of
from fastpeft.runs.events import number
from fastpeft.runs.store import Result, RunFolder, read_json, recover_folder, replaced_folder, write_json
from fastpeft.tasks.base import Score, Task
from fastpeft.trainer.build import Job
from fastpeft.trainer.evaluation_plan import SHARE, EvaluationPlan
from fastpeft.trainer.rank_orders import SMALLER_EVALUATION
from fastpeft.trainer.step_log import StepLog

BEST_SCORE = "best.json"
"""File beside the best weights with their score."""


class Evaluator:
    """Scores `job`'s weights and saves them. It keeps their entries in `result` up to date, and the clock's estimate of
    what the final evaluation and save will cost."""

    def __init__(self, job: Job, folder: RunFolder, result: Result, log: StepLog, stop: Callable[[], bool]) -> None:
        self._job, self._folder, self._result = job, folder, result
        self._log, self._stop = log, stop
        self._curve: list[Evaluation] = []
        self._evaluated_at = self._sampled_at = -1
        self._last_cost = 0.0, 0.0
        """Seconds and joules of the last evaluation before the end."""
        self._spent = 0.0
        """Spent on evaluations before the end, in the budget's unit."""
        self._save_s = 0.0
        self._use(job.evaluations)

    def _use(self, plan: EvaluationPlan) -> None:
        """Adopt a plan for the evaluations before the end, and draw its sample of the rows."""
        job, self._plan = self._job, plan
        self._sample = None if plan.num_rows is None else job.task.sampled(plan.num_rows, job.backbone, job.device)

    @property
    def is_current(self) -> bool:
        """Whether the current weights have been scored on all rows."""
        return self._evaluated_at == self._job.clock.steps

    @property
    def notes(self) -> list[str]:
        return [] if self._plan.note is None else [self._plan.note]

    # ---- scores ----------------------------------------------------------------------------

    def evaluate_if_it_fits(self) -> Score | None:
        """A periodic evaluation, unless only the final one still fits or the share for periodic ones is spent."""
        clock = self._job.clock
        if clock.fits(0, more_s=clock.final_s) and self._may_spend():
            return self._evaluate(self._sample or self._job.task, is_final=False)
        self._job.evaluation_due.done(clock)
        return None

    def _may_spend(self) -> bool:
        """Whether an evaluation as dear as the last one stays within the share of periodic evaluations."""
        budget = self._job.clock.budget
        if budget.kind not in ("seconds", "joules") or not self._plan.is_auto:
            return True
        return self._spent + self._last_cost[budget.kind == "joules"] <= SHARE * budget.limit

    def evaluate(self) -> Score | None:
        """The final evaluation, on all rows. If earlier ones scored a sample, that sample is scored first, so that the
        best weights are chosen on equal rows. None if interrupted."""
        sample = None if self._sampled_at == self._job.clock.steps else self._sample
        if sample is not None and self._result.best and self._evaluate(sample, is_final=True) is None:
            return None
        return self._evaluate(self._job.task, is_final=True)

    def _evaluate(self, task: Task, is_final: bool) -> Score | None:
        """Score the validation split; save the weights if they are the best so far. None if interrupted."""
        self._log.fetch()
        free_memory()  # cached blocks of training's activations have other sizes than an evaluation's
        job, clock = self._job, self._job.clock
        start_s, start_j = clock.elapsed_s, clock.meter.estimate_j
        num_rows = 0 if task is job.task else task.num_validation
        with job.optimizer.averaged(), job.orders.evaluation(job.adapter.flat.data, job.limits, num_rows):
            measured = task.evaluate(job.adapter.model, job.limits, self._asked, self._shrink)
        if measured is None:
            return None
        is_whole = task is job.task
        value = self._log_score(VALIDATION, measured)
        self._write_predictions("last", VALIDATION, measured, clock.steps)
        if math.isfinite(measured.value) and (is_whole or not is_final):
            self._curve.append(Evaluation(clock.steps, clock.elapsed_s, clock.meter.joules, measured.value))
        self._log.importance(job.adapter)
        evaluation_s = clock.elapsed_s - start_s
        cost = evaluation_s, clock.meter.spent_since(start_j, evaluation_s)
        rows = {} if is_whole else {"num": measured.num_rows}
        self._result.metric = {"name": job.task.metric} | value | rows
        if self._is_best(measured, rows):
            self._result.best = value | {"step": clock.steps, "loss": measured.loss} | rows
            self._write_predictions("best", VALIDATION, measured, clock.steps)
            self.save_weights(best=self._result.best)
        if is_whole:
            self._evaluated_at = clock.steps
        else:
            self._sampled_at = clock.steps
        if not is_final:
            self._spent += cost[clock.budget.kind == "joules"]
            self._expect_final(cost)
        job.evaluation_due.done(clock)
        self.write_result()
        free_memory()
        return measured

    def _is_best(self, measured: Score, rows: dict[str, int]) -> bool:
        """Whether this score is the best of those on the same rows. Ties in the metric are broken by the lower
        validation loss. NaN is worse than any number. A score on all rows replaces a sample's only for the same
        weights."""
        best = self._result.best
        if not best:
            return True
        if ("num" in best) != ("num" in rows):
            return best["step"] == self._job.clock.steps
        earlier = number(best["value"]), number(best.get("loss", math.inf))
        return _rank(measured.value, measured.loss) > _rank(*earlier)

    def _expect_final(self, cost: tuple[float, float]) -> None:
        """Estimate the final cost from the dearer of the last two evaluations, as decoding costs vary with the length
        of the answers. A sample's cost is scaled to all rows, plus one standard error for row costs whose standard
        deviation equals their mean."""
        job, clock, factor = self._job, self._job.clock, 1 + self._job.task.test_cost
        longest_s, longest_j = map(max, zip(self._last_cost, cost))
        self._last_cost = cost
        if self._sample is not None:
            num_rows = self._sample.num_validation
            factor = 1 + factor * job.task.num_validation / num_rows * (1 + num_rows**-0.5)
        clock.final_s = longest_s * factor + 2 * self._save_s
        clock.final_j = longest_j * factor + 2 * self._save_s * clock.meter.power_w

    def score_test(self) -> bool:
        """Score the test split, once, with the best weights. False if interrupted."""
        free_memory()  # memory of the validation split's evaluation
        job, best = self._job, self._result.best
        is_last = best["step"] == self._evaluated_at
        kept = job.adapter.flat.data.clone()
        try:
            if not is_last:
                job.adapter.load(self._folder.weights(job.adapter.saved_as, best=True))
            averaged = job.optimizer.averaged() if is_last else nullcontext()
            with averaged, job.orders.evaluation(job.adapter.flat.data, job.limits, is_test=True):
                measured = job.task.evaluate_test(job.adapter.model, job.limits, self._asked, self._shrink)
        finally:
            job.adapter.flat.data.copy_(kept)
        if measured is None:
            return False
        value = self._log_score("test", measured)
        self._write_predictions("test", "test", measured, best["step"])
        which = {"weights": "best", "step": best["step"]}
        self._result.test = {"name": job.task.metric, "num": measured.num_rows} | value | which
        self.write_result()
        return True

    def _asked(self) -> bool:
        """Whether a stop was requested."""
        orders = self._job.orders
        return orders.asked_to_stop() if orders.in_step.size > 1 else self._stop()

    def _shrink(self, num_rows: int, width: int) -> int:
        limits = self._job.limits
        self._job.orders.refuse_retry("in an evaluation", SMALLER_EVALUATION)
        self._log.warn(limits.halve_evaluation(num_rows, width, f"in the evaluation at step {self._job.clock.steps}"))
        return limits.evaluation

    def _log_score(self, split: str, measured: Score) -> dict[str, Any]:
        """Log a score. Returns its entry in result.json."""
        value: dict[str, Any] = {"value": measured.value}
        value |= {key: found for key in ("more", "groups") if (found := getattr(measured, key))}
        costs = {"decode_s": measured.decode_s, "decode_tokens": measured.decode_tokens}
        self._log.event(
            "eval",
            split=split,
            metric=self._job.task.metric,
            **value,
            **{name: cost for name, cost in costs.items() if cost is not None},
            loss=measured.loss,
            num=measured.num_rows,
            energy_j=self._job.clock.meter.joules,
        )
        if measured.samples:
            self._log.event("samples", split=split, samples=[sample._asdict() for sample in measured.samples])
        return value

    # ---- files -----------------------------------------------------------------------------

    def _write_predictions(self, which: str, split: str, measured: Score, step: int) -> None:
        """Write each row's prediction; `which` is last, best or test. `fastpeft evaluate` pairs runs by these rows."""
        answered = measured.answered()
        if answered is not None:
            path, metric = self._folder.predictions(which), self._job.task.metric
            write_predictions(path, answered, split=split, step=step, metric=metric, value=measured.value)

    def save_weights(self, best: dict[str, Any] | None = None) -> None:
        """Save the last weights; with `best`, the best weights and their score in one folder, which a kill cannot
        separate."""
        began = time.perf_counter()
        adapter = self._job.adapter
        with replaced_folder(self._folder.weights(adapter.saved_as, best is not None)) as temporary:
            with self._job.optimizer.averaged():
                adapter.save(temporary)
            self._job.trained_on.write(temporary)
            self._job.task.keep(temporary)
            if best is not None:
                write_json(temporary / BEST_SCORE, best)
        self._save_s = time.perf_counter() - began

    def write_result(self) -> None:
        """Update `result` from the clock, and write it to result.json."""
        result, clock = self._result, self._job.clock
        result.budget = {"kind": clock.budget.kind, "limit": clock.budget.limit, "spent": clock.spent}
        result.elapsed_s, result.tokens, result.steps = clock.elapsed_s, clock.tokens, clock.steps
        result.energy_j, result.energy_method = clock.meter.joules, clock.meter.method
        result.auc = auc_of(self._curve, Budgets.of(result.budget, clock.elapsed_s, clock.meter.joules))
        self._folder.write_result(result)

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self._result.metric,
            "best": self._result.best,
            "curve": self._curve,
            "evaluated_at": self._evaluated_at,
            "sampled_at": self._sampled_at,
            "last_cost": self._last_cost,
            "spent": self._spent,
            "plan": (self._plan.num_rows, self._plan.note, self._plan.is_auto),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = self._folder.weights(self._job.adapter.saved_as, best=True)
        recover_folder(kept)
        self._result.metric = state["metric"]
        self._result.best = read_json(kept / BEST_SCORE) or state["best"]  # a kill may have come after a new best
        self._curve = [Evaluation(*one) for one in state["curve"]]
        self._evaluated_at, self._sampled_at = state["evaluated_at"], state["sampled_at"]
        self._spent = state["spent"]
        self._use(EvaluationPlan(self._job.evaluation_due.interval, *state["plan"]))
        seconds, joules = state["last_cost"]
        self._last_cost = seconds, joules


def _rank(value: float, loss: float) -> tuple[float, float]:
    return -math.inf if math.isnan(value) else value, -math.inf if math.isnan(loss) else -loss
