"""Token classification: a tag for each word, such as those of named entities.

What a user has to know:

- Sentences come in columns of words, as CoNLL has them (first the word, last the tag, or dataset.columns by number), or
  as rows with a list of words and a list of tags. Tags in IOB1, IOB2, IOBES or BILOU are brought to IOB2
  (`dataset.scheme: auto`), and the run says what it found.
- A word's tag is learned, and read, on its first piece. The loss is the mean over the words of a batch.
- Sentences that are longer than the model takes are read in windows, so that no entity is lost. A word without any
  piece counts as predicted O.
- The metric is strict F1: an entity counts if its type and both ends are right. An I- tag without the beginning of its
  entity before it is none. Each type's precision, recall and F1 stand beside it.
- A test split is scored once, at the end, with the best weights.
- An export answers in transformers' pipeline with `aggregation_strategy="first"`, which reads first pieces too.
  "simple" reads every piece, and may cut words of several pieces. Either takes a lone I- tag for an entity.

Shapes: N rows, L tokens of a row, M labelled tokens of a batch, C tags.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, EvaluationConfig
from fastpeft.data.batches import Batch, evaluation_batches, largest_evaluation_batch, micro_batches
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.predictions import Answer, AnsweredRows
from fastpeft.data.source import TEST, TRAIN, VALIDATION, Source
from fastpeft.data.splitting import sample_note
from fastpeft.device_memory import TokenLimits, free_memory, is_out_of_memory, unmeasured
from fastpeft.models.backbone import Backbone
from fastpeft.models.lens import FirstLayer
from fastpeft.ranks import current, joined_parts
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss, Count, ExportCheck, Score, Shrink, Stop, Task
from fastpeft.tasks.label_spelling import spelling_warnings
from fastpeft.tasks.self_check import by_row, check_batches, check_tokens, varlen_fault
from fastpeft.tasks.statistics import class_statistics
from fastpeft.tasks.token_classification.datasets import DATASETS
from fastpeft.tasks.token_classification.encode import EncodedSentences, collate_tokens, encode_sentences
from fastpeft.tasks.token_classification.reading import TaggedSplits, holds_tagged_words, read_tagged_splits
from fastpeft.tasks.token_classification.schemes import OUTSIDE
from fastpeft.tasks.token_classification.score import count_entities, score_entities
from fastpeft.tasks.token_classification.sentences import Sentences

CHECK_SENTENCES, LENS_TOKENS = 32, 256
_TIMED_BATCHES = 4

_EXAMPLE = """\
words = {words!r}
batch = tokenizer(words, is_split_into_words=True, truncation=True, max_length={max_length}, return_tensors="pt")
tags = model(**batch).logits.argmax(-1)[0].tolist()
first = {{word: i for i, word in reversed(list(enumerate(batch.word_ids()))) if word is not None}}
print([(words[word], model.config.id2label[tags[i]]) for word, i in sorted(first.items())])
"""


class TokenClassification(Task[EncodedSentences]):
    kind: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    pipeline_tag: ClassVar[str] = "token-classification"
    datasets = DATASETS
    metric = "f1"

    def __init__(self, splits: TaggedSplits, config: DatasetConfig, evaluation: EvaluationConfig) -> None:
        self.name, self.splits, self.label_names = splits.name, splits, splits.label_names
        self._config, self._evaluation = config, evaluation
        self._sentences = splits.validation.sample(evaluation.max_examples)
        self._test_sentences = splits.test and splits.test.sample(evaluation.max_test_examples)
        self.has_test = self._test_sentences is not None
        if self._test_sentences is not None:
            self.test_cost = self._test_sentences.num_words / max(1, self._sentences.num_words)
        self._first_layer: FirstLayer | None = None
        self.notes = [self.describe(), *splits.notes]
        self.notes += sample_note(len(splits.validation), evaluation.max_examples, "validation sentences")
        self.notes += sample_note(len(splits.test or ()), evaluation.max_test_examples, "test sentences")

    @classmethod
    def recognises(cls, config: DatasetConfig, source: Source) -> str | None:
        return holds_tagged_words(config, source)

    @classmethod
    def load(cls, config: DatasetConfig, source: Source, evaluation: EvaluationConfig, seed: int) -> Self:
        return cls(read_tagged_splits(config, source), config, evaluation)

    def describe(self) -> str:
        splits, types = self.splits, [name[2:] for name in self.label_names if name.startswith("B-")]
        test = f", {len(splits.test):,} test sentences" if splits.test is not None else ""
        return (
            f"{self.name}: {len(splits.train):,} training sentences of {splits.train.num_words:,} words (entities "
            f"{', '.join(types)}), {len(splits.validation):,} validation sentences{test}"
        )

    def rows_read(self) -> dict[str, Iterable[ReadRow]]:
        splits = {TRAIN: self.splits.train, VALIDATION: self.splits.validation, TEST: self.splits.test}
        return {name: map(ReadRow, split.words, split.tags) for name, split in splits.items() if split is not None}

    def specimen(self) -> list[dict[str, Any]]:
        """Without an entity: dataset.labels, which goes with it, names the tags."""
        return [{"tokens": ["A", "sentence", str(i)], "tags": [OUTSIDE] * 3} for i in range(3)]

    def warnings(self) -> list[str]:
        types = [name[2:] for name in self.label_names if name.startswith("B-")]
        there = any(tag != OUTSIDE for tags in self._sentences.tags for tag in tags)
        only = [] if there else ["no validation sentence has an entity: F1 is 0 whatever is predicted"]
        return only + spelling_warnings(types)

    # ---- model and tokens ------------------------------------------------------------------

    def encode(self, backbone: Backbone, device: torch.device) -> None:
        self._device = device
        self.train = self._encode(self.splits.train, backbone).on(device)
        self.validation = self._encode(self._sentences, backbone).on(device)
        test = self._test_sentences
        self._test = None if test is None else self._encode(test, backbone).on(device)
        for split, encoded in (("training", self.train), ("validation", self.validation), ("test", self._test)):
            if encoded is None:
                continue
            if encoded.num_windowed:
                self.notes.append(
                    f"{encoded.num_windowed:,} {split} sentences are longer than {encoded.max_length} tokens and read "
                    "in several windows, each word tagged in one of them"
                )
            if encoded.num_words_without_piece:
                self.notes.append(
                    f"{encoded.num_words_without_piece:,} {split} words have no word piece: they are not learnt, and "
                    "count as predicted O"
                )

    def check(self, model: nn.Module, backbone: Backbone) -> None:
        splits = {"training": self.train, "validation": self.validation}
        check_tokens(backbone, splits if self._test is None else splits | {"test": self._test})
        padded, notes = check_batches(model, backbone, self.train, _tokens_logits)
        self.train, self.validation = replace(self.train, padded=padded), replace(self.validation, padded=padded)
        self._test = self._test and replace(self._test, padded=padded)
        self.notes += notes

    def check_varlen(self, model: nn.Module, backbone: Backbone) -> str | None:
        return varlen_fault(model, backbone, self.train, _tokens_logits)

    def _encode(self, sentences: Sentences, backbone: Backbone, tokenizer: Any = None) -> EncodedSentences:
        return encode_sentences(
            sentences,
            self.label_names,
            tokenizer or backbone.tokenizer,
            self._max_length(backbone),
            backbone.reads_segments,
        )

    def _max_length(self, backbone: Backbone) -> int:
        return min(self._config.max_length, backbone.max_positions or self._config.max_length)

    # ---- training --------------------------------------------------------------------------

    def num_items(self, rows: np.ndarray) -> int:
        return len(self.train.labelled(rows))

    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        return collate_tokens(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch, num_items: Count, needs: Collection[Need] = ()) -> BatchLoss:
        if Need.LENS in needs and self._first_layer is None:
            self._first_layer = FirstLayer(model)
        lens = self._first_layer if Need.LENS in needs else None
        with nullcontext() if lens is None else lens.watching():
            logits_MC, labels_M = _labelled_logits(model, batch)
        loss = nn.functional.cross_entropy(logits_MC, labels_M, reduction="sum") / num_items
        with torch.no_grad():
            statistics = class_statistics(logits_MC.detach(), labels_M, num_items, needs)
            if lens is not None:
                entropy = torch.special.entr(lens.read_tokens(_spread(batch.rows, LENS_TOKENS)).softmax(1)).sum(1)
                statistics["lens_entropy"] = entropy.mean() * (len(labels_M) / num_items)
        return BatchLoss(loss, statistics)

    # ---- evaluation ------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        return self._score(model, self.validation, self._sentences, limits.evaluation, stop, shrink)

    def evaluate_test(self, model: nn.Module, limits: TokenLimits, stop: Stop, shrink: Shrink | None) -> Score | None:
        assert self._test is not None
        assert self._test_sentences is not None
        return self._score(model, self._test, self._test_sentences, limits.evaluation, stop, shrink)

    def _score(
        self,
        model: nn.Module,
        encoded: EncodedSentences,
        sentences: Sentences,
        max_tokens: int,
        stop: Stop = lambda: False,
        shrink: Shrink | None = None,
    ) -> Score | None:
        """F1 of whole entities; precision, recall and the share of words with the right tag beside it."""
        found = _predict(model, encoded, max_tokens, self._device, stop, shrink)
        if found is None:
            return None
        predicted, mean_loss = found
        tags = [[self.label_names[label] for label in labels] for labels in encoded.on_words(predicted)]
        scores = score_entities(sentences.tags, tags, self.label_names)
        more = {"precision": scores.precision, "recall": scores.recall, "token_accuracy": scores.token_accuracy}
        groups = {name: dict(vars(one)) for name, one in scores.per_type.items()}
        answered = partial(self._answered, sentences, tags)
        return Score(scores.f1, mean_loss, len(sentences), more, groups, answered=answered)

    def _answered(self, sentences: Sentences, tags: list[list[str]]) -> AnsweredRows:
        counts = count_entities(sentences.tags, tags, self.label_names)
        answers = (Answer(gold, said, counts=own) for gold, said, own in zip(sentences.tags, tags, counts))
        return zip(map(ReadRow, sentences.words, sentences.tags), answers, strict=True)

    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        groups = evaluation_batches(self.validation, limits.evaluation)
        chosen = [groups[i * (len(groups) - 1) // max(1, _TIMED_BATCHES - 1)] for i in range(_TIMED_BATCHES)]
        seconds = []
        for rows in [chosen[-1], *chosen]:  # the first is a warm-up
            start = time.perf_counter()
            _predict_batch(model, collate_tokens(self.validation, rows, self._device))[0].sum().item()
            seconds.append((time.perf_counter() - start) / self._area(rows))
        return sum(seconds[1:]) / _TIMED_BATCHES * sum(map(self._area, groups))

    def _area(self, rows: np.ndarray) -> int:
        return len(rows) * int(self.validation.lengths[rows].max())

    @property
    def num_validation(self) -> int:
        return len(self._sentences)

    def sampled(self, num_rows: int, backbone: Backbone, device: torch.device) -> Self:
        smaller, sentences = copy(self), self._sentences.sample(num_rows)
        smaller._sentences = sentences
        smaller.validation = replace(self._encode(sentences, backbone).on(device), padded=self.validation.padded)
        return smaller

    def try_evaluation(self, model: nn.Module, limits: TokenLimits) -> None:
        split, rows = largest_evaluation_batch((self.validation, self._test), limits.evaluation)
        _predict_batch(model, collate_tokens(split, rows, self._device))

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        split, rows = largest_evaluation_batch((self.validation, self._test), limits.evaluation)
        return len(rows), int(split.widths[rows].max())

    # ---- export ----------------------------------------------------------------------------

    def model_settings(self) -> dict[str, Any]:
        labels = dict(enumerate(self.label_names))
        return {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}

    def load_arguments(self) -> dict[str, Any]:
        return {"num_labels": len(self.label_names), "ignore_mismatched_sizes": True}

    def export_check(self, backbone: Backbone) -> ExportCheck:
        return _Check(self, backbone)

    def card_task(self) -> str:
        return f"{self.name}, tags {', '.join(self.label_names)}, each on the first piece of its word"

    def card_example(self, max_length: int, eos_token_ids: tuple[int, ...]) -> str:
        words = next((words for words in self.splits.validation.words if 3 <= len(words) <= 12), ["A", "sentence"])
        return _EXAMPLE.format(words=words, max_length=max_length)

    def card_pipeline(self) -> str:
        return (
            '`pipeline("token-classification", model=folder, aggregation_strategy="first")` tells the entities of a '
            'text: tags were learned on the first piece of each word. "simple" gives the same where every word is one '
            "piece, and may cut the others. Either takes an I- tag without its B- for an entity, which the F1 above "
            "does not."
        )


class _Check(ExportCheck):
    where = "words of validation sentences"

    def __init__(self, task: TokenClassification, backbone: Backbone) -> None:
        self._task, self._backbone = task, backbone
        self.metric, self.num_validation = task.metric, len(task._sentences)
        self.max_length = task._max_length(backbone)

    @torch.inference_mode()
    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        sentences = self._task._sentences
        chosen = np.linspace(0, len(sentences) - 1, min(CHECK_SENTENCES, len(sentences))).astype(int).tolist()
        encoded = self._task._encode(sentences.pick(chosen), self._backbone, tokenizer)
        batches = [collate_tokens(encoded, np.array([row]), device) for row in range(len(encoded))]
        return torch.cat([_labelled_logits(model, batch)[0].cpu() for batch in batches])

    def score(self, model: nn.Module, device: torch.device) -> float:
        task = self._task
        task._device = device
        encoded = task._encode(task._sentences, self._backbone)
        score = task._score(model, encoded, task._sentences, unmeasured(task._evaluation.batch_tokens))
        assert score is not None
        return score.value


def _tokens_logits(model: nn.Module, inputs: dict[str, Any], lengths: Sequence[int]) -> list[torch.Tensor]:
    return by_row(model(**inputs).logits, lengths)


def _labelled_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(M x C in fp32, M) at the labelled tokens."""
    assert batch.rows is not None
    logits_NLC = model(**batch.inputs).logits
    return logits_NLC.flatten(0, 1)[batch.rows].float(), batch.labels.flatten()[batch.rows]


