"""Scores of a whole split against scikit-learn's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from fastpeft.data.task import ClassificationTask
from fastpeft.tasks.sequence_classification.scoring import score
from fastpeft.tasks.sequences.examples import Encoded, Examples

CPU = torch.device("cpu")


class Guesses(nn.Module):
    """Answers each row with what is written in its first token."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids[:, 0], self.num_labels).float())


def rows(labels: np.ndarray, guesses: np.ndarray) -> Encoded:
    lengths = 1 + np.arange(len(labels)) % 5
    tokens = np.repeat(guesses, lengths).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Encoded(
        tokens=tokens,
        segments=None,
        offsets=offsets,
        labels=labels.astype(np.int64),
        num_truncated=0,
        pad_token=0,
        max_length=8,
    )


@pytest.mark.parametrize(("num_labels", "positive"), [(2, 0), (2, 1), (3, 2)])
def test_accuracy_and_f1(num_labels, positive, seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        shares = rng.dirichlet(np.ones(num_labels))  # lopsided, too
        labels, guesses = rng.choice(num_labels, (2, 77), p=shares)
        got = score(Guesses(num_labels), rows(labels, guesses), 64, CPU, f1_class=positive)
        assert got.value == pytest.approx(accuracy_score(labels, guesses))
        wanted = f1_score(labels == positive, guesses == positive, zero_division=0)
        assert got.more == {"f1": pytest.approx(wanted)}


def test_f1_of_a_class_that_is_nowhere():
    ones = np.ones(6, dtype=np.int64)
    assert score(Guesses(2), rows(ones, ones), 64, CPU, f1_class=0).more == {"f1": 0.0}


def test_no_f1_unless_it_is_asked_for():
    labels = np.array([0, 1, 1])
    assert score(Guesses(2), rows(labels, labels), 64, CPU).more == {}


def test_the_class_of_f1_is_named_by_its_label():
    one = Examples(["a"], None, [0])
    task = ClassificationTask("t", ("not_entailment", "entailment"), one, one, f1_label="entailment")
    assert task.f1_class == 1
    assert ClassificationTask("t", ("a", "b"), one, one).f1_class is None
