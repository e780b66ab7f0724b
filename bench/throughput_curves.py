"""Test whether two rows have the same training losses, given their variation over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CURVE_STEPS = 100
BLOCK_STEPS = 10
LEVEL = 0.01
"""Significance level: the share of pairs of equal rows that are reported as different."""


@dataclass(frozen=True)
class Apart:
    """Largest difference of two rows' mean losses over a block of steps, and the bound that the seeds explain."""

    difference: float
    bound: float
    at_step: int
    """First step of the block."""

    @property
    def is_apart(self) -> bool:
        return not abs(self.difference) <= self.bound  # NaN counts as different

    @property
    def words(self) -> str:
        return f"its loss is off by {self.difference:+.4f} from step {self.at_step} on; seeds explain {self.bound:.4f}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def apart(own: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Apart:
    """Student's t-test over the seeds, in blocks of steps, with the level divided among the blocks (Bonferroni).

    One variance over the seeds, of a block's mean loss, is pooled over both rows and all blocks. Blocks of one seed are
    correlated, so that only the seeds count as degrees of freedom.
    """
    from scipy.stats import t

    blocks = [_blocks(curves) for curves in (own, base)]
    count = len(blocks[0]) + len(blocks[1])
    deviations = [((values - values.mean(0)) ** 2).sum(0) for values in blocks]
    freedom = count - 2
    variance = float(np.mean(deviations[0] + deviations[1])) / freedom
    difference = blocks[0].mean(0) - blocks[1].mean(0)
    bound = float(t.ppf(1 - LEVEL / (2 * len(difference)), freedom))
    bound *= (variance * (1 / len(blocks[0]) + 1 / len(blocks[1]))) ** 0.5
    worst = int(np.argmax(np.where(np.isfinite(difference), np.abs(difference), np.inf)))
    return Apart(float(difference[worst]), bound, worst * BLOCK_STEPS)


def _blocks(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean losses, seeds x blocks, without an incomplete last block."""
    values = np.array(curves)
    count = values.shape[1] // BLOCK_STEPS
    return values[:, : count * BLOCK_STEPS].reshape(len(values), count, BLOCK_STEPS).mean(2)
