"""GLUE tasks: their label order, and their rows from the hub or its cache."""

from __future__ import annotations

from dataclasses import dataclass

from fastpeft.data.task import ClassificationTask, Examples
from fastpeft.errors import UnavailableError


@dataclass(frozen=True)
class GlueTask:
    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    """In the order of the numbers on the hub."""
    validation: str = "validation"


GLUE = {
    "mnli": GlueTask("premise", "hypothesis", ("entailment", "neutral", "contradiction"), "validation_matched"),
}

REPOSITORY = "nyu-mll/glue"


def load_glue(name: str) -> ClassificationTask:
    """Read a GLUE task through `datasets`, which takes its cache when the hub is away.

    Raises:
        UnavailableError: neither the hub nor the cache gives it.
    """
    import datasets

    task = GLUE[name]

    def read(split: str) -> Examples:
        try:
            rows = datasets.load_dataset(REPOSITORY, name, split=split)
        except Exception as error:  # connection, cache, parquet: each layer has its own classes
            raise UnavailableError(f"dataset {REPOSITORY} {name}: cannot be loaded: {error}") from error
        pair = list(rows[task.text_pair]) if task.text_pair else None
        return Examples(list(rows[task.text]), pair, list(rows["label"]))

    return ClassificationTask(name, task.labels, read("train"), read(task.validation))
