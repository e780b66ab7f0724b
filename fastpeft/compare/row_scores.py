"""What a run was given for each row of a split, as the numbers that its metric is made of."""

from __future__ import annotations

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
            return cls(predictions.rows, "share", np.array([[answer.correct] for answer in answers], np.float32))
        if answers[0].counts is not None:
            return cls(predictions.rows, "f1", np.array([answer.counts for answer in answers], np.float32))
        values = np.array([[number(answer.predicted), number(answer.gold)] for answer in answers])
        return cls(predictions.rows, "rank", values) if np.isfinite(values).all() else None

    def metric(self, rows: np.ndarray) -> np.ndarray:
        """Of samples of rows: ... x N indices -> ..."""
        if self.form == "share":
            return self.values[:, 0][rows].mean(-1, dtype=np.float64)
        if self.form == "f1":
            hits, said, there = (column[rows].sum(-1, dtype=np.float64) for column in self.values.T)
            return 2 * hits / np.maximum(1, said + there)
        from scipy.stats import rankdata

        predicted, gold = (rankdata(column[rows], axis=-1) for column in self.values.T)
        predicted, gold = predicted - predicted.mean(-1, keepdims=True), gold - gold.mean(-1, keepdims=True)
        spread = np.sqrt((predicted**2).sum(-1) * (gold**2).sum(-1))
        return np.divide((predicted * gold).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)
