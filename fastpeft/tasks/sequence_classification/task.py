"""Classification: cross entropy over the labels, accuracy (and one class's F1) over the validation rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from fastpeft.config import RunConfig
from fastpeft.data.batches import Batch, Encoded, collate, encode, evaluation_batches
from fastpeft.data.task import ClassificationTask
from fastpeft.device_memory import TokenLimits
from fastpeft.models.backbone import Backbone
from fastpeft.models.lens import FirstLayer
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss, Objective, Shrink
from fastpeft.tasks.sequence_classification.scoring import Score, score

_TIMED_BATCHES = 4


class Classification(Objective):
    def __init__(self, task: ClassificationTask, run: RunConfig, backbone: Backbone, device: torch.device) -> None:
        self.metric, self._f1_class, self._device = task.metric, task.f1_class, device
        max_length = min(run.dataset.max_length, backbone.max_positions or run.dataset.max_length)
        rows = task.validation.head(run.evaluation.max_examples)
        self.train, self.validation = (
            encode(examples, backbone.tokenizer, max_length, backbone.reads_segments) for examples in (task.train, rows)
        )
        self._first_layer: FirstLayer | None = None
        self.notes = list(_notes(task, self.train, self.validation, max_length, run))

    def num_items(self, rows: np.ndarray) -> int:
        return len(rows)

    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        return collate(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch, num_items: int, needs: Collection[Need] = ()) -> BatchLoss:
        if Need.LENS in needs and self._first_layer is None:
            self._first_layer = FirstLayer(model)
        return classification_loss(model, batch, num_items, needs, self._first_layer if Need.LENS in needs else None)

    def evaluate(
        self, model: nn.Module, limits: TokenLimits, stop: Callable[[], bool], shrink: Shrink | None
    ) -> Score | None:
        return score(model, self.validation, limits.evaluation, self._device, stop, shrink, self._f1_class)

    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """From a few batches spread over all lengths."""
        groups = evaluation_batches(self.validation, limits.evaluation)
        chosen = [groups[i * (len(groups) - 1) // max(1, _TIMED_BATCHES - 1)] for i in range(_TIMED_BATCHES)]

        def area(rows: np.ndarray) -> int:
            return len(rows) * int(self.validation.lengths[rows].max())

        seconds = []
        with torch.inference_mode():
            for rows in [chosen[-1], *chosen]:  # the first is a warm-up
                start = time.perf_counter()
                batch = collate(self.validation, rows, self._device)
                model(**batch.inputs).logits.sum().item()
                seconds.append((time.perf_counter() - start) / area(rows))
        return sum(seconds[1:]) / _TIMED_BATCHES * sum(map(area, groups))

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        rows = evaluation_batches(self.validation, limits.evaluation)[-1]
        return len(rows), int(self.validation.widths[rows].max())


def classification_loss(
    model: nn.Module,
    batch: Batch,
    num_items: int,
    needs: Collection[Need] = (),
    first_layer: FirstLayer | None = None,
) -> BatchLoss:
    """Cross entropy of the model's logits, N x labels, in fp32. `first_layer` may be kept from pass to pass."""
    if first_layer is None and Need.LENS in needs:
        first_layer = FirstLayer(model)
    with nullcontext() if first_layer is None else first_layer.watching():
        logits = model(**batch.inputs).logits.float()
    loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / num_items
    return BatchLoss(loss, _statistics(logits.detach(), batch.labels, num_items, needs, first_layer))


@torch.no_grad()
def _statistics(
    logits: torch.Tensor, labels: torch.Tensor, num_items: int, needs: Collection[Need], first_layer: FirstLayer | None
) -> dict[str, torch.Tensor]:
    """The loss is the same to the bit whatever of them is wanted."""
    found = {}
    if Need.TOKENS in needs:
        probability = logits.softmax(1)
        found["entropy"] = torch.special.entr(probability).sum() / num_items
        error = probability.scatter_(1, labels[:, None], -1, reduce="add")
        found["answer_fisher"] = error.square_().sum() / num_items
    if first_layer is not None:
        lens = torch.special.entr(first_layer.read_classes().softmax(1)).sum(1)
        found["lens_entropy"] = lens.mean() * (len(labels) / num_items)
    return found


def _notes(task: ClassificationTask, train: Encoded, validation: Encoded, max_length: int, run: RunConfig):
    there = set(task.train.labels)
    absent = [name for i, name in enumerate(task.label_names) if i not in there]
    if absent:
        missing = ", ".join(absent)
        yield f"no training row has the label {missing}: are dataset.name and dataset.labels those of the data?"
    for split, encoded in (("training", train), ("validation", validation)):
        if encoded.num_truncated:
            yield f"{encoded.num_truncated:,} {split} rows were cut to {max_length} tokens"
    if max_length < run.dataset.max_length:
        yield f"dataset.max_length is {run.dataset.max_length}, but the model takes {max_length} tokens"
