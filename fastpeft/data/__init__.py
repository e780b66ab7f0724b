"""Tasks and batches."""

from fastpeft.config.schema import DatasetConfig
from fastpeft.data.batches import Batch, Batches, Encoded, encode
from fastpeft.data.glue import GLUE
from fastpeft.data.local import load_local
from fastpeft.data.task import ClassificationTask, DataError, Examples
from fastpeft.errors import UnavailableError

EMBEDDED = "embedded-nli"

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
    """The task that a `dataset` section names. Raises DataError, or UnavailableError for an unknown name."""
    if config.path is not None:
        known = GLUE.get(config.name)
        return load_local(config, known.labels if known else None)
    if config.name == EMBEDDED:
        from fastpeft.data.embedded import LABELS, train_pairs, validation_pairs

        train, validation = (
            Examples(*(list(column) for column in zip(*pairs))) for pairs in (train_pairs(), validation_pairs())
        )
        return ClassificationTask(EMBEDDED, LABELS, train, validation)
    if config.name in GLUE:
        from fastpeft.data.glue import load_glue

        return load_glue(config.name)
    known = ", ".join([EMBEDDED, *GLUE])
    raise UnavailableError(
        f"dataset.name {config.name!r} is no task of this package ({known}); for files of your own set dataset.path"
    )
