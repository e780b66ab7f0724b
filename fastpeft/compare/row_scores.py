"""Scores of the single rows of a split, from which the metric of any sample of rows can be computed."""

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
    """Scores of N rows."""

    rows: str
    """Hash of the rows: equal hashes mean the same rows in the same order."""
    form: Form
    """How `values` give the metric. share: the mean of one column. f1: 2 a / (b + c) of the sums of three columns.
    rank: Spearman's rank correlation of two columns."""
    values: np.ndarray
    """(N, 1), (N, 3) or (N, 2), by `form`."""

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of(cls, predictions: Predictions) -> RowScores | None:
        """Row scores of a run's answers. None without rows, or if a value to be ranked is not finite."""
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
    """Metrics of runs on samples of their common rows: indices (..., sample size) -> (..., runs)."""
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
    """How often each row occurs in each sample, (..., num_rows). The sums of all runs are then one matrix product."""
    samples = rows.reshape(-1, rows.shape[-1])
    shifted = samples + num_rows * np.arange(len(samples))[:, None]
    counts = np.bincount(shifted.ravel(), minlength=num_rows * len(samples))
    return counts.reshape(*rows.shape[:-1], num_rows).astype(np.float64)


def _spearman(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson correlation of the ranks of two columns; 0 if one of them is constant."""
    total = counts.sum(-1, keepdims=True)
    predicted, gold = (_ranks(column, counts) - (total + 1) / 2 for column in values.T)
    spread = np.sqrt((counts * predicted**2).sum(-1) * (counts * gold**2).sum(-1))
    return np.divide((counts * predicted * gold).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)


def _ranks(column: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rank of each row in samples that contain it `counts` times. Ties get the mean of their ranks."""
    order = np.argsort(column, kind="stable")
    new = np.flatnonzero(np.diff(column[order], prepend=np.nan) != 0)
    of_value = np.add.reduceat(counts[..., order], new, axis=-1)
    ranks = of_value.cumsum(-1) - (of_value - 1) / 2
    place = np.empty(len(column), np.int64)
    place[order] = np.repeat(np.arange(len(new)), np.diff(np.append(new, len(column))))
    return ranks[..., place]
