"""A causal language model taken apart at its head: hidden states before it, and the linear map that it is."""

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
"""Fields of a model's config that make its logits more than W h + b -> the value that does nothing."""

_PROBE_LENGTH = 6
_PROBE_LOGIT = 1e3
"""The largest logit while a head is tried: far beyond what soft capping lets through."""


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    rows: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a causal LM's logits are made of, without making them: logits = hidden weight^T + bias.

    Goes through the adapter's layers and carries gradients. Rows are padded on their right and need no mask: a causal
    model sees nothing of what follows, so that hidden states at real positions are the same, and attention may take
    its fast path.

    Args:
        model: a causal LM that load_causal_lm has accepted, bare or in a PeftModel.
        input_ids: B x T.
        rows: L, int64, of the B * T tokens: only these are asked for, and where the last layer can leave out the
            others, it does.
        position_ids: B x T, of rows that hold several texts, each counted from 0; models that take such positions for
            what they are keep the texts apart.
        sequences: of 1 x T tokens without padding, for a model that takes them (models.varlen).

    Returns:
        hidden: B x T x D, or L x D with `rows`; normalised, as the head takes them.
        weight: V x D, the head's; with tied embeddings it is the embedding's. Where it requires a gradient the head is
            trained, and linear_cross_entropy refuses it: use logits_cross_entropy.
        bias: V, or None.
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
    """The transformers model in a PeftModel, its adapted layers included; any other model as it is."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return cast(Any, model).get_base_model()
    return cast("PreTrainedModel", model)


def decoder_of(model: PreTrainedModel) -> Any:
    """What stands before the head. Of Llama4ForCausalLM transformers names the model itself, up to 5.24 at least."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a language model; None where there is none."""
    return cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def fewer_logits(model: nn.Module, most: int = 4096) -> Iterator[None]:
    """Logits of `most` tokens or somewhat fewer, evenly spaced: comparing two passes needs no more.

    Of a small model the head is most of a short pass: 671 of 1,072 MB of weights in Gemma 3 270M. A head that is more
    than nn.Linear stays whole.
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
    """That hidden_states says what the model says, and that the model is causal, tried on a few tokens.

    Raises:
        UserError: logits that are more than a linear map of the hidden states.
        UnavailableError: a model whose tokens see those that follow.
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
    except Exception as error:  # get_decoder() is a best effort of transformers
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
