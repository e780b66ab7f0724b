"""Scores of a whole split against scikit-learn's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import nn

from fastpeft.tasks.base import Score
from fastpeft.tasks.sequences.examples import Encoded
from fastpeft.tasks.sequences.scoring import answer_rows
from tests.support.classifiers import classifier_task

CPU = torch.device("cpu")
NAMES = ("a", "b", "c")


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


def score(num_labels: int, labels: np.ndarray, guesses: np.ndarray, f1_label: str | None = None) -> Score:
    """As a run scores its validation split."""
    task, encoded = classifier_task(NAMES[:num_labels], f1_label), rows(labels, guesses)
    answers = answer_rows(Guesses(num_labels), encoded, task.row_losses, 64, CPU)
    value, more, groups = task.metrics(answers, encoded.labels)
    return Score(value, answers.mean_loss, len(labels), more, groups)


@pytest.mark.parametrize(("num_labels", "positive"), [(2, 0), (2, 1), (3, 2)])
def test_accuracy_loss_and_f1(num_labels, positive, seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        shares = rng.dirichlet(np.ones(num_labels))  # lopsided, too
        labels, guesses = rng.choice(num_labels, (2, 77), p=shares)
        got = score(num_labels, labels, guesses, NAMES[positive])
        assert got.value == pytest.approx(accuracy_score(labels, guesses))
        wanted = f1_score(labels == positive, guesses == positive, zero_division=0)
        majority = max(accuracy_score(labels, np.full_like(labels, answer)) for answer in range(num_labels))
        assert got.more == {"f1": pytest.approx(wanted), "majority": pytest.approx(majority)}
        probabilities = np.exp(np.eye(num_labels))[guesses]
        probabilities /= probabilities.sum(1, keepdims=True)
        assert got.loss == pytest.approx(log_loss(labels, probabilities, labels=range(num_labels)), rel=1e-5)


def test_answers_are_in_the_order_of_the_rows(seed):
    """And not in that of the batches, which are sorted by length."""
    guesses = np.random.default_rng(seed).choice(3, 77)
    encoded = rows(guesses, guesses)
    answers = answer_rows(Guesses(3), encoded, classifier_task(NAMES).row_losses, 24, CPU)
    assert answers.logits_NC.argmax(1).tolist() == guesses.tolist()
    assert answers.logits_NC.dtype == torch.float32


def test_f1_of_a_class_that_is_nowhere():
    ones = np.ones(6, dtype=np.int64)
    assert score(2, ones, ones, f1_label="a").more == {"f1": 0.0, "majority": 1.0}


def test_no_f1_unless_it_is_asked_for():
    labels = np.array([0, 1, 1])
    assert score(2, labels, labels).more == {"majority": pytest.approx(2 / 3)}


def test_the_class_of_f1_is_named_by_its_label():
    assert classifier_task(("not_entailment", "entailment"), f1_label="entailment").f1_class == 1
    assert classifier_task(("a", "b")).f1_class is None
    assert classifier_task(("yes", "no"), f1_label="entailment").f1_class is None
