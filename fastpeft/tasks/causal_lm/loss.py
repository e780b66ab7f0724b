"""Cross entropy of answer tokens. Through a frozen head it does not store the logits.

Shapes: N rows of a micro-batch, L tokens of a row, C labelled tokens at a time, V vocabulary, D hidden, P sampled
prompt tokens, M sampled labelled tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import IGNORE, Batch, evaluation_batches
from fastpeft.device_memory import TokenLimits
from fastpeft.kernels import linear_cross_entropy, logits_cross_entropy
from fastpeft.kernels.ops.linear_cross_entropy.op import CrossEntropy
from fastpeft.models.lens import FirstLayer
from fastpeft.models.lm_head import hidden_states
from fastpeft.ranks import current, everybodys
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss, Count, Stop
from fastpeft.tasks.causal_lm.labelled_rows import LabelledRows, collate_labelled

PROMPT_TOKENS, LENS_TOKENS = 1024, 256
"""Maximum number of tokens per micro-batch for Need.PROMPT and Need.LENS."""
_READ_ELSEWHERE = {Need.PROMPT, Need.ANSWER_GRADIENT}
"""Measurements that need tokens without a label in every layer."""


_CHUNK_BYTES = 32 * 2**20
"""Memory of fp32 logits at one time, in bytes, when more than their loss is computed."""


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of N rows."""

    correct: np.ndarray
    """(N,), number of labelled tokens of each row that have the largest logit."""
    labelled: np.ndarray
    """(N,), number of labelled tokens of each row."""
    loss: float
    """Mean loss per labelled token, in nats."""

    @property
    def accuracy(self) -> float:
        return float(self.correct.sum() / max(1, self.labelled.sum()))

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.float64(self.loss)))


