"""Batches of rows in decoding, one class per kind of cache.

Which kinds are exact depends on the model, and is tested: see fastpeft.tasks.causal_lm.decode_check.

Shapes: B rows of a batch, T tokens of the longest row, W columns of its prompts, C columns of the cache, N most new
tokens, V vocabulary, E tokens that end an answer.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import WIDTH_MULTIPLE
from fastpeft.kernels import linear_cross_entropy
from fastpeft.models.direct_decoder import direct_decoder
from fastpeft.models.layers import is_bare
from fastpeft.models.lm_head import hidden_states

PART_TOKENS = 2048
"""Tokens of prompts per prefill pass on a CPU."""

Prompt = Sequence[int] | np.ndarray


class Caching(StrEnum):
    """What is stored of the tokens that were read."""

    DIRECT = "direct"
    """Keys and values in fastpeft's own cache, by a forward pass for known families (models.direct_decoder)."""
    STATIC = "static"
    """Keys and values in a cache allocated at full size: nothing is copied, and shapes are constant."""
    GROWING = "growing"
    """The cache that transformers' `generate` uses for the model."""
    NONE = "none"
    """No cache: each token reads its whole row again, as in training."""


@dataclass(frozen=True)
class DecodeMethod:
    caching: Caching = Caching.DIRECT
    padded: bool = True
    """True if prompts of different lengths share a batch."""

    def __str__(self) -> str:
        return f"{_WORDS[self.caching]}, prompts {'padded' if self.padded else 'of one length side by side'}"


_WORDS = {
    Caching.DIRECT: "its layers run directly",
    Caching.STATIC: "a static cache",
    Caching.GROWING: "a cache that grows",
    Caching.NONE: "no cache",
}
FASTEST, STATIC = DecodeMethod(), DecodeMethod(Caching.STATIC)


def fastest_method(model: nn.Module) -> DecodeMethod:
    """The fastest method that can be exact for a bare causal LM, before any test."""
    return STATIC if direct_decoder(model) is None else FASTEST


class DecodeBatch(ABC):
    """A batch of rows in decoding. Ended rows are removed from it."""

    compact_at: ClassVar[float] = 0.75
    """Share of unfinished rows at which ended rows are removed, which copies the cache."""

    def __init__(
        self, model: nn.Module, prompts: Sequence[Prompt], most: int, pad_token: int, device: torch.device
    ) -> None:
        """
        Args:
            model: a bare causal LM.
            most: maximum number of new tokens per row.
        """
        self.model, self.pad_token, self.device = cast(Any, model), pad_token, device
        self.rows = list(range(len(prompts)))
        self.rows_B = torch.arange(len(prompts), device=device)
        """Indices into `new_BN` of the unfinished rows."""
        self.new_BN = torch.full((len(prompts), most), pad_token, device=device)
        self.alive_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.loss: torch.Tensor | None = None
        """Sum of the references' loss, in nats; None before they are read."""

    def read_behind(self, references: Sequence[Prompt]) -> None:
        """Read the references in the prefill too, for their loss, if the kind supports it."""

    @abstractmethod
    def forward(self) -> torch.Tensor:
        """Logits (B, V) after the prompts, in later calls after the last appended tokens."""

    @abstractmethod
    def _read_next(self, next_B: torch.Tensor, step: int) -> None:
        """Set the tokens that the next forward pass reads."""

    @abstractmethod
    def _keep(self, kept: list[int], kept_B: torch.Tensor) -> bool:
        """Keep only these rows: row kept[i] becomes row i. Returns False if that is not supported."""

    def append(self, next_B: torch.Tensor, eos_E: torch.Tensor, step: int) -> None:
        """Append the next token of each row, padding for ended rows. Does not synchronize with the device."""
        next_B = next_B.where(self.alive_B, self.pad_token)
        self.new_BN[self.rows_B, step] = next_B
        self.alive_B &= (next_B[:, None] != eos_E).all(-1)
        self._read_next(next_B, step)

    def drop_ended(self) -> bool:
        """Remove ended rows if there are many; returns False if all have ended. Synchronizes with the device."""
        alive = self.alive_B.tolist()
        num = sum(alive)
        if num and num <= self.compact_at * len(alive):
            last = [i for i in range(num, len(alive)) if alive[i]]
            kept = [i if alive[i] else last.pop() for i in range(num)]  # a last row takes an ended row's index
            kept_B = torch.tensor(kept, device=self.device)
            if self._keep(kept, kept_B):
                self.rows = [self.rows[i] for i in kept]
                self.rows_B, self.alive_B = self.rows_B[kept_B], self.alive_B[kept_B]
        return num > 0