@torch.inference_mode()
def _predict_batch(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted labels of the labelled tokens, the sum of their losses), on the device."""
    logits_MC, labels_M = _labelled_logits(model, batch)
    loss = nn.functional.cross_entropy(logits_MC, labels_M, reduction="sum")
    return logits_MC.argmax(-1), loss.double()


def _predict(
    model: nn.Module,
    encoded: EncodedSentences,
    max_tokens: int,
    device: torch.device,
    stop: Stop,
    shrink: Shrink | None,
) -> tuple[np.ndarray, float] | None:
    """(labels in the order of the labelled tokens, nats a labelled token); None if `stop` said so before the end.

    Leaves the model in the mode it was in, and draws no random numbers. `shrink` as in Task.evaluate.
    """
    training, parts = model.training, []
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    try:
        groups = deque(current().share(evaluation_batches(encoded, max_tokens)))
        while groups:
            if stop():
                return _all_predicted(None, loss, encoded)
            rows, found = groups[0], None
            try:
                found = _predict_batch(model, collate_tokens(encoded, rows, device))
            except RuntimeError as error:
                if shrink is None or not is_out_of_memory(error):
                    raise
            if found is None:  # outside of the handler, whose frames hold the activations
                assert shrink is not None
                free_memory()
                max_tokens = shrink(len(rows), int(encoded.widths[rows].max()))
                groups = deque(micro_batches(encoded, np.concatenate(groups), max_tokens))
                continue
            labels, loss_of_batch = found
            parts.append((encoded.labelled(rows), labels))
            loss += loss_of_batch
            groups.popleft()
    finally:
        model.train(training)
    return _all_predicted(parts, loss, encoded)


def _all_predicted(
    parts: list[tuple[np.ndarray, torch.Tensor]] | None, loss: torch.Tensor, encoded: EncodedSentences
) -> tuple[np.ndarray, float] | None:
    """Of all ranks; None where one of them was stopped, and has None."""
    found = joined_parts(parts, loss)
    if found is None:
        return None
    places, labels, total = found
    predicted = np.empty(len(encoded.sentence), dtype=np.int64)
    predicted[places.numpy()] = labels.numpy()
    return predicted, total / len(predicted)


def _spread(rows: torch.Tensor | None, most: int) -> torch.Tensor:
    """At most `most` of them, evenly spaced."""
    assert rows is not None
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
