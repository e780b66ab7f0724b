"""Word problems: cross entropy of the worked answers' tokens, exact match of the numbers that are decoded.

Shapes: N rows of a micro-batch, L tokens of a row, D hidden, P sampled prompt tokens, M sampled labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from fastpeft.config import RunConfig
from fastpeft.config.schema import EvaluationConfig
from fastpeft.data import Batch, Problems, WordProblemTask, encode_problems
from fastpeft.data.batches import IGNORE, evaluation_batches
from fastpeft.data.memory import TokenLimits
from fastpeft.data.problem_batches import EncodedProblems, collate_problems
from fastpeft.evaluate.problems import Decoding, ProblemSet, Sampling, expected_decode_s, score_problems
from fastpeft.evaluate.score import Score
from fastpeft.kernels import linear_cross_entropy, logits_cross_entropy
from fastpeft.kernels.linear_cross_entropy.op import CrossEntropy
from fastpeft.models.backbone import Backbone
from fastpeft.models.lens import FirstLayer
from fastpeft.models.lm_head import hidden_states
from fastpeft.objectives.base import BatchLoss, Objective, Shrink
from fastpeft.signals import Need

PROMPT_TOKENS, LENS_TOKENS = 1024, 256
"""Most tokens of a micro-batch that Need.PROMPT and Need.LENS look at."""


class WordProblems(Objective):
    def __init__(self, task: WordProblemTask, run: RunConfig, backbone: Backbone, device: torch.device) -> None:
        self.metric, self._device = task.metric, device
        self._template, self._tokenizer = task.prompt, backbone.tokenizer
        self._max_length = min(run.dataset.max_length, backbone.max_positions or run.dataset.max_length)
        self.train: EncodedProblems = encode_problems(task.train, backbone.tokenizer, task.prompt, self._max_length)
        self._validation = self.problem_set(task.validation.head(run.evaluation.max_examples))
        self.validation: EncodedProblems = self._validation.encoded
        self._test = task.test and self.problem_set(task.test.head(run.evaluation.max_test_examples))
        self._plain = decoding_of(run.evaluation, backbone)
        self._sampled = decoding_of(run.evaluation, backbone, sampling_of(run))
        self.has_test = self._test is not None
        if self._test is not None:
            samples = 1 + (self._sampled.sampling.num_samples if self._sampled.sampling else 0)
            self.test_cost = samples * len(self._test) / len(self._validation)
        self.notes = [*self.train.notes, *self.validation.notes, *(self._test.encoded.notes if self._test else ())]
        if self._max_length < run.dataset.max_length:
            self.notes.append(
                f"dataset.max_length is {run.dataset.max_length}, but the model takes {self._max_length} tokens"
            )
        self._dtype, self._frozen_head = backbone.dtype, backbone.head_is_frozen
        self._first_layer = FirstLayer()

    def problem_set(self, problems: Problems) -> ProblemSet:
        encoded = encode_problems(problems, self._tokenizer, self._template, self._max_length, training=False)
        return ProblemSet(problems, encoded)

    def num_items(self, rows: np.ndarray) -> int:
        return int(self.train.num_labelled[rows].sum())

    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        return collate_problems(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch, num_items: int, needs: Collection[Need] = ()) -> BatchLoss:
        """Rows are padded on their right, so that the decoder needs no mask."""
        assert batch.rows is not None
        share = len(batch.rows) / num_items
        lens = self._first_layer.watching(model) if Need.LENS in needs else nullcontext()
        with self._autocast(), lens:
            hidden_NLD, weight, bias = hidden_states(model, batch.inputs["input_ids"])
        lens_MD = self._first_layer.read(_spread(batch.rows, LENS_TOKENS)) if Need.LENS in needs else None
        found = self._cross_entropy(
            hidden_NLD, weight, bias, batch, num_items, statistics=Need.TOKENS in needs, lens_hidden=lens_MD
        )
        statistics = {}
        if Need.TOKENS in needs:
            assert found.fisher is not None
            assert found.entropy is not None
            statistics = {"answer_fisher": found.fisher.sum() / num_items, "entropy": found.entropy.sum() / num_items}
        if found.lens_entropy is not None:
            statistics["lens_entropy"] = found.lens_entropy.mean() * share
        if Need.PROMPT in needs:
            statistics["prompt_fisher"] = _prompt_fisher(hidden_NLD, weight, bias, batch) * share
        return BatchLoss(found.loss, statistics)

    def evaluate(
        self, model: nn.Module, limits: TokenLimits, stop: Callable[[], bool], shrink: Shrink | None
    ) -> Score | None:
        return self._score(model, self._validation, self._plain, limits, stop, shrink)

    def evaluate_test(
        self, model: nn.Module, limits: TokenLimits, stop: Callable[[], bool], shrink: Shrink | None
    ) -> Score | None:
        assert self._test is not None
        return self._score(model, self._test, self._sampled, limits, stop, shrink)

    def time_evaluation(self, model: nn.Module, limits: TokenLimits) -> float:
        """As if no answer ended by itself: an untrained model's may not."""
        return expected_decode_s(model, self._validation, self._plain, limits.evaluation)

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        width = int(self.validation.prompt_lengths.max()) + self._plain.max_new_tokens
        return max(1, limits.evaluation // width), width

    def _score(
        self,
        model: nn.Module,
        problem_set: ProblemSet,
        decoding: Decoding,
        limits: TokenLimits,
        stop: Callable[[], bool],
        shrink: Shrink | None,
    ) -> Score | None:
        loss = self._mean_loss(model, problem_set.encoded, limits.evaluation, stop)
        if loss is None:
            return None
        return score_problems(model, problem_set, decoding, limits.evaluation, stop, shrink, loss)

    @torch.no_grad()
    def _mean_loss(
        self, model: nn.Module, encoded: EncodedProblems, max_tokens: int, stop: Callable[[], bool]
    ) -> float | None:
        """Nats a token of the worked answers, as far as they fit."""
        training = model.training
        model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self._device), int(encoded.num_labelled.sum())
        try:
            for rows in evaluation_batches(encoded, max_tokens):
                if stop():
                    return None
                batch = collate_problems(encoded, rows, self._device)
                with self._autocast():
                    hidden_NLD, weight, bias = hidden_states(model, batch.inputs["input_ids"])
                total += self._cross_entropy(hidden_NLD, weight, bias, batch, count).loss
        finally:
            model.train(training)
        return float(total)

    def _autocast(self) -> AbstractContextManager:
        """A model that is trained whole keeps its weights in fp32."""
        trains_all = not self._frozen_head and self._dtype != torch.float32
        return torch.autocast(self._device.type, self._dtype) if trains_all else nullcontext()

    def _cross_entropy(
        self,
        hidden_NLD: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        batch: Batch,
        num_items: int,
        statistics: bool = False,
        lens_hidden: torch.Tensor | None = None,
    ) -> CrossEntropy:
        if self._frozen_head:
            return linear_cross_entropy(
                hidden_NLD, weight, batch.labels, bias, rows=batch.rows, num_items=num_items, statistics=statistics,
                lens_hidden=lens_hidden,
            )  # fmt: skip
        labels = batch.labels.view(-1)[batch.rows]
        with self._autocast():
            logits = nn.functional.linear(hidden_NLD.flatten(0, 1)[batch.rows], weight, bias)
        found = logits_cross_entropy(logits, labels, num_items=num_items, statistics=statistics)
        if lens_hidden is None:
            return found
        return found._replace(lens_entropy=_statistics(lens_hidden, weight, bias, labels[: len(lens_hidden)]).entropy)


