"""Datasets with several labels a row that are known by name."""

from __future__ import annotations

from fastpeft.data.known import KnownDataset

DATASETS = {
    "goemotions": KnownDataset(
        repository="google-research-datasets/go_emotions",
        config="simplified",
        columns={"text": "text", "label": "labels"},
    ),
    "embedded-topics": KnownDataset(columns={"label": "labels"}, generated="fastpeft.standins.topics:splits"),
}
