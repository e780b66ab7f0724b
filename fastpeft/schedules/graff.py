"""GRAFF, graph-recurrent allocation of fine-tuning funds: a planner network sets learning rates and trains online.

Its inputs are the curvature of each block, the logit-lens entropy after the first adapted layer and the remaining
budget. Its outputs are the learning rate and a multiplier for every block. It is trained by the hypergradient
(arXiv:1703.04782), the derivative of the next batch's loss by the last step's learning rates.

Departures from the paper: the guard uses lagged curvature (`guard: paper` uses the plain secant, which shares its noise
with the step and reaches the limit in pure noise); a step changes log eta by at most SLEW; in every step the decoder
weights of log eta are projected so that it stays within its limits.

Shape suffixes: K blocks, U units (the blocks, then the other parameters), F features, D state, P weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.config.schedules import GraffConfig, ScheduleConfig
from fastpeft.errors import UserError
from fastpeft.schedules import planner
from fastpeft.schedules.planner import ETA, STATE, Adam, Tape
from fastpeft.schedules.running_curvature import RunningCurvature
from fastpeft.schedules.schedule import WarmedSchedule
from fastpeft.signals import Blocks, Measured, Need, Rates

LR_MIN, LR_MAX = 1e-6, 1e-2
STABLE = 1.9
"""Largest product of learning rate and curvature."""
SLEW = 0.01
"""Largest change of log eta in a step."""
MIN_ELAPSED_S = 1.0
LOG_STEPS = 32
LARGEST = 1e6
"""Larger features count as not finite."""


class Standardiser:
    """Running mean and variance of one feature over blocks and steps, with a window of 100 readings."""

    WINDOW = 100

    def __init__(self) -> None:
        self.num_readings = 0
        self.num_replaced = 0
        """Number of readings that were not finite and were replaced by the running mean."""
        self._mean, self._variance = 0.0, 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Standardised values; 0, the running mean, for values that are not finite."""
        good = np.isfinite(values) & (np.abs(values) <= LARGEST)
        self.num_replaced += int((~good).sum())
        if good.any():
            self.num_readings += 1
            share = max(1 / self.num_readings, 1 / self.WINDOW)
            kept = values[good]
            mean = float(kept.sum()) / len(kept)
            change, apart = mean - self._mean, kept - mean
            self._mean += share * change
            variance = float(apart @ apart) / len(kept)
            self._variance = (1 - share) * (self._variance + share * change**2) + share * variance
        scale = math.sqrt(self._variance) + 1e-8
        return np.clip((np.where(good, values, self._mean) - self._mean) / scale, -10, 10)

    def state(self) -> list[float]:
        return [self.num_readings, self.num_replaced, self._mean, self._variance]

    def load_state(self, state: list[float]) -> None:
        self.num_readings, self.num_replaced, self._mean, self._variance = state


@dataclass
class Emission:
    """Learning rates of a step whose effect on the loss has not been measured yet."""

    step: int
    lr: float
    tape: Tape
    descent_U: np.ndarray | None = None
    """<g(step + 1), u(step)>; kept once measured, for the trace of the following step."""


