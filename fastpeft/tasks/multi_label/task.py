"""Several labels a text: binary cross entropy of each label, micro and macro F1 over the validation rows.

Shapes: N rows, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig
from fastpeft.data.rows import DataError, Row, label_text
from fastpeft.data.source import TRAIN, Source
from fastpeft.signals import Need
from fastpeft.tasks.sequences.labels import LabelIndex
from fastpeft.tasks.sequences.reading import LabelledTexts, TextSplit, guess_columns, read_texts
from fastpeft.tasks.sequences.scoring import Answers
from fastpeft.tasks.sequences.task import SequenceTask

THRESHOLD = "threshold"
"""Of a merged model's config and of export.json: the probability from which a label is given."""

_EXAMPLE = """\
batch = tokenizer({texts}, truncation=True, max_length={max_length}, return_tensors="pt")
probabilities = model(**batch).logits.sigmoid()[0]
print([model.config.id2label[i] for i, p in enumerate(probabilities.tolist()) if p >= {threshold:g}])
"""
_YES, _NO = (1, True, "1", "1.0", "true", "True"), (0, False, "0", "0.0", "false", "False", "")


class MultiLabel(SequenceTask):
    kind: ClassVar[str] = "multi-label"
    problem_type: ClassVar[str] = "multi_label_classification"
    label_dtype: ClassVar[type] = np.float32
    metric = "micro_f1"

    def __init__(
        self,
        name: str,
        texts: LabelledTexts,
        label_names: tuple[str, ...],
        config: DatasetConfig,
        evaluation: EvaluationConfig,
    ) -> None:
        self.label_names, self.threshold = label_names, evaluation.threshold
        super().__init__(name, texts, config, evaluation)
        never = [label for label, count in zip(label_names, np.sum(texts.train.labels, axis=0)) if not count]
        if never:
            self.notes.append(f"no training row has the label {', '.join(never)}: it cannot be learnt")

    @classmethod
    def recognises(cls, config: DatasetConfig, source: Source) -> str | None:
        """Labels in lists, in most rows, or several columns of zeros and ones."""
        if isinstance(config.columns.label, list):
            return f"dataset.columns.label names {len(config.columns.label)} columns"
        column = guess_columns(config, source).label
        if column is None:
            return None
        values = [row.values.get(column) for row in source.read(TRAIN, [column]).rows if not row.fault]
        num_lists = sum(_listed(value) is not None for value in values)
        return f"column {column!r} holds lists of labels" if num_lists > len(values) / 2 else None

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        one_hot = isinstance(config.columns.label, list)
        labels = _OneHot(config) if one_hot else _Lists(config, _class_names(config, source))
        names = {labels.column: labels.classes} if labels.classes else None
        texts = read_texts(config, source, labels.fault, labels.reader, names)
        return cls(source.name, texts, labels.names, config, evaluation)

    def describe(self) -> str:
        given_NC = np.array(self.texts.train.labels)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(self.label_names, given_NC.mean(0)))
        return (
            f"{self.name}: {len(given_NC):,} training rows with {given_NC.sum(1).mean():.2g} labels each ({shares}), "
            f"{len(self.texts.validation):,} validation rows"
        )

    @property
    def num_outputs(self) -> int:
        return len(self.label_names)

    def row_losses(self, logits_NC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of a row the mean over its labels, as transformers has it."""
        total = nn.functional.binary_cross_entropy_with_logits(logits_NC, labels, reduction="sum")
        return total / logits_NC.shape[1]

    def statistics(
        self, logits_NC: torch.Tensor, labels: torch.Tensor, num_items: int, needs: Collection[Need]
    ) -> dict[str, torch.Tensor]:
        """Means over the labels: binary entropy, and the squared error of the probability, its Fisher information."""
        if Need.TOKENS not in needs:
            return {}
        error = (logits_NC.sigmoid() - labels).square().mean(1)
        return {
            "entropy": self.entropy(logits_NC).sum() / num_items,
            "answer_fisher": error.sum() / num_items,
        }

    def entropy(self, logits_NC: torch.Tensor) -> torch.Tensor:
        p = logits_NC.sigmoid()
        return (torch.special.entr(p) + torch.special.entr(1 - p)).mean(1)

    def metrics(self, answers: Answers, labels: np.ndarray) -> tuple[float, dict[str, float], dict[str, dict]]:
        """F1 over all (row, label) pairs; the mean of the labels' F1; the share of rows whose labels are all right.

        F1 is 2 TP / (2 TP + FP + FN), and 0 where a label neither is there nor is predicted.
        """
        predicted_NC, gold_NC = answers.logits_NC.sigmoid().numpy() >= self.threshold, labels > 0.5
        hits_C, says_C, is_C = (predicted_NC & gold_NC).sum(0), predicted_NC.sum(0), gold_NC.sum(0)
        f1_C = 2 * hits_C / np.maximum(1, says_C + is_C)
        groups = {
            name: {
                "precision": float(hits / max(1, says)),
                "recall": float(hits / max(1, there)),
                "f1": float(f1),
                "support": int(there),
            }
            for name, hits, says, there, f1 in zip(self.label_names, hits_C, says_C, is_C, f1_C)
        }
        micro = float(2 * hits_C.sum() / max(1, says_C.sum() + is_C.sum()))
        exact = float((predicted_NC == gold_NC).all(1).mean())
        return micro, {"macro_f1": float(f1_C.mean()), "exact_rows": exact}, groups

    def model_settings(self) -> dict[str, Any]:
        return super().model_settings() | {THRESHOLD: self.threshold}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {THRESHOLD: self.threshold}

    def card_task(self) -> str:
        return f"{self.name}, any of the labels {', '.join(self.label_names)}, each from {self.threshold:g} on"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        return _EXAMPLE.format(texts=self._texts_of_card(), max_length=max_length, threshold=self.threshold)


class _Lists:
    """Labels of a row in one list, by names or numbers."""

    def __init__(self, config: DatasetConfig, found: tuple[str, tuple[str, ...] | None]) -> None:
        self.column, self.classes = found
        given = tuple(config.labels) if config.labels else self.classes
        self.index = LabelIndex(given) if given else None

    @property
    def names(self) -> tuple[str, ...]:
        assert self.index is not None
        return self.index.names

    def fault(self, values: dict[str, Any], column: str) -> str | None:
        if _listed(values.get(column)) is None:
            return f"column {column!r} holds {values.get(column)!r:.80}, expected a list of labels"
        return None

    def reader(self, split: TextSplit) -> Callable[[Row], list[float]]:
        column = split.columns.label
        if self.index is None:
            found = {label for row in split.rows for label in _listed(row.values[column]) or ()}
            if not found:
                raise DataError(f"{split.source}: no row has a label; set dataset.columns.label")
            self.index = LabelIndex.from_values(found)
        index = self.index

        def zeros_and_ones(row: Row) -> list[float]:
            given = [0.0] * len(index.names)
            for label in _listed(row.values[column]) or ():
                number = index(label)
                if number is None:
                    raise DataError(
                        f"{split.source}:{row.line}: unknown label {label!r}; known: {', '.join(index.names)}. "
                        "Name every label in dataset.labels, in the order of their numbers"
                    )
                given[number] = 1.0
            return given

        return zeros_and_ones


class _OneHot:
    """A column of zeros and ones for each label."""

    classes = None
    column = ""

    def __init__(self, config: DatasetConfig) -> None:
        assert isinstance(config.columns.label, list)
        self._columns = [str(column) for column in config.columns.label]
        self.names = tuple(config.labels or self._columns)
        if len(self.names) != len(self._columns):
            raise DataError(
                f"dataset.labels: {len(self.names)} names are given for the {len(self._columns)} columns of "
                "dataset.columns.label"
            )

    def fault(self, values: dict[str, Any], column: str) -> str | None:
        for name in self._columns:
            if values.get(name) not in (*_YES, *_NO):
                return f"column {name!r} holds {values.get(name)!r:.80}, expected 0 or 1"
        return None

    def reader(self, split: TextSplit) -> Callable[[Row], list[float]]:
        return lambda row: [float(row.values[name] in _YES) for name in self._columns]


def _listed(value: Any) -> list[str] | None:
    """The labels in a list, or in a JSON list as csv files hold one; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list):
        return None
    labels = [label_text(one) for one in value]
    return [label for label in labels if label is not None] if all(labels) else None


def _class_names(config: DatasetConfig, source: Source) -> tuple[str, tuple[str, ...] | None]:
    """(label column, names of its class numbers)."""
    column = guess_columns(config, source).label
    if column is None:
        return "", None
    return column, source.class_names(TRAIN, column)
