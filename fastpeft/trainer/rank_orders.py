"""Orders from rank 0 to the other ranks.

Rank 0 alone has the clock, the log, the run folder and the user. It decides when to step, when an evaluation is due and
when the budget is spent, as a single process does, and the other ranks follow. So all agree, whatever their own clocks
say. An order is a few numbers in host memory: sending it synchronizes no device.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum
from typing import NamedTuple

import torch

from fastpeft import ranks as ranks_module
from fastpeft.device_memory import OutOfMemory, TokenLimits
from fastpeft.ranks import ALONE, Ranks
from fastpeft.trainer.interrupt import StopRequest
from fastpeft.trainer.pass_times import PassTimes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SMALLER_EVALUATION = "Set evaluation.batch_tokens lower"


class Act(IntEnum):
    CALIBRATE = 1
    CALIBRATED = 2
    """Ends the calibration batches. FINISH_CALIBRATION follows, unless the run was stopped."""
    FINISH_CALIBRATION = 3
    STEP = 4
    EVALUATE = 5
    SCORE_TEST = 6
    END = 7


class Order(NamedTuple):
    act: Act
    values: tuple[float, float, float]
    """CALIBRATE: the batch's position. STEP: the batch's position, the progress, the clock's seconds. EVALUATE and
    SCORE_TEST: the number of validation rows (0 for all), and the token limits of evaluation and of training."""


class Orders:
    """Sends one order at a time, and shares the ranks' stop requests."""

    def __init__(self, ranks: Ranks, stop: StopRequest) -> None:
        self.ranks, self.stop = ranks, stop
        self.in_step: Ranks = ALONE
        """Ranks that run every pass through the model together, as with a sharded base. Each runs the same number of
        passes, and none is repeated. ALONE: ranks run their own passes."""
        self.pass_times = PassTimes(ranks)

    # ---- all ranks ---------------------------------------------------------------------------

    def shared_out(self) -> AbstractContextManager[None]:
        """Inside, ranks share an evaluation's batches. Ranks in step each evaluate all of them, since decoding their
        own rows would take different numbers of passes."""
        return nullcontext() if self.in_step.size > 1 else ranks_module.together(self.ranks)

    def asked_to_stop(self) -> bool:
        """Whether to stop an evaluation. Ranks in step agree, and stop before the same batch."""
        if self.in_step.size > 1:
            self.agree()
        return self.stop()

    def refuse_retry(self, where: str, advice: str) -> None:
        """Raise OutOfMemory for ranks in step: the others are in the pass that ran out of memory here."""
        if self.in_step.size > 1:
            raise OutOfMemory(where, "with training.shard_base no rank can take a pass again by itself", advice)

    def agree(self) -> None:
        """Share the stop requests, without an order."""
        self._exchange()

    # ---- rank 0 ------------------------------------------------------------------------------

    def calibrate(self, position: int) -> None:
        self._give(Act.CALIBRATE, position)

    def calibrated(self) -> None:
        self._give(Act.CALIBRATED)

    def finish_calibration(self) -> None:
        self._give(Act.FINISH_CALIBRATION)

    def step(self, position: int, progress: float, elapsed_s: float) -> None:
        self._give(Act.STEP, position, progress, elapsed_s)

    def evaluation(
        self, parameters: torch.Tensor, limits: TokenLimits, num_rows: int = 0, is_test: bool = False
    ) -> AbstractContextManager[None]:
        """Around an evaluation of `parameters`, which are broadcast; all ranks take part."""
        return nullcontext() if self.ranks.size == 1 else self._evaluation(parameters, limits, num_rows, is_test)

    @contextmanager
    def _evaluation(
        self, parameters: torch.Tensor, limits: TokenLimits, num_rows: int, is_test: bool
    ) -> Iterator[None]:
        self._give(Act.SCORE_TEST if is_test else Act.EVALUATE, num_rows, limits.evaluation, limits.training)
        self.ranks.take_first(parameters)
        with self.shared_out():
            yield
        self.agree()

    def end(self) -> None:
        self._give(Act.END)

    def _give(self, act: Act, *values: float) -> None:
        if self.ranks.size > 1:
            self._exchange(act, *values)

    # ---- the other ranks ---------------------------------------------------------------------

    def next(self) -> Order:
        """Wait for rank 0's next order."""
        act, *values = self._exchange()
        first, second, third = values
        return Order(Act(int(act)), (first, second, third))

    def _exchange(self, *mine: float) -> list[float]:
        """One all-reduce of rank 0's order, the number of ranks that got each stop signal, and each rank's seconds."""
        figures = [*mine, *(4 - len(mine)) * [0.0], *(float(self.stop.signal == one) for one in _SIGNALS)]
        summed = torch.tensor([*figures, *self.pass_times.take_own()], dtype=torch.float64)
        self.ranks.add_up(summed)
        order, asked, seconds = (part.tolist() for part in summed.split([4, len(_SIGNALS), self.ranks.size]))
        self.pass_times.add(seconds)
        for one, count in zip(_SIGNALS, asked):
            if count and self.stop.signal is None:
                self.stop.signal = one
        return order


NO_ORDERS = Orders(ALONE, StopRequest())