class Graff(WarmedSchedule):
    own: GraffConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        """
        Raises:
            UserError: there is no adapted matrix; the peak learning rate is outside of its limits; the warm start's
                file is missing or not a planner's.
        """
        super().__init__(config, peak_lr, blocks, **more)
        if blocks is None or len(blocks) == 0:
            raise UserError("schedule.name: graff plans rates for adapted matrices, and there are none here")
        if not LR_MIN <= peak_lr <= LR_MAX:
            raise UserError(f"training.learning_rate: graff keeps it in [{LR_MIN:g}, {LR_MAX:g}]; it is {peak_lr:g}")
        num_units = len(blocks.num_elements)
        self._ratio_U = np.array(blocks.rate_ratios or (1.0,) * num_units)
        self._adjacency_KK = planner.adjacency(blocks) if self.own.graph else None
        self._weights_P = self._first_weights()
        self._adam = Adam(planner.NUM_WEIGHTS, self.own.outer_learning_rate, self.own.outer_max_norm)
        self._h_KD = np.zeros((len(blocks), STATE))
        self._curvature = RunningCurvature(0.0 if self.own.curvature == "hvp" else self.own.curvature_decay)
        self._scaled = {"curvature": Standardiser(), "entropy": Standardiser()}
        self._pending: list[Emission] = []
        self._step = 0
        self._log_eta: float | None = None
        self._gradient_norm: float | None = None
        self._num_guarded, self._num_dropped = 0, 0

    def _first_weights(self) -> np.ndarray:
        if self.own.warm_start is None:
            return planner.initial_weights()
        shipped = self.own.warm_start == "shipped"
        if shipped and not planner.SHIPPED.is_file():
            raise UserError("schedule.graff.warm_start: shipped: this installation comes with none; give a file's path")
        return planner.load_weights(planner.SHIPPED if shipped else self.own.warm_start)

    @property
    def needs(self) -> frozenset[Need]:
        graff, needs = self.own, {Need.LENS}
        if graff.online:
            needs.add(Need.DESCENT)
        if graff.curvature == "hvp":
            return frozenset(needs | {Need.PRODUCT})
        return frozenset(needs | {Need.PLAIN_SECANT if graff.guard == "paper" else Need.SECANT})

    def save(self, folder: Path) -> None:
        """Write the planner's weights, planner.safetensors, for the `warm_start` of another run."""
        planner.save_weights(folder / planner.SHIPPED.name, self._weights_P)

    # ---- one step --------------------------------------------------------------------------

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        self._step = self._step + 1 if measured is None else measured.step + 1
        with np.errstate(all="ignore"):  # non-finite values are handled where they matter
            if measured is not None:
                self._learn(measured)
            features_KF = self._features(measured, progress)
            tape = self._tape(self._weights_P, self._h_KD, features_KF)
        upper = self._upper(tape)
        if self.own.online:
            self._project(tape, upper)
        self._h_KD, self._log_eta = tape.out_KD, self._next_log_eta(tape, upper)
        factor = self.warmup_factor(progress) * self._annealed(progress)
        lr = min(max(math.exp(self._log_eta) * factor, LR_MIN), LR_MAX)
        if self.own.online:
            self._pending = [*self._pending[-2:], Emission(self._step, lr, tape)]
        self._report(tape)
        return Rates(lr, tape.multiplier_K)

    def _tape(self, weights_P: np.ndarray, h_KD: np.ndarray, features_KF: np.ndarray) -> Tape:
        centred = self.own.multipliers == "centred"
        return Tape(weights_P, self._adjacency_KK, h_KD, features_KF, self.own.layers, centred)

    def _features(self, measured: Measured | None, progress: float) -> np.ndarray:
        """(K, F) curvature, entropy, remaining budget. Features without a measurement are 0, their running mean."""
        features_KF = np.zeros_like(self._h_KD[:, : planner.NUM_FEATURES])
        curvature_U = self._curvature.per_unit()
        if curvature_U is not None:
            features_KF[:, 0] = self._scaled["curvature"](np.arcsinh(curvature_U[: len(features_KF)]))
        if measured is not None and not measured.skipped and measured.lens_entropy is not None:
            features_KF[:, 1] = self._scaled["entropy"](np.array([measured.lens_entropy]))
        if self.own.budget_feature:
            features_KF[:, 2] = min(max(1 - progress, 0.0), 1.0)
        return features_KF

    def _annealed(self, progress: float) -> float:
        return min(1.0, max(0.0, 1 - progress) / self.own.anneal) if self.own.anneal else 1.0

    # ---- guard and rails -------------------------------------------------------------------

    def curvature_max(self, multiplier_K: np.ndarray) -> float:
        """max m_i lambda_i over the blocks; 0 if no curvature is known."""
        curvature_U = self._curvature.per_unit()
        if curvature_U is None:
            return 0.0
        return float(np.nan_to_num(curvature_U[: len(multiplier_K)] * multiplier_K, nan=0.0).max())

    def _upper(self, tape: Tape) -> float:
        """Largest log eta that LR_MAX and the guard allow."""
        highest, curvature = math.log(LR_MAX), self.curvature_max(tape.multiplier_K)
        if self.own.guard == "off" or curvature <= 0:
            return highest
        return max(math.log(LR_MIN), min(highest, math.log(STABLE / curvature)))

    def _project(self, tape: Tape, upper: float) -> None:
        """Project the weights so that log eta for these states lies in [log LR_MIN, upper]."""
        log_ref = math.log(self.peak_lr)
        row_D = planner.decoder_row(self._weights_P, ETA)
        moved_D = planner.project(row_D, tape.mean_D, math.log(LR_MIN) - log_ref, upper - log_ref)
        if moved_D is not row_D:
            self._weights_P = self._weights_P.copy()  # pending emissions still refer to the old weights
            planner.decoder_row(self._weights_P, ETA)[:] = moved_D
            tape.use(self._weights_P)

    def _next_log_eta(self, tape: Tape, upper: float) -> float:
        """The planner's log eta, limited by LR_MIN and the guard, then to within SLEW of the previous one.

        SLEW limits the guard too: without it each peak of the noisy curvature would lower log eta in one step by as
        much as it recovers in a hundred.
        """
        row_D = planner.decoder_row(self._weights_P, ETA)
        wanted = float(row_D @ tape.mean_D) + math.log(self.peak_lr)
        wanted = max(min(wanted, upper), math.log(LR_MIN))
        if self._log_eta is not None:
            wanted = min(max(wanted, self._log_eta - SLEW), self._log_eta + SLEW)
        if wanted >= upper:
            self._num_guarded += 1
        return wanted

    # ---- learning --------------------------------------------------------------------------

    def _learn(self, measured: Measured) -> None:
        """Add the curvature, and update the planner by the hypergradient of the step before."""
        if measured.skipped:  # no update in that step, no gradient for the step before it
            self._pending = [e for e in self._pending if e.step > measured.step]
            return
        if measured.secant is not None:
            self._curvature.update(measured.secant)
        if not self.own.online or measured.blocks is None:
            return
        gradient_P = self._hypergradient(measured)
        self._pending = [e for e in self._pending if e.step >= measured.step - (self.own.trace_decay > 0)]
        for emission in self._pending:
            if emission.descent_U is not None and not np.isfinite(emission.descent_U).all():
                emission.descent_U = None
        if gradient_P is None:
            return
        if self.own.regret == "elapsed":
            gradient_P = gradient_P / max(measured.elapsed_s, MIN_ELAPSED_S)
        norm = float(np.linalg.norm(gradient_P))
        if not math.isfinite(norm):
            self._num_dropped += 1
            return
        self._gradient_norm = norm
        self._weights_P = self._adam.step(self._weights_P, gradient_P)

    def _hypergradient(self, measured: Measured) -> np.ndarray | None:
        """(P,) derivative of the measured loss by the planner weights that set the learning rates of earlier steps.

        dL(t+1) / d log eta(t) = - sum_i eta m_i <g_i(t+1), u_i(t)>; term i is the derivative by log m_i. `trace_decay`
        adds the derivative by the rates one step earlier: <g(t+2), u(t)> is <g(t+1), u(t)> plus the secant's change.
        """
        total_P = None
        assert measured.blocks is not None
        for emission in self._pending:
            if emission.step == measured.step - 1:
                emission.descent_U, weight = measured.blocks.descent_U, 1.0
            elif emission.step == measured.step - 2 and emission.descent_U is not None and measured.secant is not None:
                emission.descent_U = emission.descent_U - measured.secant.change_U / self._rates_of(emission)
                weight = self.own.trace_decay
            else:
                continue
            by_log_rate_U = -weight * self._rates_of(emission) * emission.descent_U
            if by_log_rate_U.sum() > 0:
                by_log_rate_U *= self.own.caution
            num_blocks = len(self._h_KD)
            gradient_P = emission.tape.gradient(float(by_log_rate_U.sum()), by_log_rate_U[:num_blocks])
            total_P = gradient_P if total_P is None else total_P + gradient_P
        return total_P

    def _rates_of(self, emission: Emission) -> np.ndarray:
        rate_U = emission.lr * self._ratio_U
        rate_U[: len(self._h_KD)] *= emission.tape.multiplier_K
        return rate_U

    # ---- log, checkpoint -------------------------------------------------------------------

    def _report(self, tape: Tape) -> None:
        if self._step % LOG_STEPS:
            return
        assert self._log_eta is not None
        self.tell(
            "schedule",
            eta=math.exp(self._log_eta),
            curvature_max=self.curvature_max(tape.multiplier_K),
            guard_active=self._num_guarded / LOG_STEPS,
            hypergradient_norm=self._gradient_norm,
            replaced_features=sum(scaled.num_replaced for scaled in self._scaled.values()),
            dropped_hypergradients=self._num_dropped,
        )
        self._num_guarded = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "weights": self._weights_P.tolist(),
            "adam": self._adam.state(),
            "h": self._h_KD.tolist(),
            "curvature": self._curvature.state(),
            "scaled": {name: scaled.state() for name, scaled in self._scaled.items()},
            "pending": [
                {
                    "step": e.step,
                    "lr": e.lr,
                    "weights": e.tape.weights_P.tolist(),
                    "h": e.tape.h_KD.tolist(),
                    "features": e.tape.features_KF.tolist(),
                    "descent": None if e.descent_U is None else e.descent_U.tolist(),
                }
                for e in self._pending
            ],
            "step": self._step,
            "log_eta": self._log_eta,
            "gradient_norm": self._gradient_norm,
            "counts": [self._num_guarded, self._num_dropped],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weights_P, self._h_KD = np.array(state["weights"]), np.array(state["h"])
        self._adam.load_state(state["adam"])
        self._curvature.load_state(state["curvature"])
        for name, scaled in self._scaled.items():
            scaled.load_state(state["scaled"][name])
        self._pending = [self._emission(values) for values in state["pending"]]
        self._step, self._log_eta = state["step"], state["log_eta"]
        self._gradient_norm = state["gradient_norm"]
        self._num_guarded, self._num_dropped = state["counts"]

    def _emission(self, values: dict[str, Any]) -> Emission:
        """An emission from a checkpoint; the planner's forward pass is recomputed."""
        weights_P, h_KD, features_KF = (np.array(values[name]) for name in ("weights", "h", "features"))
        tape = self._tape(weights_P, h_KD, features_KF)
        descent = values["descent"]
        return Emission(values["step"], values["lr"], tape, None if descent is None else np.array(descent))
