"""What rank 0 tells the other ranks to do next.

Rank 0 alone has the clock, the log, the folder and the user. It decides when a step is taken, when an evaluation is due
and when the budget is spent, as a single process does, and the other ranks do what it says. So all agree, whatever
their own clocks say. An order is a few numbers on the hosts' side: it does not wait for a device.
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
    """Ends the calibration; whether it counts is not said."""
    FINISH_CALIBRATION = 3
    STEP = 4
    EVALUATE = 5
    SCORE_TEST = 6
    END = 7


class Order(NamedTuple):
    act: Act
    values: tuple[float, float, float]
    """CALIBRATE and STEP: the batch's position, the progress and the seconds on the clock. EVALUATE and SCORE_TEST: how
    many of the validation rows, 0 for all of them, and the limits of an evaluation and of a training batch."""


class Orders:
    """One order at a time, and the requests to stop that the ranks have had."""

    def __init__(self, ranks: Ranks, stop: StopRequest) -> None:
        self.ranks, self.stop = ranks, stop
        self.in_step: Ranks = ALONE
        """The ranks whose passes through the model are taken together, as where the base is shared out over them: each
        takes as many as the others, and none is tried again. ALONE: each has its own."""
        self.pass_times = PassTimes(ranks)

    # ---- all ranks ---------------------------------------------------------------------------

    def shared_out(self) -> AbstractContextManager[None]:
        """Within, ranks take parts of an evaluation's batches. Those in step do all of it: what they decode would end
        after other numbers of passes."""
        return nullcontext() if self.in_step.size > 1 else ranks_module.together(self.ranks)

    def asked_to_stop(self) -> bool:
        """In an evaluation. Ranks in step stop before the same batch."""
        if self.in_step.size > 1:
            self.agree()
        return self.stop()

    def refuse_retry(self, where: str, advice: str) -> None:
        """After a pass that ran out of memory. Raises OutOfMemory for ranks in step, whose others are in that pass."""
        if self.in_step.size > 1:
            raise OutOfMemory(where, "with training.shard_base no rank can take a pass again by itself", advice)

    def agree(self) -> None:
        """Every rank hears of the requests to stop; there is no order."""
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
        """Around an evaluation of `parameters`, as they are now: all ranks are in it."""
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
        """Waits for it."""
        act, *values = self._exchange()
        first, second, third = values
        return Order(Act(int(act)), (first, second, third))

    def _exchange(self, *mine: float) -> list[float]:
        """A sum: of rank 0's order, of how many ranks each signal has asked to stop, and of each rank's seconds."""
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
