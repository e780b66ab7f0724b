"""Sets of conversations and instructions that are known by name."""

from __future__ import annotations

from fastpeft.data.known import KnownDataset

DATASETS = {
    "alpaca": KnownDataset(repository="yahma/alpaca-cleaned"),
    "dolly": KnownDataset(repository="databricks/databricks-dolly-15k"),
    "math": KnownDataset(
        repository="DigitalLearningGmbH/MATH-lighteval",
        config="default",
        columns={"text": "problem", "label": "solution"},
    ),
    "embedded-conversations": KnownDataset(generated="fastpeft.standins.dialogues:splits"),
    "embedded-boxed-problems": KnownDataset(generated="fastpeft.standins.dialogues:boxed_splits"),
}
