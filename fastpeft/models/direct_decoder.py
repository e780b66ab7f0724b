"""Decoding for known model families without transformers' forward: prefill, then one token per row and step.

For every token transformers builds masks, rotations and index tensors, calls each small module of each layer from
Python, and reads its whole static cache. Here these tensors are built once, and attention reads the columns in use.
fastpeft.tasks.causal_lm.decode_check compares the results with the model's own.

Shapes: B rows, T tokens of the longest prompt, C columns of the buffers, S of them in use, D hidden, H heads, K of them
with keys and values, G = H / K, E width of a head, N layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fastpeft.models.fused_projections import Siblings
from fastpeft.models.layers import is_bare
from fastpeft.models.lm_head import decoder_of

Map = Callable[[torch.Tensor], torch.Tensor]
Joined = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_GEMMA = "gemma3_text"
_FAMILIES = frozenset({_GEMMA, "llama", "mistral", "qwen2", "qwen3"})
"""Supported values of config.model_type."""
_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles depend on the position only."""
_ATTENTION, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_SMALL = 4 << 20
"""Largest total size of weights that are joined, in bytes. Beyond it one product costs as much as several, and the copy
takes memory."""
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def direct_decoder(model: nn.Module) -> DirectDecoder | None:
    """The direct decoder of a bare causal LM; None if any part of it is unknown or has hooks."""
    config = cast(Any, getattr(model, "config", None))
    if getattr(config, "model_type", None) not in _FAMILIES or any(map(_is_changed, model.modules())):
        return None
    decoder = decoder_of(cast(Any, model))
    return DirectDecoder(model, decoder, config) if _is_known(decoder, config) else None


