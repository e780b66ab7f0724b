"""What the tests of exports share: a finished run with the model that it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastpeft.runs.store import RunFolder
from fastpeft.tasks.sequences.examples import Encoded
from fastpeft.tasks.sequences.task import sample_logits
from fastpeft.trainer.build import Job

CASES = ("deberta-v2", "bert", "roberta", "distilbert", "bert-without-pooler", "bert-rslora", "bert-adalora")


@dataclass
class Trained:
    """A finished run, and its model as the trainer left it."""

    folder: RunFolder
    job: Job

    @property
    def rows(self) -> Encoded:
        return self.job.task.validation

    def logits(self) -> torch.Tensor:
        """Of the last weights on every validation row."""
        self.job.adapter.model.eval()
        return sample_logits(self.job.adapter.model, self.rows, self.job.device)


def run_values(model: Path, pairs: Path, method: str = "lora") -> dict:
    return {
        "run_id": "tiny",
        "method": method,
        "model": {"name": str(model)},
        "adapter": {"target_modules": "all-linear", "rank": 4, "alpha": 12.0},
        "schedule": {"warmup_steps": 2},
        "dataset": {"path": str(pairs), "max_length": 64},
        "training": {"learning_rate": 1e-2, "batch_size": 8, "precision": "fp32", "threads": 1},
        "evaluation": {"every": "7steps"},
        "budget": "15steps",
    }
