"""FoT, Forecast-On-Trajectory: the learning rate follows a forecast of the loss.

A power law fitted to the loss so far forecasts how much the loss can still decrease before the budget ends. The
schedule bounds the learning rate so that the predicted decrease of one step is that amount divided by the steps left.
The phase gate compares the tokens of answers and prompts; per-matrix learning rates use the answers' gradient.

Shape suffixes: K adapted matrices, U units (the K matrices, then other parameters).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastpeft.config.schedules import FotConfig, ScheduleConfig
from fastpeft.schedules.forecast import Divergences, Forecaster
from fastpeft.schedules.fot_signals import KEEP, BlockScales, Evidence, PhaseGate, statistics
from fastpeft.schedules.running import RunningFloat
from fastpeft.schedules.schedule import WarmedSchedule
from fastpeft.signals import Blocks, BlockSums, Measured, Need, Rates

GROWTH, FALL = 1.1, 0.9
"""Largest relative change of the learning rate at a refit. Decreases are limited with `calibrate` only."""
LEAST, MOST = 1 / 100, 30.0
"""Limits of the learning rate, as multiples of the initial one."""
NOTHING_LEFT = 1e-9
"""A forecast decrease of the loss up to this counts as none."""
ALIGNMENT_STEPS, ALIGNMENT_GROWTH = 16, 1.5


class Fot(WarmedSchedule):
    """The learning rate starts at `peak_lr` and then follows the forecast; see the module."""

    own: FotConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        window = None if self.own.window == "auto" else self.own.window
        self.forecaster = Forecaster(window, self.own.floor)
        self.divergences = Divergences()
        self.gate = PhaseGate()
        self.scales = BlockScales(blocks) if self.own.block_scaling and blocks is not None else None
        self._num_elements_U = np.array(blocks.num_elements if blocks is not None else (), dtype=np.float64)
        self.descent = RunningFloat(KEEP)
        """D: measured decrease of the loss per unit of learning rate, along the last direction, at the step's end."""
        self.lr = peak_lr
        self.at_bound = False
        self.evidence = Evidence()
        """Readings of `descent` since the last change of the learning rate."""
        self._lr_before: float | None = None
        self._predicted, self._num_predicted = 0.0, 0
        self._spent = [0.0, 0.0]
        self._counts = dict.fromkeys(("steps", "at_bound", "at_rail", "skipped", "held"), 0)

    @property
    def needs(self) -> frozenset[Need]:
        needs = {Need.LOSS, Need.GRAD_SQ, Need.SECOND, Need.DESCENT}
        if self.own.gate:
            needs |= {Need.TOKENS, Need.PROMPT}
        if self.own.block_scaling:
            needs.add(Need.ANSWER_GRADIENT)
        return frozenset(needs)

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        warm = self.warmup_factor(progress)
        if measured is not None:
            self._watch(measured, progress)
        anneal = self.own.anneal
        falling = min(1.0, max(0.0, 1 - progress) / anneal) if anneal else 1.0
        return Rates(self.lr * warm * falling * self.gate.factor, self.scales.multiplier_K if self.scales else None)

    # ---- what a step has measured ------------------------------------------------------------

    def _watch(self, measured: Measured, progress: float) -> None:
        loss = math.nan if measured.skipped else measured.loss
        self._counts["steps"] += 1
        self._counts["at_bound"] += self.at_bound
        self._counts["at_rail"] += self.at_rail
        self.divergences.add(loss)
        if measured.skipped:
            self._counts["skipped"] += 1
        else:
            self._add_sums(measured)
            if self.own.gate:
                self.gate.add(measured)
            if self.scales is not None:
                self.scales.add(measured.answer_grad_sq_K)
        self._lr_before = measured.lr
        ended = self.forecaster.add(measured.step, measured.progress, progress, loss)
        if self.own.alignment and measured.step % ALIGNMENT_STEPS == 0:
            self._align(progress)
        if ended:
            self._refit(progress)

    def _add_sums(self, measured: Measured) -> None:
        sums = measured.blocks
        found = None if sums is None else statistics(sums, self._num_elements_U)
        descent = math.nan if sums is None or found is None else self._measured_descent(sums)
        if found is None or not math.isfinite(descent):
            self._counts["skipped"] += 1
            return
        self._predicted, self._num_predicted = self._predicted + found.descent, self._num_predicted + 1
        if self._lr_before is None:  # there was no previous step
            return
        self.descent.update(descent)
        if self.warmup.ended_at is not None:  # during warmup the learning rate changes in every step
            self.evidence.add(descent)
        self._spent[0] += self._lr_before * (self.descent.value or 0.0)
        self._spent[1] += self._lr_before * found.descent

    def _measured_descent(self, sums: BlockSums) -> float:
        """<g(t + 1), u_t> over all trained parameters; u_t includes the multipliers of the matrices."""
        descent_U = sums.descent_U
        multiplier_K = self.scales.multiplier_K if self.scales else None
        if multiplier_K is None:
            return float(descent_U.sum())
        num = len(multiplier_K)
        return float(descent_U[:num] @ multiplier_K + descent_U[num:].sum())

    # ---- the rate ----------------------------------------------------------------------------

    @property
    def at_rail(self) -> bool:
        return self.lr in (LEAST * self.peak_lr, MOST * self.peak_lr)

    def _set(self, lr: float) -> None:
        self.lr = min(max(lr, LEAST * self.peak_lr), MOST * self.peak_lr)

    def _align(self, progress: float) -> None:
        """Raise the learning rate while D = <g(t + 1), u_t> is above its target, else lower it; ignores the bound.

        A step of learning rate lr lowers the loss by s = lr D + lr^2 u^T H u / 2, and D = 0 at the minimum along u. The
        forecast gives s, so that `overshoot` x sets the target D = -x s / lr: the step is then longer by the share
        x / (x + 2) than the distance to the minimum. A step of twice that distance would not lower the loss at all.
        With `confidence` the learning rate changes only when D differs from its target by that many standard errors.
        """
        annealing = self.own.anneal > 0 and progress >= 1 - self.own.anneal
        if self.warmup.ended_at is None or annealing or self.descent.value is None:
            return
        target = 0.0
        if self.own.overshoot and self.forecaster.law is not None:
            fall = self.forecaster.law.fall(self.forecaster.now)
            target = -self.own.overshoot * fall / (self.lr * self.gate.factor)
        if self.own.confidence:
            errors = self.evidence.errors_from(target)
            if abs(errors) >= self.own.confidence:
                self._set(self.lr * (ALIGNMENT_GROWTH if errors > 0 else 1 / ALIGNMENT_GROWTH))
                self.evidence = Evidence()
            return
        self._set(self.lr * (ALIGNMENT_GROWTH if self.descent.value > target else FALL))

    def _refit(self, progress: float) -> None:
        """Called at the end of a block: move the learning rate and report the forecast."""
        if self.forecaster.ready:
            self.gate.decide()
            if self.scales is not None:
                self.scales.decide()
            bound = None if self.own.alignment else self._move()
            self.tell("forecast", **self.forecaster.forecast(), progress=progress)
            self.tell("schedule", **self._figures(bound))
        self._predicted, self._num_predicted = 0.0, 0
        self._spent = [0.0, 0.0]

    def _move(self) -> float | None:
        """lr <- min(GROWTH lr, bound), with `calibrate` at least FALL lr. Returns the bound; None if there is none."""
        self.at_bound = False
        left, horizon = self.forecaster.improvable(), self.forecaster.horizon
        if not left > NOTHING_LEFT:
            self._counts["held"] += 1
            return None
        descent = self.descent.value if self.own.calibrate else self._predicted_descent()
        if descent is None:
            self._counts["skipped"] += 1
            return None
        if descent <= 0:  # only possible if measured: the last steps were too long
            self._set(self.lr * FALL)
            return None
        assert horizon is not None, "the forecast is ready"
        bound = left / max(1.0, horizon - self.forecaster.now) / descent
        self.at_bound = bound <= GROWTH * self.lr
        least = FALL * self.lr if self.own.calibrate else 0.0
        self._set(max(least, min(GROWTH * self.lr, bound)))
        return bound

    def _predicted_descent(self) -> float | None:
        return self._predicted / self._num_predicted if self._num_predicted else None

    def _figures(self, bound: float | None) -> dict[str, Any]:
        law, (measured, predicted) = self.forecaster.law, self._spent
        assert law is not None
        return {
            "rate": self.lr,
            "bound": bound,
            "at_bound": self.at_bound,
            "at_rail": self.at_rail,
            "improvable": self.forecaster.improvable(),
            "predicted_descent": self._predicted_descent(),
            "descent": self.descent.value,
            "kappa": measured / predicted if predicted > 0 else None,
            "gate": self.gate.factor,
            "exponent": law.exponent,
            "offset": law.offset,
            "log_scale": law.log_scale,
            "floor": law.floor,
        }

    def finish(self, progress: float) -> None:
        counts = self._counts
        steps = max(1, counts["steps"])
        self.tell(
            "schedule",
            finished_at=progress,
            forecast_error=self.forecaster.errors(),
            anneal=self.own.anneal,
            at_bound_share=counts["at_bound"] / steps,
            at_rail_share=counts["at_rail"] / steps,
            divergences=self.divergences.count,
            skipped_statistics=counts["skipped"],
            held_refits=counts["held"],
        )

    # ---- resume ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "warmup": super().state_dict(),
            "forecaster": self.forecaster.state(),
            "divergences": self.divergences.state(),
            "gate": self.gate.state(),
            "scales": None if self.scales is None else self.scales.state(),
            "descent": self.descent.state(),
            "lr": self.lr,
            "at_bound": self.at_bound,
            "evidence": self.evidence.state(),
            "block": [self._lr_before, self._predicted, self._num_predicted, list(self._spent)],
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["warmup"])
        self.forecaster.load_state(state["forecaster"])
        self.divergences.load_state(state["divergences"])
        self.gate.load_state(state["gate"])
        if self.scales is not None:
            self.scales.load_state(state["scales"])
        self.descent.load_state(state["descent"])
        self.lr, self.at_bound = state["lr"], state["at_bound"]
        self.evidence.load_state(state["evidence"])
        self._lr_before, self._predicted, self._num_predicted, spent = state["block"]
        self._spent, self._counts = list(spent), dict(state["counts"])
