"""GLUE tasks: their label order, splits and metrics."""

from __future__ import annotations

from dataclasses import dataclass

REPOSITORY = "nyu-mll/glue"
"""On the hub; each task is a configuration of it."""


@dataclass(frozen=True)
class GlueTask:
    labels: tuple[str, ...]
    """In the order of the numbers on the hub."""
    validation: str = "validation"
    f1_label: str | None = None
    """The class whose F1 is reported beside accuracy."""


GLUE = {
    "mnli": GlueTask(("entailment", "neutral", "contradiction"), "validation_matched"),
    "sst2": GlueTask(("negative", "positive")),
    "rte": GlueTask(("entailment", "not_entailment"), f1_label="entailment"),
}
