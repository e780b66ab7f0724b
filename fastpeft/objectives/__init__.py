"""What a run is trained towards: one module for each kind of task."""

from fastpeft.objectives.base import BatchLoss, Objective
from fastpeft.objectives.classification import Classification, classification_loss

__all__ = ["BatchLoss", "Classification", "Objective", "classification_loss"]
