"""Base of tasks with one label per row, predicted by a head over the encoder's pooled output.

Shapes: N rows, C outputs of the head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig
from fastpeft.data.batches import Batch, largest_evaluation_batch
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.predictions import Answer, AnsweredRows
from fastpeft.data.source import TEST, TRAIN, VALIDATION
from fastpeft.data.splitting import sample_note
from fastpeft.device_memory import TokenLimits, unmeasured
from fastpeft.models.backbone import Backbone
from fastpeft.models.lens import FirstLayer
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss, Count, ExportCheck, Score, Shrink, Stop, Task
from fastpeft.tasks.self_check import check_batches, check_tokens, varlen_fault
from fastpeft.tasks.sequences.examples import Encoded, Examples, collate, encode
from fastpeft.tasks.sequences.reading import LabelledTexts
from fastpeft.tasks.sequences.scoring import Answers, answer_rows, time_rows

CHECK_ROWS = 64
_CHECK_BATCH = 16


class SequenceTask(Task[Encoded]):
    """What a kind adds: how labels are read, `problem_type`, the loss of rows, and the metrics of all answers."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    pipeline_tag: ClassVar[str] = "text-classification"
    problem_type: ClassVar[str]
    """Of transformers: which loss and which activation a reader of the export takes."""
    label_dtype: ClassVar[type]

    def __init__(self, name: str, texts: LabelledTexts, config: DatasetConfig, evaluation: EvaluationConfig) -> None:
        self.name, self.texts = name, texts
        self._config, self._evaluation = config, evaluation
        self._validation_rows = texts.validation.sample(evaluation.max_examples)
        self._test_rows = None if texts.test is None else texts.test.sample(evaluation.max_test_examples)
        self.has_test = self._test_rows is not None
        if self._test_rows is not None:
            self.test_cost = _num_characters(self._test_rows) / max(1, _num_characters(self._validation_rows))
        self._first_layer: FirstLayer | None = None
        test = "" if texts.test is None else f", {len(texts.test):,} test rows"
        self.notes = [self.describe() + test, *texts.notes]
        self.notes += sample_note(len(texts.validation), evaluation.max_examples, "validation rows")
        self.notes += sample_note(len(texts.test or ()), evaluation.max_test_examples, "test rows")

    @abstractmethod
    def row_losses(self, logits_NC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The rows' losses, summed, of fp32 logits."""

    @abstractmethod
    def metrics(self, answers: Answers, labels: np.ndarray) -> tuple[float, dict[str, float], dict[str, dict]]:
        """(the task's metric, further metrics, metrics of groups) of a whole split."""

    def row_answers(self, answers: Answers, labels: np.ndarray) -> Iterable[Answer] | None:
        """Of each row what `metrics` is made of. Without it runs keep no answers, and are compared over seeds alone."""
        return None

    def statistics(
        self, logits_NC: torch.Tensor, labels: torch.Tensor, num_items: Count, needs: Collection[Need]
    ) -> dict[str, torch.Tensor]:
        """By the names of signals.Measured; the loss is the same to the bit whatever is wanted."""
        return {}

    def label_words(self, label: Any) -> Sequence[str]:
        """What the data say where `Examples.labels` has this."""
        return (str(label),)

    def specimen_labels(self) -> list[Any]:
        """As a column of labels may hold them: every label, or what spans them all."""
        return list(self.label_names) or [0, 1]

    # ---- data ------------------------------------------------------------------------------

    def rows_read(self) -> dict[str, Iterable[ReadRow]]:
        splits = {TRAIN: self.texts.train, VALIDATION: self.texts.validation, TEST: self.texts.test}
        return {name: self._rows_read(rows) for name, rows in splits.items() if rows is not None}

    def _rows_read(self, rows: Examples) -> Iterator[ReadRow]:
        columns = (rows.text,) if rows.text_pair is None else (rows.text, rows.text_pair)
        for label, *texts in zip(rows.labels, *columns):
            yield ReadRow(texts, self.label_words(label))

    def specimen(self) -> list[dict[str, Any]]:
        labels = self.specimen_labels()
        pair = {} if self.texts.train.text_pair is None else {"text_pair": "the other"}
        return [{"text": f"one text {i}", **pair, "label": labels[i % len(labels)]} for i in range(max(3, len(labels)))]

    # ---- model and tokens ------------------------------------------------------------------

    def encode(self, backbone: Backbone, device: torch.device) -> None:
        self._device = device
        max_length = self._max_length(backbone)

        def encoded(rows: Examples) -> Encoded:
            return self._encode(rows, backbone.tokenizer, max_length, backbone.reads_segments).on(device)

        self.train, self.validation = encoded(self.texts.train), encoded(self._validation_rows)
        self._test = None if self._test_rows is None else encoded(self._test_rows)
        for split, rows in self._by_name().items():
            if rows.num_truncated:
                self.notes.append(f"{rows.num_truncated:,} {split} rows were cut to {max_length} tokens")
        if max_length < self._config.max_length:
            self.notes.append(
                f"dataset.max_length is {self._config.max_length}, but the model takes {max_length} tokens"
            )

    def check(self, model: nn.Module, backbone: Backbone) -> None:
        check_tokens(backbone, self._by_name())
        padded, notes = check_batches(model, backbone, self.train, _rows_logits)
        self.train, self.validation = replace(self.train, padded=padded), replace(self.validation, padded=padded)
        self._test = self._test and replace(self._test, padded=padded)
        self.notes += notes

    def check_varlen(self, model: nn.Module, backbone: Backbone) -> str | None:
        return varlen_fault(model, backbone, self.train, _rows_logits)

    def _by_name(self) -> dict[str, Encoded]:
        splits = {"training": self.train, "validation": self.validation}
        return splits if self._test is None else splits | {"test": self._test}

    def _encode(self, examples: Examples, tokenizer: Any, max_length: int, segments: bool) -> Encoded:
        return encode(examples, tokenizer, max_length, segments, cut=self._config.cut, dtype=self.label_dtype)

    def _max_length(self, backbone: Backbone) -> int:
        return min(self._config.max_length, backbone.max_positions or self._config.max_length)

    # ---- training --------------------------------------------------------------------------

    def num_items(self, rows: np.ndarray) -> int:
        return len(rows)

    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        return collate(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch, num_items: Count, needs: Collection[Need] = ()) -> BatchLoss:
        if Need.LENS in needs and self._first_layer is None:
            self._first_layer = FirstLayer(model)
        lens = self._first_layer if Need.LENS in needs else None
        with nullcontext() if lens is None else lens.watching():
            logits = model(**batch.inputs).logits.float()
        loss = self.row_losses(logits, batch.labels) / num_items
        with torch.no_grad():
            statistics = self.statistics(logits.detach(), batch.labels, num_items, needs)
            if lens is not None:
                entropy = self.entropy(lens.read_classes(batch.sequences))
                statistics["lens_entropy"] = entropy.mean() * (len(batch.labels) / num_items)
        return BatchLoss(loss, statistics)

    def entropy(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """N, nats: of what the logits predict."""
        return torch.special.entr(logits_NC.softmax(1)).sum(1)

    # ---- evaluation ------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        answers = answer_rows(model, self.validation, self.row_losses, limits.evaluation, self._device, stop, shrink)
        return None if answers is None else self._score(answers, self.validation.labels, self._validation_rows)

    def evaluate_test(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        assert self._test is not None
        assert self._test_rows is not None
        answers = answer_rows(model, self._test, self.row_losses, limits.evaluation, self._device, stop, shrink)
        return None if answers is None else self._score(answers, self._test.labels, self._test_rows)

    def _score(self, answers: Answers, labels: np.ndarray, rows: Examples) -> Score:
        value, more, groups = self.metrics(answers, labels)
        answered = partial(self._answered, answers, labels, rows)
        return Score(value, answers.mean_loss, len(labels), more, groups, answered=answered)

    def _answered(self, answers: Answers, labels: np.ndarray, rows: Examples) -> AnsweredRows | None:
        found = self.row_answers(answers, labels)
        return None if found is None else zip(self._rows_read(rows), found, strict=True)

    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        return time_rows(model, self.validation, limits.evaluation, self._device)

    @property
    def num_validation(self) -> int:
        return len(self._validation_rows)

    def sampled(self, num_rows: int, backbone: Backbone, device: torch.device) -> Self:
        smaller, rows = copy(self), self._validation_rows.sample(num_rows)
        encoded = self._encode(rows, backbone.tokenizer, self._max_length(backbone), backbone.reads_segments)
        smaller._validation_rows = rows
        smaller.validation = replace(encoded.on(device), padded=self.validation.padded)
        return smaller

    @torch.inference_mode()
    def try_evaluation(self, model: nn.Module, limits: TokenLimits) -> None:
        split, rows = largest_evaluation_batch((self.validation, self._test), limits.evaluation)
        model(**collate(split, rows, self._device).inputs)

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        split, rows = largest_evaluation_batch((self.validation, self._test), limits.evaluation)
        return len(rows), int(split.widths[rows].max())

    # ---- export ----------------------------------------------------------------------------

    def model_settings(self) -> dict[str, Any]:
        labels = dict(enumerate(self.label_names))
        named = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}} if labels else {}
        return named | {"problem_type": self.problem_type}

    def load_arguments(self) -> dict[str, Any]:
        return {"num_labels": self.num_outputs, "ignore_mismatched_sizes": True}

    def export_check(self, backbone: Backbone) -> ExportCheck:
        return _Check(self, backbone)

    def _texts_of_card(self) -> str:
        return '"one text"' if self.texts.train.text_pair is None else '"one text", "the other"'


class _Check(ExportCheck):
    where = "validation rows"

    def __init__(self, task: SequenceTask, backbone: Backbone) -> None:
        self._task, self._rows = task, task._validation_rows
        self._tokenizer, self._segments = backbone.tokenizer, backbone.reads_segments
        self.metric, self.num_validation = task.metric, len(self._rows)
        self.max_length = task._max_length(backbone)
        self._encoded: Encoded | None = None

    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        chosen = np.linspace(0, len(self._rows) - 1, min(CHECK_ROWS, len(self._rows))).astype(int).tolist()
        encoded = self._task._encode(self._rows.pick(chosen), tokenizer, self.max_length, self._segments)
        return sample_logits(model, encoded, device)

    def score(self, model: nn.Module, device: torch.device) -> float:
        task = self._task
        if self._encoded is None:
            self._encoded = task._encode(self._rows, self._tokenizer, self.max_length, self._segments)
        answers = answer_rows(model, self._encoded, task.row_losses, unmeasured(task._evaluation.batch_tokens), device)
        assert answers is not None
        return task._score(answers, self._encoded.labels, self._rows).value


def _num_characters(examples: Examples) -> int:
    return sum(len(text) for texts in examples.texts for text in texts)


def _rows_logits(model: nn.Module, inputs: dict[str, Any], lengths: Sequence[int]) -> list[torch.Tensor]:
    return list(model(**inputs).logits)


@torch.inference_mode()
def sample_logits(model: nn.Module, encoded: Encoded, device: torch.device) -> torch.Tensor:
    """N x C, on the CPU, in the rows' order."""
    rows = np.array_split(np.arange(len(encoded)), -(-len(encoded) // _CHECK_BATCH))
    return torch.cat([model(**collate(encoded, part, device).inputs).logits.float().cpu() for part in rows])
