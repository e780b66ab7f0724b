"""Multi-label classification: any number of labels for a text, or for a pair of texts.

What a user has to know:

- The labels of a row stand in one column, as a list of names or of class numbers, which a csv file holds as JSON
  (`["a", "b"]`) or as Python writes it; or as a vector of zeros and ones; or in a column for each label:
  `dataset.columns.label: [a, b, c]`. All three are told from the rows, and the run says so.
- An empty list is a row without any label. A label that only validation rows have stops the run, unless dataset.labels
  names it.
- The loss is binary cross entropy, the mean over the labels, as transformers computes it for problem_type
  multi_label_classification.
- A label is given from the probability `evaluation.threshold` on. The metric is micro F1, over all pairs of a row and a
  label; macro F1, the share of rows whose labels are all right, and each label's own figures stand beside it.
- An export keeps the threshold, in export.json and in a merged model's config. transformers' pipeline reads neither: it
  tells probabilities, of the largest label only unless it is called with `top_k=None`.

Shapes: N rows, C labels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig
from fastpeft.data.predictions import Answer
from fastpeft.data.source import TRAIN, Source
from fastpeft.runs.store import MAJORITY
from fastpeft.signals import Need
from fastpeft.tasks.base import Count
from fastpeft.tasks.label_spelling import spelling_warnings
from fastpeft.tasks.multi_label.datasets import DATASETS
from fastpeft.tasks.multi_label.labels import LabelColumns, ListedLabels, listed
from fastpeft.tasks.sequences.label_index import class_names
from fastpeft.tasks.sequences.reading import MOSTLY, LabelledTexts, guess_columns, read_texts, source_columns
from fastpeft.tasks.sequences.scoring import Answers
from fastpeft.tasks.sequences.task import SequenceTask

THRESHOLD = "threshold"
"""Of a merged model's config and of export.json: the probability from which a label is given."""

_EXAMPLE = """\
batch = tokenizer({texts}, truncation=True, max_length={max_length}, return_tensors="pt")
probabilities = model(**batch).logits.sigmoid()[0]
print([model.config.id2label[i] for i, p in enumerate(probabilities.tolist()) if p >= {threshold:g}])
"""


class MultiLabel(SequenceTask):
    kind: ClassVar[str] = "multi-label"
    problem_type: ClassVar[str] = "multi_label_classification"
    label_dtype: ClassVar[type] = np.float32
    datasets = DATASETS
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
        num_lists = sum(listed(value) is not None for value in values)
        return f"column {column!r} holds lists of labels" if values and num_lists >= MOSTLY * len(values) else None

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        if isinstance(config.columns.label, list):
            columns = LabelColumns(config)
            texts = read_texts(
                config, source, columns.fault, columns.reader, classes_of=_classes_of, several_columns=True
            )
            return cls(source.name, texts, columns.names, config, evaluation)
        given, column = tuple(config.labels) if config.labels else None, source_columns(config, source).label
        classes = class_names(source, column, given)
        lists = ListedLabels(given or classes)
        names = {column: classes} if classes else None
        texts = read_texts(config, source, lists.fault, lists.reader, names, classes_of=_classes_of)
        return cls(source.name, texts, lists.names, config, evaluation)

    def describe(self) -> str:
        given_NC = np.array(self.texts.train.labels)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(self.label_names, given_NC.mean(0)))
        return (
            f"{self.name}: {len(given_NC):,} training rows with {given_NC.sum(1).mean():.2g} labels each ({shares}), "
            f"{len(self.texts.validation):,} validation rows"
        )

    def label_words(self, label: Sequence[float]) -> Sequence[str]:
        return [name for name, given in zip(self.label_names, label) if given]

    def specimen_labels(self) -> list[list[str]]:
        return [[name] for name in self.label_names]

    def warnings(self) -> list[str]:
        never = not np.any(self._validation_rows.labels)
        only = ["no validation row has a label: every score is 0"] if never else []
        return only + spelling_warnings(self.label_names)

    def row_losses(self, logits_NC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of a row the mean over its labels, as transformers has it."""
        total = nn.functional.binary_cross_entropy_with_logits(logits_NC, labels, reduction="sum")
        return total / logits_NC.shape[1]

    def statistics(
        self, logits_NC: torch.Tensor, labels: torch.Tensor, num_items: Count, needs: Collection[Need]
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

    def row_answers(self, answers: Answers, labels: np.ndarray) -> Iterable[Answer]:
        predicted_NC, gold_NC = self._given(answers), labels > 0.5
        counts = zip((predicted_NC & gold_NC).sum(1), predicted_NC.sum(1), gold_NC.sum(1))
        for gold_C, predicted_C, (hits, says, there) in zip(gold_NC, predicted_NC, counts):
            yield Answer(
                self.label_words(gold_C), self.label_words(predicted_C), counts=(int(hits), int(says), int(there))
            )

    def _given(self, answers: Answers) -> np.ndarray:
        return answers.logits_NC.sigmoid().numpy() >= self.threshold

    def metrics(self, answers: Answers, labels: np.ndarray) -> tuple[float, dict[str, float], dict[str, dict]]:
        """F1 over all (row, label) pairs; the mean of the labels' F1; the share of rows whose labels are all right.

        F1 is 2 TP / (2 TP + FP + FN), and 0 where a label neither is there nor is predicted.
        """
        predicted_NC, gold_NC = self._given(answers), labels > 0.5
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
        more = {"macro_f1": float(f1_C.mean()), "exact_rows": exact, MAJORITY: best_constant_f1(gold_NC)}
        return micro, more, groups

    def model_settings(self) -> dict[str, Any]:
        return super().model_settings() | {THRESHOLD: self.threshold}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {THRESHOLD: self.threshold}

    def card_task(self) -> str:
        return f"{self.name}, any of the labels {', '.join(self.label_names)}, each from {self.threshold:g} on"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        return _EXAMPLE.format(texts=self._texts_of_card(), max_length=max_length, threshold=self.threshold)

    def card_pipeline(self) -> str:
        return (
            '`pipeline("text-classification", model=folder, top_k=None)` tells the probability of every label. It does '
            f"not know the threshold: those from {self.threshold:g} on are given. Without `top_k` it tells the "
            "likeliest label only."
        )


def best_constant_f1(gold_NC: np.ndarray) -> float:
    """Micro F1 of the best set of labels that is given to every row: the k commonest ones, for some k."""
    counts_C = np.sort(gold_NC.sum(0))[::-1]
    given_C = len(gold_NC) * np.arange(1, len(counts_C) + 1)
    return float((2 * counts_C.cumsum() / np.maximum(1, given_C + counts_C.sum())).max())


def _classes_of(label: list[float]) -> list[int]:
    return [i for i, given in enumerate(label) if given]