class DirectBatch(DecodeBatch):
    """Prompts padded on the right, with new tokens in the columns after the longest prompt."""

    compact_at = 0.95

    def __init__(
        self, model: nn.Module, prompts: Sequence[Prompt], most: int, pad_token: int, device: torch.device
    ) -> None:
        super().__init__(model, prompts, most, pad_token, device)
        decoder = direct_decoder(model)
        assert decoder is not None, "fastest_method and the check ask"
        self._decoder = decoder
        self._prompts: Sequence[Prompt] | None = prompts
        self._references: Sequence[Prompt] = []

    def read_behind(self, references: Sequence[Prompt]) -> None:
        if all(map(len, references)) and is_bare(self._decoder.head, nn.Linear):
            self._references = references

    def forward(self) -> torch.Tensor:
        if self._prompts is None:
            return self._decoder.step(self._ids, self._columns)
        prompts, self._prompts = self._prompts, None
        return self._read(prompts)

    def _read(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        decoder, references, lengths = self._decoder, self._references, [len(prompt) for prompt in prompts]
        rows = [[*prompt, *own[:-1]] for prompt, own in zip_longest(prompts, references, fillvalue=())]
        self._columns = decoder.columns(lengths, self.new_BN.shape[1], max(map(len, rows)))
        num_B = np.array([len(own) for own in references] or [1] * len(prompts))
        parts = [self._read_part(rows, np.array(lengths), num_B, part) for part in self._parts(rows)]
        hidden_MD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if references:
            labels_M = torch.from_numpy(np.concatenate(references).astype(np.int64)).to(self.device)
            weight, bias = decoder.head.weight.detach(), decoder.head.bias
            bias = None if bias is None else bias.detach()
            self.loss = linear_cross_entropy(hidden_MD, weight, labels_M, bias, num_items=1).loss
            hidden_MD = hidden_MD[torch.from_numpy(np.cumsum(num_B) - num_B).to(self.device)]
        return decoder.head(hidden_MD)

    def _parts(self, rows: Sequence[Prompt]) -> list[slice]:
        """Groups of rows; on a CPU small ones, whose activations fit into its cache."""
        width = max(map(len, rows))
        step = max(1, PART_TOKENS // width) if self.device.type == "cpu" else len(rows)
        return [slice(start, start + step) for start in range(0, len(rows), step)]

    def _read_part(self, rows: Sequence[Prompt], lengths_B: np.ndarray, num_B: np.ndarray, part: slice) -> torch.Tensor:
        """The hidden states of each prompt's last token and of all but the last token of its reference."""
        own = rows[part]
        width = max(map(len, own))
        ids_BT = torch.from_numpy(_padded_right(own, width, self.pad_token)).to(self.device)
        first_B = lengths_B[part] - 1 + width * np.arange(len(own))
        places = np.concatenate([first + np.arange(num) for first, num in zip(first_B, num_B[part])])
        return self._decoder.read(ids_BT, torch.from_numpy(places).to(self.device), self._columns, part)

    def _read_next(self, next_B: torch.Tensor, step: int) -> None:
        self._ids = next_B

    def _keep(self, kept: list[int], kept_B: torch.Tensor) -> bool:
        self._columns.keep(kept)
        self._ids = self._ids[kept_B]
        return True


class StaticBatch(DecodeBatch):
    """Prompts padded on the left, with a StaticCache whose layers count their columns themselves."""

    def __init__(
        self, model: nn.Module, prompts: Sequence[Prompt], most: int, pad_token: int, device: torch.device
    ) -> None:
        from transformers import StaticCache

        super().__init__(model, prompts, most, pad_token, device)
        lengths = np.array([len(prompt) for prompt in prompts])
        is_padded = len(set(lengths.tolist())) > 1
        self.width = int(round_up(lengths.max()) if is_padded else lengths[0])
        columns = int(cache_columns(self.width, most))
        column_C = np.arange(columns)
        mask_BC = (column_C >= self.width - lengths[:, None]) & (column_C < self.width)
        self.cache = StaticCache(config=self.model.config, max_cache_len=columns)
        self._name = cache_name(model)
        self._ids = torch.from_numpy(_padded_left(prompts, self.width, pad_token)).to(device)
        self._mask_BC = torch.from_numpy(mask_BC.astype(np.int64)).to(device)
        self._seen = self.width
        self._positions = (self._mask_BC[:, : self.width].cumsum(-1) - 1).clamp(min=0)

    def forward(self) -> torch.Tensor:
        """The mask ends at the last token read: recurrent and convolutional layers take its last columns for theirs."""
        out = self.model(
            input_ids=self._ids,
            attention_mask=self._mask_BC[:, : self._seen],
            position_ids=self._positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._name: self.cache},
        )
        return out.logits[:, -1]

    def _read_next(self, next_B: torch.Tensor, step: int) -> None:
        self._ids = next_B[:, None]
        self._mask_BC[:, self._seen] = 1
        self._seen += 1
        self._positions = self._positions[:, -1:] + 1

    def _keep(self, kept: list[int], kept_B: torch.Tensor) -> bool:
        self.cache.reorder_cache(cast(torch.LongTensor, kept_B))
        self._ids, self._positions = self._ids[kept_B], self._positions[kept_B]
        self._mask_BC = self._mask_BC[kept_B]
        return True


class GrowingBatch(DecodeBatch):
    """Prompts padded on the left, read as in transformers' `generate`.

    So it takes the models whose memory is none of transformers' caches, such as RWKV's state. Besides the public
    prepare_inputs_for_generation it needs the two methods by which models say what they keep and hand on.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Prompt], most: int, pad_token: int, device: torch.device
    ) -> None:
        from transformers import DynamicCache

        super().__init__(model, prompts, most, pad_token, device)
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        mask_BW = torch.from_numpy((np.arange(width) >= width - lengths[:, None]).astype(np.int64)).to(device)
        self._ids_BT = torch.from_numpy(_padded_left(prompts, width, pad_token)).to(device)
        self._is_first = True
        parameters = inspect.signature(self.model.forward).parameters
        self._state: dict[str, Any] = {"attention_mask": mask_BW, "use_cache": True}
        if "position_ids" in parameters:
            self._state["position_ids"] = (mask_BW.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in parameters:
            self._state["logits_to_keep"] = 1
        self._cache = cache_name(model)
        if self.model._supports_default_dynamic_cache():
            self._state[self._cache] = DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def forward(self) -> torch.Tensor:
        more = {"is_first_iteration": True} if self._is_first else {"next_sequence_length": 1}
        inputs = self.model.prepare_inputs_for_generation(self._ids_BT, **more, **self._state)
        out = self.model(**inputs, return_dict=True)
        self._is_first = False
        self._state = self.model._update_model_kwargs_for_generation(out, self._state)
        return out.logits[:, -1]

    def _read_next(self, next_B: torch.Tensor, step: int) -> None:
        self._ids_BT = torch.cat([self._ids_BT, next_B[:, None]], dim=-1)

    def _keep(self, kept: list[int], kept_B: torch.Tensor) -> bool:
        from transformers import Cache

        held = {name: value for name, value in self._state.items() if isinstance(value, Cache | torch.Tensor)}
        known = {"attention_mask", "position_ids", self._cache}
        memory = self._state.keys() - known - {"use_cache", "logits_to_keep"}
        cache = held.get(self._cache)
        if memory or not isinstance(cache, Cache):
            return False
        cache.reorder_cache(cast(Any, kept_B))  # its annotation is of a class of tensors that no tensor has
        self._state |= {name: value[kept_B] for name, value in held.items() if isinstance(value, torch.Tensor)}
        self._ids_BT = self._ids_BT[kept_B]
        return True


class UncachedBatch(DecodeBatch):
    """Rows padded on the right; for each token the forward pass of training runs over the whole rows."""

    def __init__(
        self, model: nn.Module, prompts: Sequence[Prompt], most: int, pad_token: int, device: torch.device
    ) -> None:
        super().__init__(model, prompts, most, pad_token, device)
        lengths = np.array([len(prompt) for prompt in prompts])
        ids_BT = _padded_right(prompts, int(lengths.max()) + most, pad_token)
        self._ids_BT = torch.from_numpy(ids_BT).to(device)
        self._lengths_B = torch.from_numpy(lengths).to(device)
        self._width = int(lengths.max())

    def forward(self) -> torch.Tensor:
        hidden_BTD, weight, bias = hidden_states(self.model, self._ids_BT[:, : self._width])
        rows_B = torch.arange(len(hidden_BTD), device=self.device)
        return nn.functional.linear(hidden_BTD[rows_B, self._lengths_B - 1].to(weight.dtype), weight, bias)

    def _read_next(self, next_B: torch.Tensor, step: int) -> None:
        self._ids_BT[torch.arange(len(next_B), device=self.device), self._lengths_B] = next_B
        self._lengths_B = self._lengths_B + 1
        self._width += 1

    def _keep(self, kept: list[int], kept_B: torch.Tensor) -> bool:
        self._ids_BT, self._lengths_B = self._ids_BT[kept_B], self._lengths_B[kept_B]
        return True


BATCHES: dict[Caching, type[DecodeBatch]] = {
    Caching.DIRECT: DirectBatch,
    Caching.STATIC: StaticBatch,
    Caching.GROWING: GrowingBatch,
    Caching.NONE: UncachedBatch,
}


def cache_columns(lengths: Any, max_new_tokens: int) -> Any:
    """Number of columns of the cache for prompts of these lengths, rounded up to a size that suits kernels."""
    return round_up(lengths) + round_up(max_new_tokens)


def round_up(length: Any) -> Any:
    return -(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def cache_name(model: nn.Module) -> str:
    """Name of the cache argument: `cache` since about transformers 5.20, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _padded_left(prompts: Sequence[Prompt], width: int, pad_token: int) -> np.ndarray:
    ids_BW = np.full((len(prompts), width), pad_token, dtype=np.int64)
    for ids_W, prompt in zip(ids_BW, prompts):
        ids_W[width - len(prompt) :] = prompt
    return ids_BW


def _padded_right(prompts: Sequence[Prompt], width: int, pad_token: int) -> np.ndarray:
    ids_BW = np.full((len(prompts), width), pad_token, dtype=np.int64)
    for ids_W, prompt in zip(ids_BW, prompts):
        ids_W[: len(prompt)] = prompt
    return ids_BW
