"""Classifiers and their data without a whole run: what the tests of single parts work with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace

import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig, ModelConfig
from fastpeft.data.batches import Batch
from fastpeft.models.backbone import Backbone
from fastpeft.signals import Need
from fastpeft.tasks import load_task
from fastpeft.tasks.base import BatchLoss
from fastpeft.tasks.sequence_classification.task import SequenceClassification
from fastpeft.tasks.sequences.examples import Examples
from fastpeft.tasks.sequences.reading import LabelledTexts


def classifier_task(label_names: Sequence[str] = ("no", "yes"), f1_label: str | None = None) -> SequenceClassification:
    """A task of two rows."""
    rows = Examples(["a", "b"], None, [0, 1])
    texts = LabelledTexts(rows, rows)
    return SequenceClassification("t", texts, tuple(label_names), DatasetConfig(), EvaluationConfig(), f1_label)


def load_backbone(
    config: ModelConfig,
    label_names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    trained: bool = False,
) -> Backbone:
    return classifier_task(label_names).load_model(config, dtype, device, trained)


def classification_loss(model: nn.Module, batch: Batch, num_items: int, needs: Collection[Need] = ()) -> BatchLoss:
    return classifier_task().loss(model, batch, num_items, needs)


def load_texts(config: DatasetConfig) -> SimpleNamespace:
    """The rows of a classification task, and what is said of them."""
    task = load_task(config)
    assert isinstance(task, SequenceClassification)
    keys = ("name", "label_names", "metric", "f1_class")
    return SimpleNamespace(**{key: getattr(task, key) for key in keys}, **vars(task.texts), describe=task.describe())
