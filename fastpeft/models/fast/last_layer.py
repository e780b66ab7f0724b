"""The last layer of an encoder, computed for the first token alone where the head reads no other.

Keys and values are those of all tokens; the query, the output and the feed-forward network are one row's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fastpeft.models.fast.attention_functions import NAME
from fastpeft.models.fast.deberta import DisentangledAttention
from fastpeft.models.fast.swaps import FAULTS, Fast, Outputs, alike, is_free, made

_PARTS = {"attention", "intermediate", "output"}


class FirstTokenLayer(Fast):
    """Returns (N, 1, D): of the first token."""

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
            isinstance(attention.self, DisentangledAttention) or _has_projections(attention.self)
        )

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        raise TypeError("what the head reads is not the layer's to know: see shorten_last_layer")

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *rest: Any, **more: Any):
        inner = self.attention.self
        if isinstance(inner, DisentangledAttention):
            x = inner(hidden_states, attention_mask, *rest, **more, num_queries=1)[0]
            return self._after(x, hidden_states), None
        return self._after(_first_query(inner, hidden_states, attention_mask), hidden_states)

    def _after(self, x: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.attention.output(x, hidden_states[:, :1])
        return cast(Any, self.output)(self.intermediate(x), x)


def _has_projections(module: Any) -> bool:
    settings = getattr(module, "config", None)
    found = {"query", "key", "value", "dropout"} == set(module._modules) and hasattr(module, "scaling")
    return found and getattr(settings, "_attn_implementation", None) in ("sdpa", NAME)


def _first_query(module: Any, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    from transformers import AttentionInterface

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(*y.shape[:-1], module.num_attention_heads, -1).transpose(1, 2)

    query = heads(module.query(x[:, :1]))
    key, value = heads(module.key(x)), heads(module.value(x))
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    function: Any = AttentionInterface()[module.config._attn_implementation]
    dropout = module.dropout.p if module.training else 0.0
    y = function(module, query, key, value, mask, dropout=dropout, scaling=module.scaling)[0]
    return y.flatten(2)


@torch.no_grad()
def shorten_last_layer(model: Any) -> bool:
    """Whether the last layer now computes the first token alone: tried with the whole model, whose head decides it."""
    layers = [module for module in model.modules() if FirstTokenLayer.fits(module)]
    if not type(model).__name__.endswith("ForSequenceClassification") or len(layers) < 2 or not is_free(layers[-1]):
        return False
    last, theirs, training = layers[-1], type(layers[-1]), model.training
    model.eval()
    try:
        expected = _logits(model)
        last.__class__ = made(FirstTokenLayer, theirs)
        if alike((_logits(model),), (expected,)):
            return True
    except FAULTS:
        pass
    finally:
        model.train(training)
    last.__class__ = theirs
    return False


def _logits(model: Any) -> torch.Tensor:
    """Of two rows of unequal length."""
    padding = model.config.pad_token_id or 0
    ids = (torch.arange(18, device=model.device).view(2, 9) + padding + 1) % model.config.vocab_size
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = padding, 0
    return model(input_ids=ids, attention_mask=mask).logits