def _is_changed(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward. Hooks of fused projections do not count, since
    their parent is never called here."""
    hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
    return "forward" in module.__dict__ or any(not isinstance(getattr(h, "__self__", None), Siblings) for h in hooks)


def _is_known(decoder: Any, config: Any) -> bool:
    rope = config.rope_parameters
    ropes = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    if getattr(config, "use_bidirectional_attention", False) or any(r["rope_type"] not in _ROTATIONS for r in ropes):
        return False
    norms = _GEMMA_NORMS if config.model_type == _GEMMA else _NORMS
    return all(
        set(layer._modules) == {"self_attn", "mlp", *norms}
        and set(layer.self_attn._modules) in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
        and set(layer.mlp._modules) == _FEED_FORWARD
        for layer in decoder.layers
    )


class _Norm:
    """RMSNorm, sqrt(D) w x / sqrt(|x|^2 + eps D) (arXiv:1910.07467, eq. 4), with the fewest passes over x on a CPU. Its
    product with the weight is rounded once."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """`weight`: (..., D); D is the normalised axis."""
        size = weight.shape[-1]
        self.weight, self.scaled = weight, weight.float() * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(eps * size), device=weight.device)

    @classmethod
    def of(cls, module: Any, config: Any) -> _Norm:
        weight = module.weight.detach()
        return cls(1.0 + weight.float() if config.model_type == _GEMMA else weight, config.rms_norm_eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.direction(x.float()).mul_(self.scaled).to(x.dtype)

    def direction(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(|x|^2 + eps D)."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)


@dataclass(frozen=True)
class _Layer:
    """The parts of a layer as functions of (rows, D)."""

    project: Map
    """Concatenated queries, keys and values."""
    head_norm: _Norm | None
    """Norm of queries and keys."""
    attended: Joined
    """(x, output of attention) -> x plus its output projection."""
    open: Map
    """Concatenated gate and up projections."""
    act: Any
    close: Joined
    kind: str
    """Kind of its rotary embedding."""
    window: int | None
    """Number of most recent tokens, itself included, that a token attends to; None: all."""


Rotations = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Kind of layer -> cosines and sines of each position, (C, E) each; the first half of the sines is negated."""


class Columns:
    """The key-value cache. Column c holds token c of each row's prompt, if the prompt is that long. The columns after
    the longest prompt hold new tokens, one column per step."""

    def __init__(self, kv: torch.Tensor, lengths: Sequence[int], rotations: Rotations, windows: set[int]) -> None:
        """
        Args:
            kv: (N, B, 2K, C, E).
            windows: sizes of the sliding windows of layers, where they are shorter than a row.
        """
        self.rotations = rotations
        self.num_read, self.seen = max(lengths), 0
        self.lengths_B = torch.tensor(lengths, device=kv.device)
        self.place_B = self.lengths_B
        """Position of the next token of each row."""
        self._kv, self._windows = kv, windows
        column_C = torch.arange(kv.shape[3], device=kv.device)
        is_new_C = column_C >= self.num_read
        gap_BC = (column_C >= self.lengths_B[:, None]) & ~is_new_C
        self._bias_BC = torch.zeros(gap_BC.shape, dtype=kv.dtype, device=kv.device).masked_fill_(gap_BC, -math.inf)
        self._place_BC = column_C - (self.num_read - self.lengths_B)[:, None] * is_new_C if windows else None
        self.has_gaps = len(set(lengths)) > 1

    def by_layer(self, since: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per layer, the columns in use: keys and values, (B, K, S, E) each, and both from column `since` on."""
        used = self._kv[:, :, :, : self.seen]
        keys, values = used.chunk(2, dim=2)
        return zip(keys.unbind(0), values.unbind(0), used[:, :, :, since:].unbind(0))

    def biases(self) -> dict[int | None, torch.Tensor | None]:
        """Window -> bias on a token's scores, (B, 1, 1, S); None for no bias."""
        bias_BS = self._bias_BC[:, : self.seen]
        found: dict[int | None, torch.Tensor | None] = {None: bias_BS[:, None, None] if self.has_gaps else None}
        for window in self._windows:
            assert self._place_BC is not None
            is_far_BS = self._place_BC[:, : self.seen] <= self.place_B[:, None] - window
            found[window] = bias_BS.masked_fill(is_far_BS, -math.inf)[:, None, None]
        return found

    def keep(self, kept: list[int]) -> None:
        """Move row kept[i] to row i. Rows that keep their index are not copied."""
        moved = [i for i, row in enumerate(kept) if row != i]
        to, rows = (torch.tensor(of, device=self._kv.device) for of in (moved, kept))
        if moved:
            self._kv[:, to, :, : self.seen] = self._kv[:, rows[to], :, : self.seen]
        self._kv = self._kv[:, : len(kept)]
        self.lengths_B, self.place_B, self._bias_BC = self.lengths_B[rows], self.place_B[rows], self._bias_BC[rows]
        self._place_BC = None if self._place_BC is None else self._place_BC[rows]


class DirectDecoder:
    """Decoder over the model's layers, norms and head, which are read at construction."""

    def __init__(self, model: nn.Module, decoder: Any, config: Any) -> None:
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self.head, self._norm = cast(Any, model).lm_head, _Norm.of(decoder.norm, config)
        layers = decoder.layers[: config.num_hidden_layers]
        self._layers = [_layer(layer, i, config) for i, layer in enumerate(layers)]
        self._num_heads, self._num_keys = config.num_attention_heads, config.num_key_value_heads
        self._width, self._scale = layers[0].self_attn.head_dim, layers[0].self_attn.scaling

    def columns(self, lengths: Sequence[int], most: int, longest: int = 0) -> Columns:
        """Cache for prompts of these lengths and `most` new tokens each. `longest`: largest width that `read` gets."""
        weight, num_columns = self._embed.weight, max(lengths) + most
        size = len(self._layers), len(lengths), 2 * self._num_keys, num_columns, self._width
        like, places = weight.new_empty(0), torch.arange(max(num_columns, longest), device=weight.device)
        rotations = {kind: self._rotation(like, places, kind) for kind in {layer.kind for layer in self._layers}}
        windows = {layer.window for layer in self._layers if layer.window is not None and layer.window < num_columns}
        return Columns(weight.new_empty(size), lengths, rotations, windows)

    def _rotation(self, like: torch.Tensor, places_C: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        cos_1CE, sin_1CE = self._rotary(like, places_C[None], **({"layer_type": kind} if kind else {}))
        signed_CE = sin_1CE[0].clone()
        signed_CE[:, : self._width // 2].neg_()
        return cos_1CE[0], signed_CE

    def read(self, ids_BT: torch.Tensor, places_M: torch.Tensor, columns: Columns, rows: slice) -> torch.Tensor:
        """Read some rows' prompts and the tokens after them, padded on the right, and store the prompts in the cache.

        Returns the hidden states (M, D), normalised for the head, of the flattened tokens `places_M`."""
        x, columns.seen = self._embed(ids_BT).flatten(0, 1), columns.num_read
        width = ids_BT.shape[1]
        kept = min(width, columns.num_read)
        rotations = {kind: [of[:width, None] for of in tables] for kind, tables in columns.rotations.items()}
        for layer, (_, _, new) in zip(self._layers, columns.by_layer(0)):
            q, kv = (part.transpose(1, 2) for part in self._projected(layer, x, ids_BT.shape, *rotations[layer.kind]))
            new[rows, :, :kept] = kv[:, :, :kept]
            new[rows, :, kept:] = 0.0  # an attention weight of 0 cancels any finite value, but not NaN
            keys, values = kv.chunk(2, dim=1)
            mask = _band(width, layer.window, ids_BT.device)
            y = scaled_dot_product_attention(
                q, keys, values, mask, is_causal=mask is None, scale=self._scale, enable_gqa=keys.shape != q.shape
            )
            y = y.transpose(1, 2).reshape(len(x), -1)
            if layer is self._layers[-1]:
                x, y = x[places_M], y[places_M]
            x = _behind_attention(layer, x, y)
        return self._norm(x)

    def step(self, ids_B: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Logits (B, V) after one more token of each row."""
        column, columns.seen = columns.seen, columns.seen + 1
        num_rows, x = len(ids_B), self._embed(ids_B)
        biases, place_B = columns.biases(), columns.place_B
        rotations = {kind: [table_CE[place_B][:, None] for table_CE in of] for kind, of in columns.rotations.items()}
        for layer, (keys, values, new) in zip(self._layers, columns.by_layer(column)):
            q_BHE, kv_BKE = self._projected(layer, x, ids_B.shape, *rotations[layer.kind])
            new[:, :, 0] = kv_BKE
            y = scaled_dot_product_attention(
                q_BHE.view(num_rows, -1, self._num_heads // self._num_keys, self._width),  # heads of one key: queries
                keys,
                values,
                biases.get(layer.window, biases[None]),
                scale=self._scale,
            )
            x = _behind_attention(layer, x, y.view(num_rows, -1))
        columns.place_B = place_B + 1
        return self.head(self._norm(x))

    def _projected(
        self, layer: _Layer, x: torch.Tensor, shape: torch.Size, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, (*shape, H, E), and keys and values, (*shape, 2K, E); queries and keys are normed and rotated."""
        found = layer.project(x).view(*shape, -1, self._width)
        turned = found[..., : self._num_heads + self._num_keys, :]
        here = turned if layer.head_norm is None else layer.head_norm(turned)
        torch.addcmul(here * cos, here.roll(self._width // 2, -1), sin, out=turned)
        return found[..., : self._num_heads, :], found[..., self._num_heads :, :]


def _layer(layer: Any, index: int, config: Any) -> _Layer:
    own, mlp, is_gemma = layer.self_attn, layer.mlp, config.model_type == _GEMMA
    norms = [_Norm.of(getattr(layer, name), config) for name in (_GEMMA_NORMS if is_gemma else _NORMS)]
    before, after, before_mlp, after_mlp = norms if is_gemma else (norms[0], None, norms[1], None)
    kinds = getattr(config, "layer_types", None)
    slides = config.model_type == "mistral" if kinds is None else kinds[index] == "sliding_attention"
    return _Layer(
        project=_side_by_side([own.q_proj, own.k_proj, own.v_proj], before),
        head_norm=_head_norm(own, config) if "q_norm" in own._modules else None,
        attended=_added(own.o_proj, after),
        open=_side_by_side([mlp.gate_proj, mlp.up_proj], before_mlp),
        act=mlp.act_fn,
        close=_added(mlp.down_proj, after_mlp),
        kind=cast(Any, kinds)[index] if is_gemma else "",
        window=config.sliding_window if slides else None,
    )


def _head_norm(attention: Any, config: Any) -> _Norm:
    q, k = _Norm.of(attention.q_norm, config), _Norm.of(attention.k_norm, config)
    weights = q.weight.expand(config.num_attention_heads, -1), k.weight.expand(config.num_key_value_heads, -1)
    return _Norm(torch.cat(weights), config.rms_norm_eps)


def _side_by_side(modules: list[Any], norm: _Norm) -> Map:
    """x -> the concatenated outputs of several modules for the normalised x. Small modules are joined to one product,
    which includes the norm's weight."""
    is_small = all(is_bare(m, nn.Linear) for m in modules) and sum(m.weight.nbytes for m in modules) <= _SMALL
    if not is_small or modules[0].weight.dtype != torch.float32:

        def several(x: torch.Tensor) -> torch.Tensor:
            y = norm(x)
            return torch.cat([module(y) for module in modules], dim=-1)

        return several
    weight = (torch.cat([module.weight for module in modules]) * norm.scaled).t()
    if all(module.bias is None for module in modules):
        return lambda x: torch.mm(norm.direction(x), weight)
    bias = torch.cat([m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in modules])
    return lambda x: torch.addmm(bias, norm.direction(x), weight)


def _added(module: Any, norm: _Norm | None) -> Joined:
    """(x, y) -> x + norm(module(y)). May change x in place."""
    if norm is None and is_bare(module, nn.Linear) and module.bias is None:
        weight = module.weight.t()
        return lambda x, y: x.addmm_(y, weight)
    return lambda x, y: x + (module(y) if norm is None else norm(module(y)))


def _behind_attention(layer: _Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The rest of a layer after attention, from attention's output y."""
    x = layer.attended(x, y)
    gate, up = layer.open(x).chunk(2, dim=-1)
    return layer.close(x, layer.act(gate).mul_(up))


def _band(width: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(T, T) mask of which prompt tokens attend to which; None if no window hides any."""
    if window is None or window >= width:
        return None
    places = torch.arange(width, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)
