"""What a run was given for each row of a split, as the numbers that its metric is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastpeft.data.predictions import Predictions
from fastpeft.runs.events import number

Form = Literal["share", "f1", "rank"]


@dataclass(frozen=True)
class RowScores:
    """Of N rows."""

    rows: str
    """Their hash: scores of one hash are of the same rows in one order."""
    form: Form
    """How the metric comes out of `values`: the mean of one column; 2 a / (b + c) of the sums of three; Spearman's rank
    correlation of two."""
    values: np.ndarray
    """N x 1, 2 or 3."""

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of(cls, predictions: Predictions) -> RowScores | None:
        """None without a row, or for one whose answer is no number where numbers are ranked."""
        answers = predictions.answers
        if not answers:
            return None
        if answers[0].correct is not None:
            return cls(predictions.rows, "share", np.array([[answer.correct] for answer in answers], np.float64))
        if answers[0].counts is not None:
            return cls(predictions.rows, "f1", np.array([answer.counts for answer in answers], np.float64))
        values = np.array([[number(answer.predicted), number(answer.gold)] for answer in answers])
        return cls(predictions.rows, "rank", values) if np.isfinite(values).all() else None


def metrics(runs: Sequence[RowScores], rows: np.ndarray) -> np.ndarray:
    """Of runs on the same rows, on samples of them: ... x N indices -> ... x runs."""
    num_rows, num_columns = runs[0].values.shape
    counts = _counts(rows, num_rows)
    if runs[0].form == "rank":
        return np.stack([_spearman(run.values, counts) for run in runs], axis=-1)
    table = np.concatenate([run.values for run in runs], axis=1)
    sums = (counts @ table).reshape(*rows.shape[:-1], len(runs), num_columns)
    if runs[0].form == "share":
        return sums[..., 0] / rows.shape[-1]
    return 2 * sums[..., 0] / np.maximum(1, sums[..., 1] + sums[..., 2])


def _counts(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """How often each row is in a sample: a sum over samples is then one product for all runs."""
    samples = rows.reshape(-1, rows.shape[-1])
    shifted = samples + num_rows * np.arange(len(samples))[:, None]
    counts = np.bincount(shifted.ravel(), minlength=num_rows * len(samples))
    return counts.reshape(*rows.shape[:-1], num_rows).astype(np.float64)


def _spearman(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks of two columns, 0 where one does not vary."""
    total = counts.sum(-1, keepdims=True)
    predicted, gold = (_ranks(column, counts) - (total + 1) / 2 for column in values.T)
    spread = np.sqrt((counts * predicted**2).sum(-1) * (counts * gold**2).sum(-1))
    return np.divide((counts * predicted * gold).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)


def _ranks(column: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each row's value in samples that have it `counts` times; equal ones share the mean of their ranks."""
    order = np.argsort(column, kind="stable")
    new = np.flatnonzero(np.diff(column[order], prepend=np.nan) != 0)
    of_value = np.add.reduceat(counts[..., order], new, axis=-1)
    ranks = of_value.cumsum(-1) - (of_value - 1) / 2
    place = np.empty(len(column), np.int64)
    place[order] = np.repeat(np.arange(len(new)), np.diff(np.append(new, len(column))))
    return ranks[..., place]
