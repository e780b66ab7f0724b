"""What a run is trained towards: one module for each kind of task."""

import dataclasses

import torch

from fastpeft.config import RunConfig
from fastpeft.config.schema import DatasetConfig
from fastpeft.data.hub_datasets import load_hub
from fastpeft.data.local import load_local
from fastpeft.data.task import (
    EMBEDDED,
    EMBEDDED_WORD_PROBLEMS,
    ClassificationTask,
    DataError,
    Examples,
    is_generated,
    is_word_problems,
)
from fastpeft.models.backbone import Backbone
from fastpeft.tasks.base import BatchLoss, Objective
from fastpeft.tasks.math_word_problems.reading import WordProblemTask, load_word_problems
from fastpeft.tasks.math_word_problems.task import WordProblems
from fastpeft.tasks.sequence_classification.glue import GLUE
from fastpeft.tasks.sequence_classification.task import Classification, classification_loss

__all__ = [
    "BatchLoss",
    "Classification",
    "Objective",
    "WordProblems",
    "classification_loss",
    "load_task",
    "make_objective",
]


def make_objective(
    task: ClassificationTask | WordProblemTask, run: RunConfig, backbone: Backbone, device: torch.device
) -> Objective:
    kind = WordProblems if isinstance(task, WordProblemTask) else Classification
    return kind(task, run, backbone, device)


def load_task(config: DatasetConfig) -> ClassificationTask | WordProblemTask:
    """The task that a `dataset` section names. Raises DataError, or UnavailableError for what cannot be had."""
    if is_generated(config) and is_word_problems(config) != (config.name == EMBEDDED_WORD_PROBLEMS):
        raise DataError(f"dataset.task={config.task}: {config.name} is of the other kind; leave dataset.task out")
    if is_word_problems(config):
        return load_word_problems(config)
    if is_generated(config):
        from fastpeft.standins.sentence_pairs import LABELS, train_pairs, validation_pairs

        train, validation = (
            Examples(*(list(column) for column in zip(*pairs))) for pairs in (train_pairs(), validation_pairs())
        )
        return ClassificationTask(EMBEDDED, LABELS, train, validation)
    known = GLUE.get(config.name)
    task = load_hub(config) if config.path is None else load_local(config, known.labels if known else None)
    if known and known.f1_label in task.label_names:
        return dataclasses.replace(task, f1_label=known.f1_label)
    return task
