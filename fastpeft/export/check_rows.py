"""A run's own validation rows, and what a model answers on them: how an export is compared with the trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import nn

from fastpeft.config import RunConfig
from fastpeft.data.batches import Encoded, collate, encode, evaluation_batches
from fastpeft.data.task import ClassificationTask, Examples
from fastpeft.models.backbone import Backbone
from fastpeft.models.lm_head import hidden_states
from fastpeft.tasks.causal_lm.prompts import EncodedProblems, collate_problems, encode_problems
from fastpeft.tasks.math_word_problems.reading import WordProblemTask
from fastpeft.tasks.sequence_classification.scoring import score

CHECK_ROWS = 64
CHECK_PROBLEMS, CHECK_POSITIONS = 16, 16
"""Of each of so many problems, so many of the answer's first tokens: a model's logits at all of them fill gigabytes."""

_BATCH_ROWS, _CHUNK_ROWS = 16, 256


class Rows(ABC):
    """Validation rows, tokenised as the run's trainer did it."""

    where: str
    """What a logit belongs to, in words, behind a number."""
    metric: str
    """What `score` measures."""

    def __init__(self, run: RunConfig, task: ClassificationTask | WordProblemTask, backbone: Backbone) -> None:
        self.task = task
        self._tokenizer, self._segments = backbone.tokenizer, backbone.reads_segments
        self.eos_token_ids = backbone.eos_token_ids
        self._rows = task.validation.head(run.evaluation.max_examples)
        self.max_length = min(run.dataset.max_length, backbone.max_positions or run.dataset.max_length)
        self._batch_tokens = run.evaluation.batch_tokens

    @property
    def num_validation(self) -> int:
        return len(self._rows)

    def _spread(self, most: int) -> list[int]:
        """Rows spread evenly over the split."""
        return np.linspace(0, len(self._rows) - 1, min(most, len(self._rows))).astype(int).tolist()

    @abstractmethod
    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        """Logits on a fixed sample, in the given tokenizer's numbers: N x classes, fp32, on the CPU."""

    @abstractmethod
    def score(self, model: nn.Module, device: torch.device) -> float:
        """`metric` over all validation rows, 0 to 1."""


class TextRows(Rows):
    """Of a classifier."""

    where = "validation rows"

    def __init__(self, run: RunConfig, task: ClassificationTask, backbone: Backbone) -> None:
        super().__init__(run, task, backbone)
        self.metric = task.metric
        self._encoded: Encoded | None = None

    def _encode(self, examples: Examples, tokenizer: Any) -> Encoded:
        return encode(examples, tokenizer, self.max_length, self._segments)

    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        rows = self._rows
        chosen = self._spread(CHECK_ROWS)
        pair = None if rows.text_pair is None else [rows.text_pair[i] for i in chosen]
        picked = Examples([rows.text[i] for i in chosen], pair, [rows.labels[i] for i in chosen])
        return logits(model, self._encode(picked, tokenizer), device)

    def score(self, model: nn.Module, device: torch.device) -> float:
        if self._encoded is None:
            self._encoded = self._encode(self._rows, self._tokenizer)
        measured = score(model, self._encoded, self._batch_tokens, device)
        assert measured is not None
        return measured.value


class ProblemRows(Rows):
    """Of a causal language model."""

    where = "answer tokens of validation problems"
    metric = "token_accuracy"

    @torch.inference_mode()
    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        """At the first tokens of worked answers, one problem at a time, by the model's own forward."""
        encoded = self._encode(self._rows.pick(self._spread(CHECK_PROBLEMS)), tokenizer)
        found = []
        for row in range(len(encoded)):
            tokens = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]]
            first = int(encoded.prompt_lengths[row]) - 1
            ids = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
            positions = slice(first, min(len(tokens) - 1, first + CHECK_POSITIONS))
            found.append(model(input_ids=ids, use_cache=False).logits[0, positions].float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def score(self, model: nn.Module, device: torch.device) -> float:
        """The share of the worked answers' tokens that the model puts first, given those before them."""
        encoded = self._encode(self._rows, self._tokenizer)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for rows in evaluation_batches(encoded, self._batch_tokens):
            batch = collate_problems(encoded, rows, device)
            hidden, weight, bias = hidden_states(model, batch.inputs["input_ids"])
            hidden_LD, labels_L = hidden.flatten(0, 1)[batch.rows], batch.labels.flatten()[batch.rows]
            for part_CD, labels_C in zip(hidden_LD.split(_CHUNK_ROWS), labels_L.split(_CHUNK_ROWS)):
                correct += (nn.functional.linear(part_CD, weight, bias).argmax(-1) == labels_C).sum()
        return int(correct) / int(encoded.num_labelled.sum())

    def _encode(self, problems: Any, tokenizer: Any) -> EncodedProblems:
        return encode_problems(problems, tokenizer, self.task.prompt, self.max_length)


def make_rows(run: RunConfig, task: ClassificationTask | WordProblemTask, backbone: Backbone) -> Rows:
    return (ProblemRows if isinstance(task, WordProblemTask) else TextRows)(run, task, backbone)


@torch.inference_mode()
def logits(model: nn.Module, encoded: Encoded, device: torch.device) -> torch.Tensor:
    """Of a classifier: N x labels, on the CPU, in the rows' order."""
    rows = np.array_split(np.arange(len(encoded)), -(-len(encoded) // _BATCH_ROWS))
    return torch.cat([model(**collate(encoded, part, device).inputs).logits.float().cpu() for part in rows])
