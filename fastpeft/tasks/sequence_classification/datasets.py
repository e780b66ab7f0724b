"""Datasets with one class a row that are known by name."""

from __future__ import annotations

from fastpeft.data.known import KnownDataset

GLUE = "nyu-mll/glue"
"""On the hub; each task is a configuration of it."""

DATASETS = {
    "mnli": KnownDataset(
        repository=GLUE,
        config="mnli",
        one_config=True,
        labels=("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    "sst2": KnownDataset(
        repository=GLUE, config="sst2", one_config=True, labels=("negative", "positive"), validation="validation"
    ),
    "rte": KnownDataset(
        repository=GLUE,
        config="rte",
        one_config=True,
        labels=("entailment", "not_entailment"),
        validation="validation",
        f1_label="entailment",
    ),
    "boolq": KnownDataset(
        repository="google/boolq",
        labels=("False", "True"),
        columns={"text": "question", "text_pair": "passage", "label": "answer"},
    ),
    "amazon": KnownDataset(
        repository="fancyzhx/amazon_polarity",
        labels=("negative", "positive"),
        columns={"text": "content", "label": "label"},
    ),
    "embedded-nli": KnownDataset(
        labels=("entailment", "neutral", "contradiction"),
        generated="fastpeft.standins.sentence_pairs:splits",
    ),
}
