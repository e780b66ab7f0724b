"""fastpeft's attention functions for transformers: attention with dropout on a CPU, where torch has no fast path, and
attention over packed rows without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastpeft.kernels.ops.attention.op import attention
from fastpeft.kernels.ops.varlen_attention.op import varlen_attention
from fastpeft.kernels.sequences import Sequences
from fastpeft.models.fast.small_parts import on_cpu

NAME = "fastpeft"
_PLAIN = {"is_causal", "position_ids", "output_hidden_states", "output_attentions", "use_cache", "return_dict"}
"""Keyword arguments that have no effect if they are None or False."""


def use(model: Any) -> bool:
    """Route the model's attention through this module, which works for encoders on torch's attention. Returns whether
    it does."""
    settings = model.config
    drops = getattr(settings, "attention_probs_dropout_prob", 0) or getattr(settings, "attention_dropout", 0)
    if not drops or getattr(settings, "is_decoder", False):
        return False
    return use_for_sequences(model)


def use_for_sequences(model: Any) -> bool:
    """Route the model's attention through this module, so that it accepts Sequences in place of a mask. Returns whether
    it does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    way = getattr(model.config, "_attn_implementation", None)
    if way != "sdpa":
        return way == NAME
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def stop_using(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Sequences | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' signature: query (N, H, Q, D), key and value (N, H, T, D); returns (N, Q, H, D).
    With Sequences in place of a mask N is 1."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, Sequences):
        y = within_sequences(
            query, key, value, attention_mask, dropout, scaling, module.is_causal, settings.get("sliding_window")
        )
        return y, None
    plain = not any(value is not None and value is not False for key, value in settings.items() if key not in _PLAIN)
    if not (dropout and plain and on_cpu(query) and query.shape[1] == key.shape[1] and _is_bias(attention_mask)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attention(query, key, value, scale, attention_mask, dropout=dropout), None


def within_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    dropout: float,
    scaling: float | None,
    causal: Any = False,
    window: int | None = None,
) -> torch.Tensor:
    """Attention within rows: query (1, H, Q, D), key and value (1, G, T, D) -> (1, Q, H, D). Q is T, or the number of
    rows if only first tokens are queries."""
    first_only = query.shape[2] != key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    y = varlen_attention(
        query, key, value, sequences, scale, causal=bool(causal), window=window, first_only=first_only, dropout=dropout
    )
    return y.unsqueeze(0)


def _is_bias(mask: torch.Tensor | None) -> bool:
    return mask is None or (mask.is_floating_point() and mask.ndim == 4 and mask.shape[1] == 1)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *arguments: Any,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> torch.Tensor | None:
    """(N, 1, 1, T) bias for padding only, 0 or the dtype's lowest number. Does not read the mask's values."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is not bidirectional_mask_function or arguments or attention_mask is None:
        if mask_function is not None:
            settings["mask_function"] = mask_function
        return sdpa_mask(
            batch_size, q_length, kv_length, *arguments, attention_mask=attention_mask, dtype=dtype, **settings
        )
    lowest = torch.finfo(dtype).min
    padding = attention_mask[:, None, None, -kv_length:].logical_not()
    return torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill_(padding, lowest)
