"""Signals that FoT derives from measurements: statistics of its bound, phase gate, learning rates per matrix.

Shape suffixes: K adapted matrices, U units (the K matrices, then other parameters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpeft.schedules.running import RunningFloat
from fastpeft.signals import Blocks, BlockSums, Measured

KEEP = 0.98
"""Decay of running means per step."""
SAMPLED_KEEP = KEEP**16
"""Decay for values measured every 16 steps: the prompts' Fisher information, the gradient from answer tokens."""
MULTIPLIER_RANGE = 1 / 4, 4.0


@dataclass(frozen=True)
class Statistics:
    """Statistics of one step over all N trained parameters. The loss is in nats; theta is the unit of a parameter."""

    grad_sq: float
    """g2 = sum g^2 / N, before clipping: nats^2 / theta^2."""
    root_second: float
    """lambda = sqrt(sum v / N), with v Adam's bias-corrected second moment, after clipping: nats / theta."""
    second_spread: float
    """sigma2: standard deviation over the tensors of their mean v: nats^2 / theta^2. The paper adds it to lambda
    although their units differ."""

    @property
    def descent(self) -> float:
        """Predicted decrease of the loss per unit of learning rate: g2 / (2 (sigma2 + lambda))."""
        return self.grad_sq / (2 * (self.second_spread + self.root_second))


def statistics(sums: BlockSums, num_elements_U: np.ndarray) -> Statistics | None:
    """All statistics of the bound from a step's sums; a tensor is a unit of Blocks. None if one is not finite or the
    divisor is 0."""
    num = float(num_elements_U.sum())
    with np.errstate(all="ignore"):  # non-finite values give None
        mean_U = sums.second_U / num_elements_U
        grad_sq, second = float(sums.grad_sq_U.sum()) / num, float(sums.second_U.sum()) / num
        apart_U = mean_U - float(mean_U.sum()) / len(mean_U)
        spread = math.sqrt(float(apart_U @ apart_U) / len(mean_U))
    if not (grad_sq > 0 and second >= 0 and second + spread > 0):
        return None
    found = Statistics(grad_sq, math.sqrt(second), spread)
    return found if math.isfinite(found.descent) else None


class Evidence:
    """Mean and standard error of a noisy value whose mean drifts. Older readings get smaller weights."""

    KEEP = 0.995

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0, 0.0]
        """Sums of w, w^2, w x and w x^2, with w the weight of a reading x."""

    def add(self, value: float) -> None:
        """Add a reading; one whose square overflows is left out."""
        new = 1.0, 1.0, value, value * value
        if not math.isfinite(new[3]):
            return
        fades = self.KEEP, self.KEEP**2, self.KEEP, self.KEEP
        self._sums = [fade * kept + more for fade, kept, more in zip(fades, self._sums, new)]

    def errors_from(self, target: float) -> float:
        """(mean - target) in standard errors; 0 for fewer than two readings."""
        weight, squares, total, total_sq = self._sums
        count = weight**2 / squares if squares else 0.0
        if count < 2:
            return 0.0
        mean = total / weight
        variance = max(0.0, total_sq / weight - mean**2) * count / (count - 1)
        return (mean - target) / math.sqrt(variance / count) if variance else math.copysign(math.inf, mean - target)

    def state(self) -> list[float]:
        return list(self._sums)

    def load_state(self, state: list[float]) -> None:
        self._sums = list(state)


class PhaseGate:
    """h: 1.5 while answer tokens are more certain than prompt tokens, 0.7 while less certain; 1 without prompts."""

    def __init__(self) -> None:
        self.answer, self.prompt = RunningFloat(KEEP), RunningFloat(SAMPLED_KEEP)
        self.factor = 1.0

    def add(self, measured: Measured) -> None:
        for mean, value in ((self.answer, measured.answer_fisher), (self.prompt, measured.prompt_fisher)):
            if value is not None:
                mean.update(value)

    def decide(self) -> None:
        answer, prompt = self.answer.value, self.prompt.value
        if answer is None or not prompt:
            return
        ratio = answer / prompt
        self.factor = 1.5 if ratio < 0.7 else 0.7 if ratio > 1.3 else 1.0

    def state(self) -> dict[str, Any]:
        return {"answer": self.answer.state(), "prompt": self.prompt.state(), "factor": self.factor}

    def load_state(self, state: dict[str, Any]) -> None:
        self.answer.load_state(state["answer"])
        self.prompt.load_state(state["prompt"])
        self.factor = state["factor"]


class BlockScales:
    """sqrt(mean of lambda / lambda_k), with lambda_k the running RMS of the gradient of B_k from answer tokens only.

    A matrix with a smaller gradient gets a larger learning rate. The paper's formula says so; its text says the
    opposite.
    """

    def __init__(self, blocks: Blocks) -> None:
        if len(blocks.num_b_elements) != len(blocks):
            raise ValueError(f"fot: {len(blocks)} matrices, but {len(blocks.num_b_elements)} sizes of B")
        self._num_K = np.array(blocks.num_b_elements, dtype=np.float64)
        self._sq_K: np.ndarray | None = None
        self.multiplier_K: np.ndarray | None = None

    def add(self, grad_sq_K: np.ndarray | None) -> None:
        if grad_sq_K is None or not len(grad_sq_K) or not ((grad_sq_K >= 0) & (grad_sq_K < np.inf)).all():
            return
        # All matrices have the same number of values, so that a bias correction would cancel below.
        self._sq_K = grad_sq_K.astype(np.float64) if self._sq_K is None else self._sq_K
        self._sq_K = SAMPLED_KEEP * self._sq_K + (1 - SAMPLED_KEEP) * grad_sq_K

    def decide(self) -> None:
        if self._sq_K is None or not self._sq_K.any():
            return
        rms_K = np.sqrt(self._sq_K / self._num_K)
        least, most = MULTIPLIER_RANGE
        nonzero_K = np.maximum(rms_K, rms_K.mean() / most**2)  # smaller values would be clipped anyway
        self.multiplier_K = np.clip(np.sqrt(rms_K.mean() / nonzero_K), least, most)

    def state(self) -> dict[str, Any]:
        arrays = {"sq": self._sq_K, "multiplier": self.multiplier_K}
        return {name: None if array is None else array.tolist() for name, array in arrays.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        arrays = (None if state[name] is None else np.array(state[name]) for name in ("sq", "multiplier"))
        self._sq_K, self.multiplier_K = arrays
