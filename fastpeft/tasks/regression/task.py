"""Regression: a number for a text, or for a pair of texts, such as how alike two sentences are.

What a user has to know:

- `dataset.task=regression` asks for it. Left at `auto`, a label column whose values are numbers, not all of them whole,
  is taken for scores, and the run says so. Whole numbers are classes, so that stars from 1 to 5 need the word.
- A file without a header is read by numbers of columns, from 0: of STS-B's files `dataset.columns.text=5
  dataset.columns.text_pair=6 dataset.columns.label=4`.
- Scores are learned as they stand: the model has one output and its loss is the mean squared error, as transformers
  computes it for problem_type regression. Scores in the hundreds ask for a smaller learning rate, or for other units.
- The metric is Spearman's rank correlation, from -1 to 1; Pearson's and the mean squared error stand beside it. Where
  the model says the same of every row there is no correlation, and 0 is reported.
- In a column of commas such as 3,5 they stand before the decimals; in one of 1,000 and 2,500 alone they do not.
- A score that is empty, no number, NaN or infinite stops the run with its line, or is left out by
  `dataset.on_bad_row=skip`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig
from fastpeft.data.predictions import Answer
from fastpeft.data.rows import Row
from fastpeft.data.source import TRAIN, Source
from fastpeft.signals import Need
from fastpeft.tasks.base import Count
from fastpeft.tasks.regression.datasets import DATASETS
from fastpeft.tasks.sequences.reading import MOSTLY, TextSplit, guess_columns, read_texts, source_columns
from fastpeft.tasks.sequences.scoring import Answers
from fastpeft.tasks.sequences.task import SequenceTask

_COMMA = re.compile(r"[-+]?[0-9]*,([0-9]+)")
LARGEST = float(np.finfo(np.float32).max)

_EXAMPLE = """\
batch = tokenizer({texts}, truncation=True, max_length={max_length}, return_tensors="pt")
print(model(**batch).logits.item())  # a score such as {example:g}
"""


class Regression(SequenceTask):
    kind: ClassVar[str] = "regression"
    problem_type: ClassVar[str] = "regression"
    label_dtype: ClassVar[type] = np.float32
    datasets = DATASETS
    metric = "spearman"

    @property
    def num_outputs(self) -> int:
        return 1

    @classmethod
    def recognises(cls, config: DatasetConfig, source: Source) -> str | None:
        """The labels are numbers, and not every one is whole: whole numbers are classes unless dataset.task says."""
        column = guess_columns(config, source).label
        if column is None or config.labels or source.class_names(TRAIN, column) is not None:
            return None
        values = _values(source, column)
        has_commas = are_decimal_commas(values)
        found = [number_of(value, has_commas) for value in values]
        scores = [number for number in found if number is not None]
        if len(scores) < MOSTLY * len(found) or all(score.is_integer() for score in scores):
            return None
        commas = ", with decimal commas" if has_commas else ""
        return f"column {column!r} holds numbers from {min(scores):g} to {max(scores):g}, not all of them whole{commas}"

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        scores = _Scores(are_decimal_commas(_values(source, source_columns(config, source).label)))
        return cls(source.name, read_texts(config, source, scores.fault, scores.reader), config, evaluation)

    def describe(self) -> str:
        scores = np.array(self.texts.train.labels)
        return (
            f"{self.name}: {len(scores):,} training rows (scores {scores.min():g} to {scores.max():g}, mean "
            f"{scores.mean():.3g}), {len(self.texts.validation):,} validation rows"
        )

    def specimen_labels(self) -> list[float]:
        scores = self.texts.train.labels
        return [min(scores), float(np.median(scores)), max(scores)]

    def row_losses(self, logits_NC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(logits_NC.squeeze(1), labels, reduction="sum")

    def statistics(
        self, logits_NC: torch.Tensor, labels: torch.Tensor, num_items: Count, needs: Collection[Need]
    ) -> dict[str, torch.Tensor]:
        """Fisher information of a normal distribution of unit variance round the output: the squared error's gradient,
        halved. Its entropy is a constant, and counts as 0."""
        if Need.TOKENS not in needs:
            return {}
        square = (logits_NC.squeeze(1) - labels).square().sum() / num_items
        return {"entropy": torch.zeros_like(square), "answer_fisher": square}

    def entropy(self, logits_NC: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits_NC[:, 0])

    def metrics(self, answers: Answers, labels: np.ndarray) -> tuple[float, dict[str, float], dict[str, dict]]:
        """Spearman's rho; Pearson's r and the mean squared error beside it. A constant has no correlation: it is 0."""
        predicted = answers.logits_NC[:, 0].double().numpy()
        gold = labels.astype(np.float64)
        spearman, pearson = correlations(predicted, gold)
        return spearman, {"pearson": pearson, "mse": float(np.square(predicted - gold).mean())}, {}

    def row_answers(self, answers: Answers, labels: np.ndarray) -> Iterable[Answer]:
        return map(Answer, labels.tolist(), answers.logits_NC[:, 0].tolist())

    def card_task(self) -> str:
        scores = self.texts.train.labels
        return f"{self.name}, a score from {min(scores):g} to {max(scores):g}"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        example = float(np.median(self.texts.train.labels))
        return _EXAMPLE.format(texts=self._texts_of_card(), max_length=max_length, example=example)

    def card_pipeline(self) -> str:
        return (
            '`pipeline("text-classification", model=folder)` tells the same number as `score`; its label, LABEL_0, '
            "says nothing."
        )


def correlations(predicted: np.ndarray, gold: np.ndarray) -> tuple[float, float]:
    """(Spearman's rho with ties at their mean rank, Pearson's r); 0 where one side is constant or not finite."""
    from scipy.stats import pearsonr, spearmanr

    if len(gold) < 2 or not np.isfinite(predicted).all() or np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return 0.0, 0.0
    rho, r = cast(Any, spearmanr(predicted, gold)), cast(Any, pearsonr(predicted, gold))  # made without type hints
    return float(rho.statistic), float(r.statistic)


def are_decimal_commas(values: list[Any]) -> bool:
    """Whether commas in a column's numbers stand before their decimals: 3,5 does not part thousands, 1,000 may."""
    matches = [_COMMA.fullmatch(value.strip()) for value in values if isinstance(value, str)]
    decimals = [match[1] for match in matches if match]
    return len(decimals) > len(values) / 2 and any(len(digits) != 3 for digits in decimals)


def number_of(value: Any, has_decimal_comma: bool = False) -> float | None:
    """The number that a label holds; None for anything else, True and False included, and for one that is not finite in
    fp32."""
    if has_decimal_comma and isinstance(value, str) and value.count(",") == 1 and "." not in value:
        value = value.replace(",", ".")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or "_" in str(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None


def _values(source: Source, column: str) -> list[Any]:
    return [row.values.get(column) for row in source.read(TRAIN, [column]).rows if not row.fault]


class _Scores:
    """What a label column holds."""

    def __init__(self, have_decimal_commas: bool) -> None:
        self._have_decimal_commas = have_decimal_commas

    def fault(self, values: dict[str, Any], column: str) -> str | None:
        if number_of(values.get(column), self._have_decimal_commas) is None:
            return f"column {column!r} holds {values.get(column)!r:.80}, which is no finite number"
        return None

    def reader(self, split: TextSplit) -> Callable[[Row], float]:
        column = split.columns.label

        def score(row: Row) -> float:
            number = number_of(row.values[column], self._have_decimal_commas)
            assert number is not None
            return number

        return score