class AnswerLoss:
    """The loss of one model.

    Args:
        dtype: compute dtype of the model.
        frozen_head: the head is frozen, so that its logits need not be stored.
        trains_all: every weight is trained and stored in fp32.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, frozen_head: bool, trains_all: bool = False) -> None:
        self._device, self._dtype, self._frozen_head, self._trains_all = device, dtype, frozen_head, trains_all
        self._first_layer: FirstLayer | None = None

    def batch(self, model: nn.Module, batch: Batch, num_items: Count, needs: Collection[Need] = ()) -> BatchLoss:
        """Loss and statistics of a micro-batch. Rows are padded on the right, so that the decoder needs no mask."""
        assert batch.rows is not None
        lens = self._lens(model) if Need.LENS in needs else None
        rows = None if _READ_ELSEWHERE.intersection(needs) else batch.rows
        with self._autocast(), lens.watching() if lens else nullcontext():
            hidden, weight, bias = hidden_states(model, **batch.inputs, rows=rows, sequences=batch.sequences)
        lens_MD = lens.read(_spread(batch.rows, LENS_TOKENS)) if lens else None
        found = self._cross_entropy(
            hidden, weight, bias, batch, num_items, statistics=Need.TOKENS in needs, lens_hidden=lens_MD
        )
        statistics = {}
        if Need.TOKENS in needs:
            assert found.fisher is not None
            assert found.entropy is not None
            statistics = {"answer_fisher": found.fisher.sum() / num_items, "entropy": found.entropy.sum() / num_items}
        if found.lens_entropy is not None:
            statistics["lens_entropy"] = found.lens_entropy.mean() * (len(batch.rows) / num_items)
        if Need.PROMPT in needs:
            statistics["prompt_fisher"] = _prompt_fisher(hidden, weight, bias, batch) * (len(batch.rows) / num_items)
        return BatchLoss(found.loss, statistics)

    def mean(self, model: nn.Module, encoded: LabelledRows, limits: TokenLimits, stop: Stop) -> float | None:
        """Mean loss per answer token that fits, in nats; NaN if none fits; None if `stop` ended it early."""
        training, total = model.training, torch.zeros((), dtype=torch.float64, device=self._device)
        model.eval()
        stopped = False
        try:
            for rows in current().share(_loss_batches(encoded, limits)):
                if stopped := stop():
                    break
                total += self._sum(model, encoded, rows)
        finally:
            model.train(training)
        found = everybodys(None if stopped else {"loss": total})
        if found is None:
            return None
        count = int(encoded.num_labelled.sum())
        return sum(float(each["loss"]) for each in found) / count if count else math.nan

    @torch.no_grad()
    def token_scores(
        self, model: nn.Module, encoded: LabelledRows, limits: TokenLimits, stop: Stop
    ) -> TokenScores | None:
        """Scores of all rows; None if `stop` ended it early. Restores the model's mode."""
        training, correct_N = model.training, torch.zeros(len(encoded), dtype=torch.int64, device=self._device)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        model.eval()
        stopped = False
        try:
            for rows in current().share(_loss_batches(encoded, limits)):
                if stopped := stop():
                    break
                batch = collate_labelled(encoded, rows, self._device)
                of_row_L = torch.from_numpy(np.repeat(rows, encoded.num_labelled[rows])).to(self._device)
                assert batch.rows is not None
                with self._autocast():
                    hidden_LD, weight, bias = hidden_states(
                        model, batch.inputs["input_ids"], batch.rows, batch.inputs.get("position_ids")
                    )
                labels_L = batch.labels.view(-1)[batch.rows]
                chunk = max(1, _CHUNK_BYTES // (4 * len(weight)))
                for hidden_CD, labels_C, of_row_C in zip(
                    *(each.split(chunk) for each in (hidden_LD, labels_L, of_row_L))
                ):
                    with self._autocast():
                        logits_CV = nn.functional.linear(hidden_CD.to(weight.dtype), weight, bias)
                    total += nn.functional.cross_entropy(logits_CV.float(), labels_C, reduction="sum").double()
                    correct_N.index_add_(0, of_row_C, (logits_CV.argmax(-1) == labels_C).long())
        finally:
            model.train(training)
        found = everybodys(None if stopped else {"loss": total, "correct": correct_N.cpu()})
        if found is None:
            return None
        labelled = encoded.num_labelled
        count, loss = int(labelled.sum()), sum(float(each["loss"]) for each in found)
        correct = np.sum([each["correct"].numpy() for each in found], axis=0)
        return TokenScores(correct, labelled, loss / count if count else math.nan)

    def expected_s(self, model: nn.Module, encoded: LabelledRows, limits: TokenLimits) -> float:
        """Estimated seconds of `mean`, from its largest batch."""
        groups = _loss_batches(encoded, limits)
        areas = [len(rows) * int(encoded.widths[rows].max()) for rows in groups]
        largest = groups[int(np.argmax(areas))]
        self._sum(model, encoded, largest).item()  # warmup: builds kernels and buffers
        start = time.perf_counter()
        self._sum(model, encoded, largest).item()
        return (time.perf_counter() - start) * sum(areas) / max(areas)

    @torch.no_grad()
    def _sum(self, model: nn.Module, encoded: LabelledRows, rows: np.ndarray) -> torch.Tensor:
        batch = collate_labelled(encoded, rows, self._device)
        with self._autocast():
            hidden_LD, weight, bias = hidden_states(model, **batch.inputs, rows=batch.rows, sequences=batch.sequences)
        return self._cross_entropy(hidden_LD, weight, bias, batch, num_items=1).loss

    def _lens(self, model: nn.Module) -> FirstLayer:
        if self._first_layer is None:
            self._first_layer = FirstLayer(model)
        return self._first_layer

    def _autocast(self) -> AbstractContextManager:
        """Autocast for a model trained in full, whose weights are in fp32."""
        is_cast = self._trains_all and self._dtype != torch.float32
        return torch.autocast(self._device.type, self._dtype) if is_cast else nullcontext()

    def _cross_entropy(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        batch: Batch,
        num_items: Count,
        statistics: bool = False,
        lens_hidden: torch.Tensor | None = None,
    ) -> CrossEntropy:
        """`hidden`: (number of labelled tokens, D), or (N, L, D) for all tokens."""
        hidden_LD = hidden if hidden.ndim == 2 else hidden.flatten(0, 1)[batch.rows]
        labels = batch.labels.view(-1)[batch.rows]
        if self._frozen_head:
            return linear_cross_entropy(
                hidden_LD, weight, labels, bias, num_items=num_items, statistics=statistics, lens_hidden=lens_hidden
            )
        with self._autocast():
            logits = nn.functional.linear(hidden_LD, weight, bias)
        found = logits_cross_entropy(logits, labels, num_items=num_items, statistics=statistics)
        if lens_hidden is None:
            return found
        return found._replace(lens_entropy=_statistics(lens_hidden, weight, bias, labels[: len(lens_hidden)]).entropy)


@torch.no_grad()
def _prompt_fisher(
    hidden_NLD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, batch: Batch
) -> torch.Tensor:
    """Mean Fisher information of prompt tokens, evenly spaced in each row."""
    ids_T = batch.inputs["input_ids"].flatten()
    starts_N, prompts_N, width = _prompts(batch)
    each = max(1, min(PROMPT_TOKENS // len(starts_N), width))
    places = (torch.arange(each, device=ids_T.device) + 0.5) / each
    rows_P = (starts_N[:, None] + (places * prompts_N[:, None]).long()).flatten()
    labels_P = ids_T[(rows_P + 1).clamp(max=len(ids_T) - 1)]
    fisher = _statistics(hidden_NLD.detach().flatten(0, 1)[rows_P], weight, bias, labels_P).fisher
    assert fisher is not None
    return fisher.mean()


def _prompts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of each row its first token's place among all, and how far behind it the prompt's last one is, which is the first
    with a label; the width of the widest row."""
    if batch.sequences is None:
        num_rows, width = batch.labels.shape
        starts_N = width * torch.arange(num_rows, device=batch.labels.device)
        return starts_N, (batch.labels != IGNORE).float().argmax(1), width
    starts_N, ends_N = batch.sequences.starts, batch.sequences.cu_seqlens[1:]
    assert batch.rows is not None
    behind = torch.cat([batch.rows, ends_N[-1:]])  # so that there is one behind each start
    first_N = behind[torch.searchsorted(batch.rows, starts_N)]
    return starts_N, torch.where(first_N < ends_N, first_N - starts_N, 0), batch.sequences.longest


def _statistics(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> CrossEntropy:
    with torch.no_grad():
        detached = None if bias is None else bias.detach().to(hidden.dtype)
        return linear_cross_entropy(hidden, weight.detach().to(hidden.dtype), labels, detached, statistics=True)


def _loss_batches(encoded: LabelledRows, limits: TokenLimits) -> list[np.ndarray]:
    """Batches of rows within the limits of training, which suffice without gradients."""
    return evaluation_batches(encoded, min(limits.training, limits.evaluation))


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
