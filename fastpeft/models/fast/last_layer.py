"""The last layer of an encoder, computed for the first token only, if the head reads no other token.

Keys and values are computed for all tokens; query, output and feed-forward network for the first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from fastpeft.kernels.sequences import Sequences
from fastpeft.models.fast.attention_functions import NAME, within_sequences
from fastpeft.models.fast.deberta import DisentangledAttention
from fastpeft.models.fast.swaps import FAULTS, Fast, Outputs, alike, is_free, made

_PARTS = {"attention", "intermediate", "output"}


class FirstTokenLayer(Fast):
    """Returns (N, 1, D), the first token's output. `attention_mask` may be Sequences, for packed rows."""

    lever = "last_layer"
    attention: Any
    intermediate: nn.Module
    output: nn.Module

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        if not set(module._modules) >= _PARTS or getattr(module, "is_decoder", False):
            return False
        attention: Any = module.attention
        return {"self", "output"} <= set(attention._modules) and (
            isinstance(attention.self, DisentangledAttention) or FirstTokenAttention.fits(attention.self)
        )

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        raise TypeError("what the head reads is not the layer's to know: see shorten_last_layer")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | Sequences | None = None,
        *rest: Any,
        **more: Any,
    ):
        inner = self.attention.self
        if isinstance(inner, DisentangledAttention):
            x = inner(hidden_states, attention_mask, *rest, **more, num_queries=1)[0]
            return self._after(x, hidden_states, attention_mask), None
        x = inner(hidden_states, attention_mask=attention_mask, **more)[0]
        return self._after(x, hidden_states, attention_mask)

    def _after(self, x: torch.Tensor, hidden_states: torch.Tensor, mask: torch.Tensor | Sequences | None):
        first = mask.take_first(hidden_states) if isinstance(mask, Sequences) else hidden_states[:, :1]
        x = self.attention.output(x, first)
        return cast(Any, self.output)(self.intermediate(x), x)


class FirstTokenAttention(Fast):
    """Returns (N, 1, D), the attention output of the first token's query."""

    lever = "last_layer"
    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    config: Any
    num_attention_heads: int
    scaling: float

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return {"query", "key", "value", "dropout"} == set(module._modules) and hasattr(module, "scaling")

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        raise TypeError("see shorten_last_layer")

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | Sequences | None = None, **more: Any):
        from transformers import AttentionInterface

        if isinstance(attention_mask, Sequences):
            return self._within(hidden_states, attention_mask), None
        way = self.config._attn_implementation
        if way not in ("sdpa", NAME):
            return super().forward(hidden_states, attention_mask=attention_mask, **more)[0][:, :1], None
        query = self._heads(self.query(hidden_states[:, :1]))
        key, value = self._heads(self.key(hidden_states)), self._heads(self.value(hidden_states))
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        function: Any = AttentionInterface()[way]
        dropout = self.dropout.p if self.training else 0.0
        return function(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)[0].flatten(2), None

    def _within(self, x_1TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        first = sequences.take_first(x_1TD).transpose(0, 1)
        query, key, value = (self._heads(x) for x in (self.query(first), self.key(x_1TD), self.value(x_1TD)))
        dropout = self.dropout.p if self.training else 0.0
        return within_sequences(query, key, value, sequences, dropout, self.scaling).flatten(2).transpose(0, 1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, -1).transpose(1, 2)


@torch.no_grad()
def shorten_last_layer(model: Any) -> bool:
    """Swap the last layer and test the whole model, since the head decides which tokens are read. Returns whether the
    swap was kept."""
    layers = [module for module in model.modules() if FirstTokenLayer.fits(module)]
    if not type(model).__name__.endswith("ForSequenceClassification") or len(layers) < 2 or not is_free(layers[-1]):
        return False
    last, training = layers[-1], model.training
    inner = cast(Any, last).attention.self
    theirs = type(last), type(inner)
    model.eval()
    try:
        expected = _logits(model)
        last.__class__ = made(FirstTokenLayer, theirs[0])
        if not isinstance(inner, DisentangledAttention):
            inner.__class__ = made(FirstTokenAttention, theirs[1])
        if alike((_logits(model),), (expected,)):
            return True
    except FAULTS:
        pass
    finally:
        model.train(training)
    last.__class__, inner.__class__ = theirs
    return False


@contextmanager
def every_token(model: nn.Module) -> Iterator[None]:
    """Context in which the last layer computes all tokens."""
    short = [m for m in model.modules() if isinstance(m, (FirstTokenLayer, FirstTokenAttention))]
    kinds = [type(module) for module in short]
    for module, kind in zip(short, kinds):
        cast(Any, module).__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        for module, kind in zip(short, kinds):
            cast(Any, module).__class__ = kind


def _logits(model: Any) -> torch.Tensor:
    """Logits of two rows of unequal length."""
    padding = model.config.pad_token_id or 0
    ids = (torch.arange(18, device=model.device).view(2, 9) + padding + 1) % model.config.vocab_size
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = padding, 0
    return model(input_ids=ids, attention_mask=mask).logits
