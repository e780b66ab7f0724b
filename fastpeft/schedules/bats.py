"""BATS, a budget-aware token scheduler.

The papers that name it give no equations. This is the project's reconstruction: the learning rate of `linear` times
clip((D_t / D_run)^(1/2), 1/2, 2). D_t is the mean Fisher information of the labelled tokens of the previous batch,
mean ||softmax(z) - onehot(y)||^2, and D_run its running mean over the batches before that. D_t scales the step after
its batch, because it is known only after the backward pass.
"""

from __future__ import annotations

from typing import Any

from fastpeft.config.schedules import BatsConfig, ScheduleConfig
from fastpeft.schedules.classic import Linear
from fastpeft.schedules.running import LARGEST, RunningMean, clipped
from fastpeft.signals import Blocks, Measured, Need, Rates


class Bats(Linear):
    own: BatsConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self._running = RunningMean(self.own.decay)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.TOKENS})

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        factor = 1.0
        if measured is not None and not measured.skipped and measured.answer_fisher is not None:
            factor = self._factor(measured.answer_fisher)
        return Rates(super().rates(measured, progress).lr * factor)

    def _factor(self, fisher: float) -> float:
        """The factor of a batch, which is then added to the running mean. 1 if the ratio is undefined."""
        if not 0 <= fisher <= LARGEST:
            return 1.0
        before = self._running.value
        self._running.update(fisher)
        options = self.own
        if before is None or before <= 0:
            return 1.0
        return clipped((fisher / float(before)) ** options.exponent, options.most)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fisher": self._running.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._running.load_state(state["fisher"])
