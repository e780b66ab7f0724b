"""What a run is trained towards: one module for each kind of task."""

import torch

from fastpeft.config import RunConfig
from fastpeft.data import ClassificationTask, WordProblemTask
from fastpeft.models.backbone import Backbone
from fastpeft.objectives.base import BatchLoss, Objective
from fastpeft.objectives.classification import Classification, classification_loss
from fastpeft.objectives.word_problems import WordProblems

__all__ = [
    "BatchLoss",
    "Classification",
    "Objective",
    "WordProblems",
    "classification_loss",
    "make_objective",
]


def make_objective(
    task: ClassificationTask | WordProblemTask, run: RunConfig, backbone: Backbone, device: torch.device
) -> Objective:
    kind = WordProblems if isinstance(task, WordProblemTask) else Classification
    return kind(task, run, backbone, device)
