"""Tasks and batches."""

import dataclasses

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.batches import Batch, Batches, Encoded, encode
from fastpeft.data.glue import GLUE
from fastpeft.data.hub import load_hub
from fastpeft.data.local import load_local
from fastpeft.data.task import EMBEDDED, ClassificationTask, DataError, Examples

__all__ = [
    "EMBEDDED",
    "GLUE",
    "Batch",
    "Batches",
    "ClassificationTask",
    "DataError",
    "Encoded",
    "Examples",
    "encode",
    "load_task",
]


def load_task(config: DatasetConfig) -> ClassificationTask:
    """The task that a `dataset` section names. Raises DataError, or UnavailableError for what cannot be had."""
    if config.path is None and config.name == EMBEDDED:
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
