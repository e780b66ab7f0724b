"""Classification: cross entropy over the labels, accuracy (and one class's F1) over the validation rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig
from fastpeft.data.predictions import Answer
from fastpeft.data.rows import HALF_PAIR, DataError, Row, is_unicode, label_text
from fastpeft.data.source import TRAIN, Source
from fastpeft.runs.store import MAJORITY
from fastpeft.signals import Need
from fastpeft.tasks.base import Count
from fastpeft.tasks.label_spelling import nearest_spelling, spelling_warnings
from fastpeft.tasks.sequence_classification.datasets import DATASETS
from fastpeft.tasks.sequences.label_index import LabelIndex, class_names, is_whole_number, marks_no_label
from fastpeft.tasks.sequences.reading import LabelledTexts, TextSplit, read_texts, source_columns
from fastpeft.tasks.sequences.scoring import Answers
from fastpeft.tasks.sequences.task import SequenceTask
from fastpeft.tasks.statistics import class_statistics

MAX_INFERRED_LABELS = 100
"""More different values, and more than one in ten rows: not labels, unless they are named."""

_MARKS = ("-", "-1")
"""No label in some data, a class in others."""
MAX_PLAIN_NUMBERS = 10
"""More whole numbers than these may be scores: the run says what they are taken for."""

_EXAMPLE = """\
batch = tokenizer({texts}, truncation=True, max_length={max_length}, return_tensors="pt")
print(model.config.id2label[model(**batch).logits.argmax(-1).item()])
"""


class SequenceClassification(SequenceTask):
    kind: ClassVar[str] = "classification"
    problem_type: ClassVar[str] = "single_label_classification"
    label_dtype: ClassVar[type] = np.int64
    datasets = DATASETS
    metric = "accuracy"

    def __init__(
        self,
        name: str,
        texts: LabelledTexts,
        label_names: tuple[str, ...],
        config: DatasetConfig,
        evaluation: EvaluationConfig,
        f1_label: str | None = None,
    ) -> None:
        self.label_names = label_names
        self.f1_class = label_names.index(f1_label) if f1_label in label_names else None
        super().__init__(name, texts, config, evaluation)
        there = set(texts.train.labels)
        absent = [label for i, label in enumerate(label_names) if i not in there]
        if absent:
            self.notes.append(
                f"no training row has the label {', '.join(absent)}: are dataset.name and dataset.labels those of the "
                "data?"
            )

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        known = source.known
        given = tuple(config.labels) if config.labels else known.labels if known else None
        column = source_columns(config, source).label
        classes = class_names(source, column, given)
        counts: Counter[str | None] = Counter()
        for value, count in () if given or classes else _tally(source.read(TRAIN, [column]).rows, column).items():
            counts[label_text(value)] += count
        labels = _Labels(config, given or classes, counts)
        names = {column: classes} if classes else None
        texts = read_texts(config, source, labels.fault, labels.reader, names, classes_of=lambda label: (label,))
        assert labels.index is not None
        f1_label = known.f1_label if known else None
        task = cls(source.name, texts, labels.index.names, config, evaluation, f1_label)
        task.notes += labels.notes()
        return task

    def describe(self) -> str:
        train = self.texts.train
        shares = Counter(train.labels)
        labels = ", ".join(f"{name} {shares[i] / len(train):.0%}" for i, name in enumerate(self.label_names))
        return f"{self.name}: {len(train):,} training rows ({labels}), {len(self.texts.validation):,} validation rows"

    def label_words(self, label: int) -> Sequence[str]:
        return (self.label_names[label],)

    def warnings(self) -> list[str]:
        train, scored = (
            {self.label_names[i] for i in rows.labels} for rows in (self.texts.train, self._validation_rows)
        )
        only = [
            f"every {what} row has the label {next(iter(labels))!r}: {so}"
            for what, labels, so in (
                ("training", train, "there is nothing to tell apart"),
                ("validation", scored, "accuracy says nothing, since the same answer to every row is right"),
            )
            if len(labels) == 1
        ]
        return only + spelling_warnings(self.label_names)

    def row_losses(self, logits_NC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits_NC, labels, reduction="sum")

    def statistics(
        self, logits_NC: torch.Tensor, labels: torch.Tensor, num_items: Count, needs: Collection[Need]
    ) -> dict[str, torch.Tensor]:
        return class_statistics(logits_NC, labels, num_items, needs)

    def metrics(self, answers: Answers, labels: np.ndarray) -> tuple[float, dict[str, float], dict[str, dict]]:
        """Accuracy, and beside it the share of the commonest class. F1 is 2 TP / (2 TP + FP + FN), and 0 where the
        class neither is there nor is predicted."""
        predicted = answers.logits_NC.argmax(-1).numpy()
        accuracy = float((predicted == labels).mean())
        majority = {MAJORITY: float(np.bincount(labels).max() / len(labels))}
        if self.f1_class is None:
            return accuracy, majority, {}
        is_class, says_class = labels == self.f1_class, predicted == self.f1_class
        named = int(is_class.sum() + says_class.sum())
        return accuracy, {"f1": 2 * int((is_class & says_class).sum()) / max(1, named)} | majority, {}

    def row_answers(self, answers: Answers, labels: np.ndarray) -> Iterable[Answer]:
        names, predicted = self.label_names, answers.logits_NC.argmax(-1).tolist()
        return (
            Answer(names[gold], names[said], correct=gold == said) for gold, said in zip(labels.tolist(), predicted)
        )

    def card_task(self) -> str:
        return f"{self.name}, labels {', '.join(self.label_names)}"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        return _EXAMPLE.format(texts=self._texts_of_card(), max_length=max_length)


class _Labels:
    """Label names: those that are given, or those of the training rows."""

    def __init__(self, config: DatasetConfig, names: tuple[str, ...] | None, counts: Mapping[str | None, int]) -> None:
        """
        Args:
            counts: of the training rows' labels, where nothing names them.
        """
        self._config, self._given, self._counts = config, names, counts
        self._no_label = set(LabelIndex.MISSING) - set(names) if names else marks_no_label(counts)
        self._usable: set[str] = set()
        """Labels that were looked at."""
        self._num_padded: dict[str, int] = {}
        """Of each split the labels with blanks at their ends."""
        self._other = config.name if config.path is not None and config.name != "local" else None
        self.index: LabelIndex | None = None

    def fault(self, values: dict[str, Any], column: str) -> str | None:
        label = values.get(column)
        text = None if isinstance(label, (dict, list)) else label_text(label)
        if text in self._usable:
            return None
        if text is not None and text not in self._no_label:
            if not is_unicode(text):
                return f"column {column!r} {HALF_PAIR}"
            self._usable.add(text)
            return None
        advice = "; where it is a class, name every label in dataset.labels" if text in _MARKS else ""
        return f"column {column!r} holds {label!r}, which is no label{advice}"

    def notes(self) -> Iterator[str]:
        """What the labels were taken for."""
        yield from (
            f"{source}: {count:,} labels have blanks at their ends, which are left out"
            for source, count in self._num_padded.items()
            if count
        )
        if self._given or self.index is None:
            return
        names = self.index.names
        yield from (
            f"the label {mark} is taken for a class: {self._counts[mark]:,} training rows have it"
            for mark in _MARKS
            if mark in names
        )
        if len(names) > MAX_PLAIN_NUMBERS and all(map(is_whole_number, names)):
            yield f"{len(names)} whole numbers are taken for classes; where they are scores set dataset.task=regression"

    def reader(self, split: TextSplit) -> Callable[[Row], int]:
        column = split.columns.label
        if self.index is None:
            self.index = self._make_index(split, column)
        index = self.index
        found = _tally(split.rows, column).items()
        padded = (count for value, count in found if isinstance(value, str) and value != value.strip())
        self._num_padded[split.source] = sum(padded)

        def number(row: Row) -> int:
            value = label_text(row.values[column])
            found = index(value)
            if found is None:
                raise DataError(
                    f"{split.source}:{row.line}: unknown label {value!r}; {self._advice(str(value), index)}"
                )
            return found

        return number

    def _advice(self, label: str, index: LabelIndex) -> str:
        near = nearest_spelling(label, index.names)
        spelling = f"It differs from {near!r} in spelling only: write them alike. " if near else ""
        other = f"; data other than {self._other} needs a dataset.name of its own" if self._other else ""
        return (
            f"known: {', '.join(index.names)}. {spelling}Name every label in dataset.labels, in the order of their "
            f"numbers{other}"
        )

    def _make_index(self, split: TextSplit, column: str) -> LabelIndex:
        if self._given:
            index = LabelIndex(self._given)
        else:
            index = LabelIndex.from_values({str(label_text(row.values[column])) for row in split.rows})
        if len(index.names) < 2:
            raise DataError(f"{split.source}: one label only ({index.names}); a classifier needs two")
        if not self._given and len(index.names) > max(MAX_INFERRED_LABELS, len(split.rows) // 10):
            raise DataError(
                f"{split.source}: the label column holds {len(index.names):,} different values in "
                f"{len(split.rows):,} rows, such as {index.names[0]!r}: set dataset.columns.label, or name the labels "
                "in dataset.labels; for scores set dataset.task=regression"
            )
        return index


def _tally(rows: list[Row], column: str) -> Counter[Any]:
    """How often each value stands there; lists and objects are no labels."""
    values = (row.values.get(column) for row in rows)
    return Counter(value for value in values if not isinstance(value, (list, dict)))
