"""A causal language model split at its head: the hidden states before it, and the head as a linear map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastpeft.errors import UnavailableError, UserError, first_line
from fastpeft.kernels.sequences import Sequences
from fastpeft.models.fast.last_rows import ROWS, takes_rows
from fastpeft.models.layers import is_bare
from fastpeft.models.one_text_a_row import one_text_a_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEYOND_LINEAR = {
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
}
"""Config fields by which logits are not W h + b -> the value that has no effect."""

_PROBE_LENGTH = 6
_PROBE_LOGIT = 1e3
"""Largest logit in the test of a head, far above any soft cap."""


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    rows: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The factors of a causal LM's logits, without the logits: logits = hidden weight^T + bias.

    The forward pass includes the adapter and is differentiable. Rows are padded on the right and need no mask: causal
    attention never reads later tokens, so that padding does not change the hidden states of real tokens, and attention
    can use its fast path.

    Args:
        model: a causal LM that load_causal_lm has accepted, bare or in a PeftModel.
        input_ids: (B, T).
        rows: (L,), int64, indices into the B * T tokens. Only these are returned. The last layer skips the other tokens
            if it can.
        position_ids: (B, T), for rows that hold several texts, with positions from 0 in each text. Models that detect
            packed texts by such positions keep them apart.
        sequences: offsets of packed rows in (1, T) tokens, for a model patched by models.varlen.

    Returns:
        hidden: (B, T, D), or (L, D) with `rows`; normalised for the head.
        weight: (V, D), the head's weight; with tied embeddings the embedding's. If it requires a gradient the head is
            trained, and linear_cross_entropy refuses it: use logits_cross_entropy.
        bias: (V,), or None.
    """
    bare = bare_model(model)
    head = bare.get_output_embeddings()
    assert head is not None, "check_causal_lm has found one"
    decoder = decoder_of(bare)
    asked = {ROWS: rows} if rows is not None and takes_rows(decoder) else {}
    placed: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    placed |= {} if sequences is None else {"attention_mask": sequences}
    with one_text_a_row() if position_ids is None else nullcontext():
        hidden = decoder(input_ids=input_ids, use_cache=False, **placed, **asked).last_hidden_state
    if rows is not None and not asked:
        hidden = hidden.flatten(0, 1).index_select(0, rows)
    return hidden, head.weight, getattr(head, "bias", None)


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, with its adapted layers; any other model unchanged."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return cast(Any, model).get_base_model()
    return cast("PreTrainedModel", model)


def decoder_of(model: PreTrainedModel) -> Any:
    """The model without its head. For Llama4ForCausalLM transformers returns the whole model, at least up to 5.24."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a language model; None for other models."""
    return cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def fewer_logits(model: nn.Module, most: int = 4096) -> Iterator[None]:
    """Context in which the head returns logits of at most `most` evenly spaced tokens, enough to compare two passes.

    In a small model the head dominates a short forward pass: it has 671 of 1,072 MB of weights in Gemma 3 270M. A head
    that is not a plain nn.Linear is not changed.
    """
    head = output_embeddings(bare_model(model))
    if head is None or not is_bare(head, nn.Linear) or len(head.weight) <= most:
        yield
        return
    whole, every = (head.weight, head.bias), -(-len(head.weight) // most)
    weight, bias = (None if held is None else nn.Parameter(held.detach()[::every].clone(), False) for held in whole)
    try:
        head.weight, head.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
        yield
    finally:
        head.weight, head.bias = whole


@torch.no_grad()
def check_causal_lm(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that hidden_states reproduces the model's logits, and that the model is causal.

    Raises:
        UserError: the logits are not a linear map of the hidden states.
        UnavailableError: tokens attend to later tokens.
    """
    kind = type(model).__name__
    settings = model.config.get_text_config(decoder=True)
    for field, plain in _BEYOND_LINEAR.items():
        value = getattr(settings, field, None)
        if value is not None and value != plain:
            raise UserError(_not_linear(name, kind, f"its config sets {field} to {value}"))
    head = output_embeddings(model)
    if not isinstance(head, nn.Linear):
        raise UserError(_not_linear(name, kind, f"its head is {type(head).__name__}, not nn.Linear"))
    ids_BT = torch.arange(2 * _PROBE_LENGTH, device=head.weight.device).view(2, -1) % len(head.weight)
    ids_BT[1, :-1] = ids_BT[0, :-1]
    try:
        hidden_BTD, weight_VD, bias_V = hidden_states(model, ids_BT)
    except Exception as error:  # transformers gives no guarantee for get_decoder()
        reason = f"its decoder cannot be run by itself ({type(error).__name__}: {first_line(error)})"
        raise UserError(_not_linear(name, kind, reason)) from error
    if hidden_BTD.shape[-1] != weight_VD.shape[-1]:
        reason = f"its head reads {weight_VD.shape[-1]} numbers a token and its decoder gives {hidden_BTD.shape[-1]}"
        raise UserError(_not_linear(name, kind, reason))
    tolerance = 1e-5 if hidden_BTD.dtype == torch.float32 else 1e-2
    first_TD, second_TD = hidden_BTD[:, :-1].float()
    if float((first_TD - second_TD).norm()) > tolerance * float(first_TD.norm()):
        raise UnavailableError(
            f"model.name {name}: {kind} is no causal language model: its tokens see those that follow"
        )
    plain_BTV = nn.functional.linear(hidden_BTD, weight_VD)
    factor = _PROBE_LOGIT / max(float(plain_BTV.abs().max()), 1e-30)
    wanted_BTV = (plain_BTV.float() * factor) + (0 if bias_V is None else bias_V.float())
    hook = head.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
    try:
        found_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    finally:
        hook.remove()
    apart = float((found_BTV - wanted_BTV).abs().max()) if found_BTV.shape == wanted_BTV.shape else float("inf")
    if not apart <= tolerance * _PROBE_LOGIT:
        raise UserError(_not_linear(name, kind, f"tried on a few tokens, they differ from that by {apart:.2g}"))


def _not_linear(name: str, kind: str, found: str) -> str:
    return (
        f"model.name {name}: the logits of {kind} are not a linear map of its hidden states: {found}. The loss is "
        "computed from that map and would be another one; choose a model without it, such as Qwen3, Llama or Mistral"
    )
