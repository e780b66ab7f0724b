"""Sets of word problems that are known by name."""

from __future__ import annotations

from fastpeft.data.known import KnownDataset

DATASETS = {
    "gsm8k": KnownDataset(repository="openai/gsm8k", config="main"),
    "embedded-word-problems": KnownDataset(generated="fastpeft.standins.problems:splits"),
}
