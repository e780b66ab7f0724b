"""Tasks and batches."""

import dataclasses

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.batches import Batch, Batches, Encoded, encode
from fastpeft.data.glue import GLUE
from fastpeft.data.hub import load_hub
from fastpeft.data.local import load_local
from fastpeft.data.problem_batches import EncodedProblems, encode_problems
from fastpeft.data.task import (
    EMBEDDED,
    EMBEDDED_WORD_PROBLEMS,
    GSM8K,
    ClassificationTask,
    DataError,
    Examples,
    is_generated,
    is_word_problems,
)
from fastpeft.data.word_problems import Problems, WordProblemTask, load_problems, load_word_problems

__all__ = [
    "EMBEDDED",
    "EMBEDDED_WORD_PROBLEMS",
    "GLUE",
    "GSM8K",
    "Batch",
    "Batches",
    "ClassificationTask",
    "DataError",
    "Encoded",
    "EncodedProblems",
    "Examples",
    "Problems",
    "WordProblemTask",
    "encode",
    "encode_problems",
    "is_word_problems",
    "load_problems",
    "load_task",
]


def load_task(config: DatasetConfig) -> ClassificationTask | WordProblemTask:
    """The task that a `dataset` section names. Raises DataError, or UnavailableError for what cannot be had."""
    if is_generated(config) and is_word_problems(config) != (config.name == EMBEDDED_WORD_PROBLEMS):
        raise DataError(f"dataset.task={config.task}: {config.name} is of the other kind; leave dataset.task out")
    if is_word_problems(config):
        return load_word_problems(config)
    if is_generated(config):
        from fastpeft.data.embedded import LABELS, train_pairs, validation_pairs

        train, validation = (
            Examples(*(list(column) for column in zip(*pairs))) for pairs in (train_pairs(), validation_pairs())
        )
        return ClassificationTask(EMBEDDED, LABELS, train, validation)
    known = GLUE.get(config.name)
    task = load_hub(config) if config.path is None else load_local(config, known.labels if known else None)
    if known and known.f1_label in task.label_names:
        return dataclasses.replace(task, f1_label=known.f1_label)
    return task
