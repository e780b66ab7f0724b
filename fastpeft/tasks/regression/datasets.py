"""Datasets with a score a row that are known by name."""

from __future__ import annotations

from fastpeft.data.known import KnownDataset

DATASETS = {
    "stsb": KnownDataset(repository="nyu-mll/glue", config="stsb", one_config=True, validation="validation"),
    "embedded-similarity": KnownDataset(columns={"label": "score"}, generated="fastpeft.standins.similarity:splits"),
}
