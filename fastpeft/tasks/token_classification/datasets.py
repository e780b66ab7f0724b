"""Datasets of tagged words that are known by name."""

from __future__ import annotations

from fastpeft.data.known import KnownDataset

DATASETS = {
    # Its own branch holds a script, which is never run; the hub has converted it.
    "conll2003": KnownDataset(
        repository="eriktks/conll2003",
        config="conll2003",
        revision="refs/convert/parquet",
        columns={"text": "tokens", "label": "ner_tags"},
    ),
    "wnut17": KnownDataset(
        repository="leondz/wnut_17",
        config="wnut_17",
        revision="refs/convert/parquet",
        columns={"text": "tokens", "label": "ner_tags"},
    ),
    "embedded-entities": KnownDataset(generated="fastpeft.standins.entities:splits"),
}
