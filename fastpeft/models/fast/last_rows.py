"""The last layer of a decoder, computed after its attention only for the tokens that the head reads.

Shapes: N rows of T tokens, L of them read, D hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fastpeft.models.fast.swaps import FAULTS, Fast, Outputs, alike, is_free, made

ROWS = "fast_rows"
"""Keyword argument that a decoder passes to its layers: (L,), int64, indices into the N * T tokens."""

_TWO_NORMS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_FOUR_NORMS = _TWO_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


class RowsLayer(Fast):
    """Returns (L, D) if called with rows."""

    lever = "last_layer"
    self_attn: Any
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        parts = set(module._modules)
        return parts in (_TWO_NORMS, _FOUR_NORMS) and "o_proj" in cast(Any, module).self_attn._modules

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        raise TypeError("what the head reads is not the layer's to know: see read_rows_in_last_layer")

    def forward(self, hidden_states: torch.Tensor, *rest: Any, fast_rows: torch.Tensor | None = None, **more: Any):
        if fast_rows is None:
            return super().forward(hidden_states, *rest, **more)
        assert not rest, "decoders name their arguments"
        residual = hidden_states.flatten(0, 1).index_select(0, fast_rows)
        x = self._attention(self.input_layernorm(hidden_states), more)
        x = self.self_attn.o_proj(x.flatten(0, 1).index_select(0, fast_rows))
        if "pre_feedforward_layernorm" in self._modules:  # Gemma's
            x = residual + self.post_attention_layernorm(x)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = residual + x
        return x + self.mlp(self.post_attention_layernorm(x))

    def _attention(self, x: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        """Output of the heads, (N, T, heads * head size), before the output projection."""
        modules = self.self_attn._modules
        product, modules["o_proj"] = modules["o_proj"], _KEEP
        try:
            return self.self_attn(hidden_states=x, **more)[0]
        finally:
            modules["o_proj"] = product


_KEEP = nn.Identity()


def takes_rows(decoder: Any) -> bool:
    layers = getattr(decoder, "layers", None)
    return isinstance(layers, nn.ModuleList) and len(layers) > 0 and isinstance(layers[-1], RowsLayer)


@torch.no_grad()
def read_rows_in_last_layer(model: Any, decoder: Any) -> bool:
    """Swap the last layer and test the whole decoder, which has to pass rows on. Returns whether the swap was kept."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
        return False
    last, theirs, training = layers[-1], type(layers[-1]), model.training
    if not (is_free(last) and RowsLayer.fits(last)):
        return False
    ids = torch.arange(14, device=model.device).view(2, 7) % model.get_input_embeddings().weight.shape[0]
    rows = torch.tensor([2, 3, 9, 13], device=model.device)
    model.eval()
    try:
        expected = decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows]
        last.__class__ = made(RowsLayer, theirs)
        found = decoder(input_ids=ids, use_cache=False, **{ROWS: rows}).last_hidden_state
        if alike((found,), (expected,)):
            return True
    except FAULTS:
        pass
    finally:
        model.train(training)
    last.__class__ = theirs
    return False
