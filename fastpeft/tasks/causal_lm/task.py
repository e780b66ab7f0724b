"""A language modelling task in which prompts are context and answers are learned."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from fastpeft.config.schema import DatasetConfig, ModelConfig
from fastpeft.data.batches import Batch, evaluation_batches
from fastpeft.data.rows import DataError
from fastpeft.errors import UserError
from fastpeft.kernels.sequences import Sequences
from fastpeft.models.backbone import Backbone, load_causal_lm
from fastpeft.models.lm_head import hidden_states
from fastpeft.signals import Need
from fastpeft.tasks.base import BatchLoss, Count, ExportCheck, FirstRows, Piece, Task
from fastpeft.tasks.causal_lm.decode_check import OwnLogits
from fastpeft.tasks.causal_lm.labelled_rows import LabelledRows, collate_labelled
from fastpeft.tasks.causal_lm.loss import AnswerLoss
from fastpeft.tasks.self_check import by_row, check_batches, check_tokens, varlen_fault

CHECK_ROWS, CHECK_POSITIONS = 16, 16
"""Rows, and first tokens of the answer in each, that are compared. Logits at all tokens would take gigabytes."""
LONGEST_CHECKED = 4096
"""Longest row in the comparison of an export, in tokens. Rows too long for training are included."""
_CHUNK_BYTES = 32 * 2**20
"""Memory of the logits that exist at one time, in bytes."""


Rows = TypeVar("Rows", bound=LabelledRows)


class CausalLMTask(Task[Rows]):
    """Base class. A kind adds its rows as prompts and answers, and the decoding and scoring of answers."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    pipeline_tag: ClassVar[str] = "text-generation"
    predicts_tokens: ClassVar[bool] = True
    noun: ClassVar[str] = "rows"
    """Plural noun for its rows, for messages."""

    def __init__(self, name: str, config: DatasetConfig, batch_tokens: int) -> None:
        """
        Args:
            batch_tokens: maximum number of tokens, padding included, of a scored batch.
        """
        self.name, self.config, self.batch_tokens = name, config, batch_tokens
        self._loss: AnswerLoss | None = None

    @property
    def answer_loss(self) -> AnswerLoss:
        assert self._loss is not None, "encode comes first"
        return self._loss

    # ---- data ------------------------------------------------------------------------------

    @abstractmethod
    def encode_first(self, count: int, tokenizer: Any, model: str) -> LabelledRows:
        """Those of the first `count` training rows that training would use."""

    def first_rows(self, tokenizer: Any, model: str, count: int) -> FirstRows:
        try:
            encoded = self.encode_first(count, tokenizer, model)
            num_shown, notes = len(encoded), encoded.notes
        except DataError:
            raise
        except UserError:  # no row of these can be used for training
            encoded = self.encode_first(sys.maxsize, tokenizer, model)
            num_shown = min(count, len(encoded))
            notes = (f"they are the first that are trained on, as none of the first {count:,} can be",)
        return FirstRows([list(_pieces(encoded, row, tokenizer)) for row in range(num_shown)], notes)

    # ---- model and tokens ------------------------------------------------------------------

    def load_model(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, trained: bool = False
    ) -> Backbone:
        return load_causal_lm(config, dtype, device, trained)

    def encode(self, backbone: Backbone, device: torch.device) -> None:
        self._loss = AnswerLoss(device, backbone.dtype, backbone.head_is_frozen, backbone.trains_all)

    def check(self, model: nn.Module, backbone: Backbone) -> None:
        self.check_rows(model, backbone)

    def check_rows(self, model: nn.Module, backbone: Backbone) -> list[OwnLogits]:
        """As `check`; returns the rows and logits of the model's own forward pass."""
        rows: list[OwnLogits] = []

        def own_logits(model: nn.Module, inputs: dict[str, torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
            logits_LV = _centred(model(input_ids=inputs["input_ids"], use_cache=False).logits[0])
            rows.append((inputs["input_ids"][0].tolist(), logits_LV))
            return [logits_LV]

        check_tokens(backbone, {"training": self.train, "validation": self.validation})
        padded, notes = check_batches(model, backbone, self.train, _trained_logits, own_logits)
        self.train, self.validation = replace(self.train, padded=padded), replace(self.validation, padded=padded)
        self.notes += notes
        return rows

    def check_varlen(self, model: nn.Module, backbone: Backbone) -> str | None:
        return varlen_fault(model, backbone, self.train, _trained_logits)

    def max_length(self, backbone: Backbone) -> int:
        return min(self.config.max_length, backbone.max_positions or self.config.max_length)

    # ---- training --------------------------------------------------------------------------

    def num_items(self, rows: np.ndarray) -> int:
        return int(self.train.num_labelled[rows].sum())

    def collate(self, rows: np.ndarray, device: torch.device) -> Batch:
        return collate_labelled(self.train, rows, device)

    def loss(self, model: nn.Module, batch: Batch, num_items: Count, needs: Collection[Need] = ()) -> BatchLoss:
        return self.answer_loss.batch(model, batch, num_items, needs)

    # ---- export ----------------------------------------------------------------------------

    @abstractmethod
    def encode_validation(self, rows: Sequence[int] | None, tokenizer: Any, max_length: int) -> LabelledRows:
        """Rows of the validation split, None for all, tokenised as for training."""

    def export_check(self, backbone: Backbone) -> ExportCheck:
        return TokenAccuracy(
            self.encode_validation,
            self.num_validation,
            backbone.tokenizer,
            self.max_length(backbone),
            max(self.max_length(backbone), min(backbone.max_positions or LONGEST_CHECKED, LONGEST_CHECKED)),
            self.batch_tokens,
            self.noun,
        )


def _pieces(encoded: LabelledRows, row: int, tokenizer: Any) -> Iterator[Piece]:
    """Alternating spans of context tokens and learned tokens, decoded in place."""
    tokens = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]]
    learned = np.isin(np.arange(len(tokens)), encoded.places(row))
    ends = [*(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(tokens)]
    before = ""
    for end in ends:
        text = tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(text[len(before) :], bool(learned[end - 1]))
        before = text


def _trained_logits(model: nn.Module, inputs: dict[str, Any], lengths: Sequence[int]) -> list[torch.Tensor]:
    """Logits as computed for the loss, minus their mean, which no probability depends on."""
    mask = inputs["attention_mask"]
    sequences = mask if isinstance(mask, Sequences) else None
    hidden, weight, bias = hidden_states(
        model, inputs["input_ids"], position_ids=inputs.get("position_ids"), sequences=sequences
    )
    rows = (row.to(weight.dtype) for row in by_row(hidden, lengths))
    return [_centred(nn.functional.linear(row, weight, bias)) for row in rows]


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() - logits.float().mean(-1, keepdim=True)


class TokenAccuracy(ExportCheck):
    """Teacher-forced accuracy: the share of answer tokens that have the largest logit."""

    metric = "token_accuracy"

    def __init__(
        self,
        encode: Callable[[Sequence[int] | None, Any, int], LabelledRows],
        num_validation: int,
        tokenizer: Any,
        max_length: int,
        longest: int,
        batch_tokens: int,
        noun: str,
    ) -> None:
        """
        Args:
            max_length: length limit of training rows, in tokens.
            longest: length limit of rows read here, in tokens.
        """
        self.where = f"answer tokens of validation {noun}"
        self._encode, self.num_validation, self._tokenizer = encode, num_validation, tokenizer
        self.max_length, self._longest, self._batch_tokens = max_length, longest, batch_tokens

    @torch.inference_mode()
    def answers(self, model: nn.Module, tokenizer: Any, device: torch.device) -> torch.Tensor:
        """Logits at the first tokens of answers, one row at a time, by the model's own forward."""
        num_rows = self.num_validation
        chosen = np.linspace(0, num_rows - 1, min(CHECK_ROWS, num_rows)).astype(int).tolist()
        encoded = self._encode(chosen, tokenizer, self._longest)
        found = []
        for row in range(len(encoded)):
            tokens = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]]
            places = encoded.places(row)[:CHECK_POSITIONS]
            ids = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
            found.append(model(input_ids=ids, use_cache=False).logits[0, torch.from_numpy(places - 1)].float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def score(self, model: nn.Module, device: torch.device) -> float:
        encoded = self._encode(None, self._tokenizer, self._longest)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for rows in evaluation_batches(encoded, self._batch_tokens):
            batch = collate_labelled(encoded, rows, device)
            hidden, weight, bias = hidden_states(model, batch.inputs["input_ids"])
            hidden_LD, labels_L = hidden.flatten(0, 1)[batch.rows], batch.labels.flatten()[batch.rows]
            chunk = max(1, _CHUNK_BYTES // (weight.dtype.itemsize * len(weight)))
            for part_CD, labels_C in zip(hidden_LD.split(chunk), labels_L.split(chunk)):
                correct += (nn.functional.linear(part_CD, weight, bias).argmax(-1) == labels_C).sum()
        return int(correct) / int(encoded.num_labelled.sum())
