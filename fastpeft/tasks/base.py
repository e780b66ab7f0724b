"""The interface of what is trained towards: the loss of a batch, and how a whole split is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import Batch, Encoded
from fastpeft.device_memory import TokenLimits
from fastpeft.signals import Need
from fastpeft.tasks.sequence_classification.scoring import Score

Shrink = Callable[[int, int], int]
"""Told the rows and the width of an evaluation batch that ran out of memory; returns a smaller limit of tokens."""


@dataclass
class BatchLoss:
    loss: torch.Tensor
    """Scalar with a gradient: the sum over the micro-batch's items over the number of items of the batch."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars by the names of signals.Measured, as shares of the batch's mean: micro-batches add up to it."""


class Objective(ABC):
    """Built from a task, a tokenizer and a model's limits. It holds the encoded splits, and no training state."""

    metric: str
    train: Encoded
    validation: Encoded
    notes: list[str]
    """What the user should know about the encoded data."""
    has_test: bool = False
    """A test split is there, to be scored once, at the end."""
    test_cost: float = 0.0
    """Cost of scoring the test split, in units of an evaluation."""

    @abstractmethod
    def num_items(self, rows: np.ndarray) -> int:
        """What the loss of a batch of these training rows is a mean over."""

    @abstractmethod
    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        """These training rows, padded, on the device."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, num_items: int, needs: Collection[Need] = ()) -> BatchLoss:
        """Of a micro-batch of a batch of `num_items`."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, limits: TokenLimits, stop: Callable[[], bool], shrink: Shrink | None
    ) -> Score | None:
        """Score the validation split; None if `stop` said so before the end. Draws no global random numbers."""

    def evaluate_test(
        self, model: nn.Module, limits: TokenLimits, stop: Callable[[], bool], shrink: Shrink | None
    ) -> Score | None:
        """Score the test split, where there is one."""
        raise AssertionError("this objective has no test split")

    @abstractmethod
    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """Seconds that `evaluate` is expected to take, from a few batches. RuntimeError where the memory is short."""

    @abstractmethod
    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        """Rows and width of the batch that `time_evaluation` begins with."""