def decoding_of(config: EvaluationConfig, backbone: Backbone, sampling: Sampling | None = None) -> Decoding:
    return Decoding(backbone.tokenizer, backbone.eos_token_ids, config.max_new_tokens, config.calculator, sampling)


def sampling_of(run: RunConfig) -> Sampling | None:
    config = run.evaluation
    if not config.pass_at:
        return None
    return Sampling(
        config.pass_at, max(config.num_samples, config.pass_at), config.temperature, config.top_p, run.training.seed
    )


@torch.no_grad()
def _prompt_fisher(
    hidden_NLD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, batch: Batch
) -> torch.Tensor:
    """Mean Fisher of prompt tokens, evenly spaced in each row."""
    num_rows, width = batch.labels.shape
    ids_NL = batch.inputs["input_ids"]
    lengths_N = (batch.labels != IGNORE).float().argmax(1)  # the prompt's last position, which is labelled
    each = max(1, PROMPT_TOKENS // num_rows)
    places = (torch.arange(each, device=ids_NL.device) + 0.5) / each
    columns = (places * lengths_N[:, None]).long()
    rows_P = (columns + width * torch.arange(num_rows, device=ids_NL.device)[:, None]).flatten()
    labels_P = ids_NL.gather(1, (columns + 1).clamp(max=width - 1)).flatten()
    fisher = _statistics(hidden_NLD.detach().flatten(0, 1)[rows_P], weight, bias, labels_P).fisher
    assert fisher is not None
    return fisher.mean()


def _statistics(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> CrossEntropy:
    with torch.no_grad():
        detached = None if bias is None else bias.detach().to(hidden.dtype)
        return linear_cross_entropy(hidden, weight.detach().to(hidden.dtype), labels, detached, statistics=True)


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of them, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
