"""The exponential moving average of a growing column."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_BLOCK = 64


def ema(y: Floats, weight: float, start: float = 0.0, num_before: int = 0) -> Floats:
    """s_i = weight s_(i-1) + (1 - weight) y_i, divided by 1 - weight^i (W&B's smoothing, with Adam's bias correction).

    Args:
        y: finite values.
        weight: in [0, 1).
        start: the average after `num_before` earlier values, without bias correction.
    """
    out = _undivided(y, weight, start)
    num = min(len(y), max(0, _num_early(weight) - num_before))
    out[:num] /= 1.0 - weight ** np.arange(num_before + 1, num_before + num + 1)
    return out


def _num_early(weight: float) -> int:
    """Number of values after which the bias correction is exactly 1 in float64."""
    return math.ceil(math.log(2.0**-54) / math.log(weight)) if weight > 0 else 0


def _undivided(y: Floats, weight: float, start: float) -> Floats:
    """The average without bias correction, in blocks: a triangular product within a block, and from block to block the
    same average with a larger weight."""
    if len(y) <= _BLOCK:
        out = np.empty(len(y))
        for i, value in enumerate(y.tolist()):
            start = weight * start + (1.0 - weight) * value
            out[i] = start
        return out
    decay = weight ** np.arange(_BLOCK + 1)
    lag = np.arange(_BLOCK)[:, None] - np.arange(_BLOCK)
    kernel = np.where(lag >= 0, decay[np.maximum(lag, 0)], 0.0) * (1.0 - weight)
    num_whole = len(y) // _BLOCK * _BLOCK
    own = y[:num_whole].reshape(-1, _BLOCK) @ kernel.T
    heavy = decay[-1]
    ends = _undivided(own[:, -1] / (1.0 - heavy), heavy, start) if heavy < 1.0 else start + np.cumsum(own[:, -1])
    before = np.concatenate([[start], ends[:-1]])
    whole = (own + before[:, None] * decay[1:]).ravel()
    return np.concatenate([whole, _undivided(y[num_whole:], weight, float(ends[-1]))])


class Smoothed:
    """The average of a growing column. Each call continues where the last one ended.

    Non-finite values stay in the output, and do not enter the average.
    """

    def __init__(self) -> None:
        self._weight = -1.0
        self._done = np.empty(0)
        self._num = 0
        self._state, self._num_finite = 0.0, 0

    def __call__(self, y: Floats, weight: float, num_settled: int) -> Floats:
        """`num_settled`: number of rows at the beginning of `y` whose positions are final."""
        if weight != self._weight:
            self.__init__()
            self._weight = weight
        num = min(num_settled, len(y))
        if num > self._num:
            self._keep(y, num)
        if num == len(y):
            return self._done[: self._num]
        return np.concatenate([self._done[: self._num], self._next(y[self._num :])[0]])

    def _keep(self, y: Floats, num: int) -> None:
        more, state, num_finite = self._next(y[self._num : num])
        if num > len(self._done):
            grown = np.empty(int(num * 1.5))
            grown[: self._num] = self._done[: self._num]
            self._done = grown
        self._done[self._num : num] = more
        self._num, self._state, self._num_finite = num, state, num_finite

    def _next(self, y: Floats) -> tuple[Floats, float, int]:
        finite = np.isfinite(y)
        values = y[finite]
        out = y.copy()
        out[finite] = smooth = ema(values, self._weight, self._state, self._num_finite)
        num_finite = self._num_finite + len(values)
        state = float(smooth[-1]) * (1.0 - self._weight**num_finite) if len(values) else self._state
        return out, state, num_finite
