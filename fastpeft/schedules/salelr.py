"""SALeLR, a sensitivity-aware learning rate for each adapted matrix.

The papers that name it give no equations. This is the project's reconstruction: lr_k = lr clip((s_k / mean s)^(1/2),
1/4, 4). s_k is the running norm of the gradient of matrix k (A and B together), and lr the learning rate of `linear`.
SALeLR thus differs from `linear` in the factors only.

Shape suffixes: K adapted matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpeft.config.schedules import SalelrConfig, ScheduleConfig
from fastpeft.errors import UserError
from fastpeft.schedules.classic import Linear
from fastpeft.schedules.running import RunningMean
from fastpeft.signals import Blocks, Measured, Need, Rates


class Salelr(Linear):
    own: SalelrConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        """
        Raises:
            UserError: no adapted matrix to scale.
        """
        super().__init__(config, peak_lr, blocks, **more)
        if blocks is None or len(blocks) == 0:
            raise UserError("schedule.name: salelr scales the rates of adapted matrices, and there are none here")
        self._num_matrices = len(blocks)
        self._norm_K = RunningMean(self.own.decay)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.GRAD_SQ})

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        if measured is not None and not measured.skipped and measured.blocks is not None:
            with np.errstate(invalid="ignore"):
                self._norm_K.update(np.sqrt(measured.blocks.grad_sq_U[: self._num_matrices]))
        return Rates(super().rates(measured, progress).lr, self._multipliers())

    def _multipliers(self) -> np.ndarray | None:
        norm_K = self._norm_K.value
        if norm_K is None or not (known_K := norm_K >= 0).any():
            return None
        mean = norm_K[known_K].mean()
        if mean == 0:
            return None
        options = self.own
        share_K = np.where(known_K, norm_K / mean, 1.0)
        return np.clip(share_K**options.exponent, 1 / options.most, options.most)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"norm": self._norm_K.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._norm_K.load_state(state["norm"])
