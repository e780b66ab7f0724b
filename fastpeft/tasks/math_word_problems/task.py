"""Word problems: cross entropy of the worked answers' tokens, exact match of the numbers that are decoded.

Shapes: N rows of a micro-batch, L tokens of a row, D hidden, P sampled prompt tokens, M sampled labelled tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from fastpeft.config import RunConfig
from fastpeft.config.schema import EvaluationConfig
from fastpeft.data.batches import IGNORE, Batch, evaluation_batches
from fastpeft.device_memory import TokenLimits
from fastpeft.errors import UserError
from fastpeft.kernels import linear_cross_entropy, logits_cross_entropy
from fastpeft.kernels.ops.linear_cross_entropy.op import CrossEntropy
from fastpeft.models.backbone import Backbone
from fastpeft.models.lens import FirstLayer
from fastpeft.models.lm_head import hidden_states
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss, Objective, Shrink
from fastpeft.tasks.causal_lm.prompts import EncodedProblems, collate_problems, encode_problems
from fastpeft.tasks.math_word_problems.exact_match import (
    Decoding,
    ProblemSet,
    Sampling,
    expected_decode_s,
    largest_batch,
    score_problems,
)
from fastpeft.tasks.math_word_problems.reading import Problems, WordProblemTask
from fastpeft.tasks.sequence_classification.scoring import Score

PROMPT_TOKENS, LENS_TOKENS = 1024, 256
"""Most tokens of a micro-batch that Need.PROMPT and Need.LENS look at."""


class WordProblems(Objective):
    def __init__(self, task: WordProblemTask, run: RunConfig, backbone: Backbone, device: torch.device) -> None:
        self.metric, self._device = task.metric, device
        max_length = _max_length(run, backbone)
        self._plain = decoding_of(run.evaluation, backbone)
        self._sampled = decoding_of(run.evaluation, backbone, sampling_of(run))
        self.train: EncodedProblems = encode_problems(task.train, backbone.tokenizer, task.prompt, max_length)
        self._validation = make_problem_set(task.validation.head(run.evaluation.max_examples), run, backbone)
        self.validation: EncodedProblems = self._validation.encoded
        self._test = task.test and make_problem_set(task.test.head(run.evaluation.max_test_examples), run, backbone)
        self.has_test = self._test is not None
        if self._test is not None:
            samples = 1 + (self._sampled.sampling.num_samples if self._sampled.sampling else 0)
            self.test_cost = samples * len(self._test) / len(self._validation)
        self.notes = [*self.train.notes, *self.validation.notes, *(self._test.encoded.notes if self._test else ())]
        if max_length < run.dataset.max_length:
            self.notes.append(
                f"dataset.max_length is {run.dataset.max_length}, but the model takes {max_length} tokens"
            )
        self.notes += _sampling_notes(run.evaluation, self.has_test)
        self._dtype, self._frozen_head = backbone.dtype, backbone.head_is_frozen
        self._first_layer: FirstLayer | None = None

    def num_items(self, rows: np.ndarray) -> int:
        return int(self.train.num_labelled[rows].sum())

    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        return collate_problems(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch, num_items: int, needs: Collection[Need] = ()) -> BatchLoss:
        """Rows are padded on their right, so that the decoder needs no mask."""
        assert batch.rows is not None
        share = len(batch.rows) / num_items
        lens = self._lens(model) if Need.LENS in needs else None
        with self._autocast(), lens.watching() if lens else nullcontext():
            hidden_NLD, weight, bias = hidden_states(model, batch.inputs["input_ids"])
        lens_MD = lens.read(_spread(batch.rows, LENS_TOKENS)) if lens else None
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
        decode_s = expected_decode_s(model, self._validation, self._plain, limits.evaluation)
        return decode_s + self._expected_loss_s(model, limits)

    def largest_evaluation_batch(self, limits: TokenLimits) -> tuple[int, int]:
        return largest_batch(self._validation, self._plain, limits.evaluation)

    def _score(
        self,
        model: nn.Module,
        problem_set: ProblemSet,
        decoding: Decoding,
        limits: TokenLimits,
        stop: Callable[[], bool],
        shrink: Shrink | None,
    ) -> Score | None:
        loss = self._mean_loss(model, problem_set.encoded, limits, stop)
        if loss is None:
            return None
        return score_problems(model, problem_set, decoding, limits.evaluation, stop, shrink, loss)

    def _mean_loss(
        self, model: nn.Module, encoded: EncodedProblems, limits: TokenLimits, stop: Callable[[], bool]
    ) -> float | None:
        """Nats a token of the worked answers, as far as they fit; NaN where none does."""
        training, total = model.training, torch.zeros((), dtype=torch.float64, device=self._device)
        model.eval()
        try:
            for rows in _loss_batches(encoded, limits):
                if stop():
                    return None
                total += self._loss_sum(model, encoded, rows)
        finally:
            model.train(training)
        count = int(encoded.num_labelled.sum())
        return float(total) / count if count else math.nan

    @torch.no_grad()
    def _loss_sum(self, model: nn.Module, encoded: EncodedProblems, rows: np.ndarray) -> torch.Tensor:
        batch = collate_problems(encoded, rows, self._device)
        with self._autocast():
            hidden_NLD, weight, bias = hidden_states(model, batch.inputs["input_ids"])
        return self._cross_entropy(hidden_NLD, weight, bias, batch, num_items=1).loss

    def _expected_loss_s(self, model: nn.Module, limits: TokenLimits) -> float:
        """Of `_mean_loss`, from its largest batch."""
        encoded, groups = self.validation, _loss_batches(self.validation, limits)
        areas = [len(rows) * int(encoded.widths[rows].max()) for rows in groups]
        largest = groups[int(np.argmax(areas))]
        self._loss_sum(model, encoded, largest).item()  # the first pass builds kernels and buffers
        start = time.perf_counter()
        self._loss_sum(model, encoded, largest).item()
        return (time.perf_counter() - start) * sum(areas) / max(areas)

    def _lens(self, model: nn.Module) -> FirstLayer:
        if self._first_layer is None:
            self._first_layer = FirstLayer(model)
        return self._first_layer

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


def make_problem_set(problems: Problems, run: RunConfig, backbone: Backbone) -> ProblemSet:
    """Problems for a model to be scored on.

    Raises:
        UserError: no prompt leaves room for an answer.
    """
    max_length, max_prompt = _max_length(run, backbone), _max_prompt(run, backbone)
    encoded = encode_problems(
        problems, backbone.tokenizer, run.dataset.prompt, max_length, training=False, max_prompt=max_prompt
    )
    if len(encoded.unusable) == len(encoded):
        raise UserError(
            f"evaluation.max_new_tokens, dataset.max_length: none of {len(encoded):,} prompts of {problems.source} "
            f"leaves room for an answer; the shortest has {encoded.prompt_lengths.min()} tokens, and there is room "
            f"for {min(max_prompt, max_length - 1)}"
        )
    return ProblemSet(problems, encoded)


def decoding_of(config: EvaluationConfig, backbone: Backbone, sampling: Sampling | None = None) -> Decoding:
    return Decoding(backbone.tokenizer, backbone.eos_token_ids, config.max_new_tokens, config.calculator, sampling)


def _max_length(run: RunConfig, backbone: Backbone) -> int:
    return min(run.dataset.max_length, backbone.max_positions or run.dataset.max_length)


def _max_prompt(run: RunConfig, backbone: Backbone) -> int:
    """In tokens, so that the model's context has room for an answer of evaluation.max_new_tokens.

    Raises:
        UserError: it has none even for a prompt of one token.
    """
    if backbone.max_positions is None:
        return run.dataset.max_length
    longest = backbone.max_positions - run.evaluation.max_new_tokens
    if longest < 1:
        raise UserError(
            f"evaluation.max_new_tokens: model {run.model.name} takes {backbone.max_positions:,} tokens, prompt and "
            f"answer together, so that {run.evaluation.max_new_tokens:,} new ones leave no room for a prompt. Set it "
            "lower"
        )
    return longest


def sampling_of(run: RunConfig) -> Sampling | None:
    config = run.evaluation
    if not config.pass_at:
        return None
    return Sampling(
        config.pass_at, max(config.num_samples, config.pass_at), config.temperature, config.top_p, run.training.seed
    )


def _sampling_notes(config: EvaluationConfig, has_test: bool) -> Iterator[str]:
    """Settings that do nothing, or less than they say."""
    if config.num_samples and not config.pass_at:
        yield "evaluation.num_samples was set, but evaluation.pass_at is 0: no answer is sampled"
    if config.pass_at and not has_test:
        yield "evaluation.pass_at was set, but there is no test split: no answer is sampled"
    if 0 < config.num_samples < config.pass_at:
        k = config.pass_at
        yield f"evaluation.num_samples is {config.num_samples}, but pass@{k} needs {k} samples: so many are drawn"


@torch.no_grad()
def _prompt_fisher(
    hidden_NLD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, batch: Batch
) -> torch.Tensor:
    """Mean Fisher of prompt tokens, evenly spaced in each row."""
    num_rows, width = batch.labels.shape
    ids_NL = batch.inputs["input_ids"]
    lengths_N = (batch.labels != IGNORE).float().argmax(1)  # the prompt's last position, which is labelled
    each = max(1, min(PROMPT_TOKENS // num_rows, width))
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


def _loss_batches(encoded: EncodedProblems, limits: TokenLimits) -> list[np.ndarray]:
    """What fits with gradients fits without."""
    return evaluation_batches(encoded, min(limits.training, limits.evaluation))


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of them, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
