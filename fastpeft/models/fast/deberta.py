"""DeBERTa's attention, which projects only the distances that occur in a batch, and gathers no position scores.

Shapes: N rows, T tokens, Q queries, H heads, R rows of the position table.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.op import disentangled_attention
from fastpeft.kernels.sequences import Sequences
from fastpeft.models.fast.swaps import TRIAL_ROWS, Fast, Outputs, noise, with_gradients

_PARTS = {"query_proj", "key_proj", "value_proj", "pos_dropout", "dropout"}


class DisentangledAttention(Fast):
    """Disentangled attention (arXiv:2006.03654, eq. 4) of DeBERTa v2 and v3."""

    lever = "attention"
    query_proj: nn.Module
    key_proj: nn.Module
    value_proj: nn.Module
    pos_dropout: nn.Dropout
    dropout: nn.Dropout
    num_attention_heads: int
    pos_att_type: list[str]
    share_att_key: bool
    position_buckets: int
    max_relative_positions: int
    pos_ebd_size: int

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        named = type(module).__name__ == "DisentangledSelfAttention" and set(module._modules) >= _PARTS
        return named and getattr(module, "relative_attention", False) and hasattr(module, "pos_ebd_size")

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        attention: Any = module
        width = attention.query_proj.weight.shape[1]
        x, table = noise(module, 2, TRIAL_ROWS, width), noise(module, 2 * attention.pos_ebd_size, width)
        mask = torch.ones(2, TRIAL_ROWS, device=x.device)
        mask[1, -2:] = 0
        pairs = mask[:, None, None, :] * mask[:, None, :, None]

        def found(x: torch.Tensor, table: torch.Tensor, module: Any) -> torch.Tensor:
            return module(x, pairs, rel_embeddings=table)[0] * mask[:, :, None]

        return lambda module: with_gradients(lambda x, table: found(x, table, module), x, table)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | Sequences,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
        num_queries: int | None = None,
    ) -> tuple[torch.Tensor, None]:
        """`relative_pos` is the encoder's tensor for this length. `num_queries`: number of first tokens that are
        queries; for packed rows, with Sequences in place of a mask, one token per row."""
        if isinstance(attention_mask, Sequences):
            assert rel_embeddings is not None, "relative attention has them"
            return self._within(hidden_states, attention_mask, rel_embeddings, num_queries is not None)
        if output_attentions or query_states is not None or rel_embeddings is None or attention_mask.ndim != 4:
            assert num_queries is None, "asked for by the last layer, which has none of these"
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        num_rows, length = hidden_states.shape[:2]
        asked = length if num_queries is None else num_queries
        band = self._band(asked, length, hidden_states.device)
        query = self.query_proj(hidden_states if asked == length else hidden_states[:, :asked])
        key, value = self.key_proj(hidden_states), self.value_proj(hidden_states)
        y = self._attend(
            (query, key, value),
            rel_embeddings,
            band,
            _ends(num_rows, length, key.device),
            _ends(num_rows, asked, key.device),
            attention_mask.diagonal(dim1=-2, dim2=-1).flatten() != 0,
        )
        return y.view(num_rows, asked, -1), None

    def _within(
        self, x_1TD: torch.Tensor, sequences: Sequences, rel_embeddings: torch.Tensor, first_only: bool
    ) -> tuple[torch.Tensor, None]:
        """Attention over packed rows: (1, T, D), or (N, 1, D) for first tokens."""
        queries = sequences.firsts if first_only else sequences
        band = self._band(queries.longest, sequences.longest, x_1TD.device)
        asked = sequences.take_first(x_1TD) if first_only else x_1TD
        projected = self.query_proj(asked), self.key_proj(x_1TD), self.value_proj(x_1TD)
        y = self._attend(projected, rel_embeddings, band, sequences.cu_seqlens, queries.cu_seqlens)
        return y.view(*asked.shape[:2], -1), None

    def _attend(
        self,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rel_embeddings: torch.Tensor,
        band: Band,
        cu_seqlens: torch.Tensor,
        cu_queries: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(number of queries, H, D); `projected`: query, key and value, each (rows, tokens, width)."""
        position_keys, position_queries = self._positions(rel_embeddings[band.first : band.end])
        query, key, value = (self._heads(x).flatten(0, 1) for x in projected)
        parts = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        return disentangled_attention(
            query,
            key,
            value,
            position_keys,
            position_queries,
            band.distances,
            1 / math.sqrt(query.shape[-1] * parts),
            cu_seqlens,
            cu_queries=cu_queries,
            mask=mask,
            dropout=self.dropout.p if self.training else 0.0,
        )

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, -1)

    def _positions(self, table_RD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Position keys and position queries, (R, H, D) each; None where the model has none."""
        band = self.pos_dropout(table_RD)[None, None]  # the extra dimension tells a RowMask that it holds no tokens
        keys = queries = None
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else cast(Any, self).pos_query_proj
            queries = self._heads(project(band)[0, 0])
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else cast(Any, self).pos_key_proj
            keys = self._heads(project(band)[0, 0])
        return keys, queries

    def _band(self, asked: int, length: int, device: torch.device) -> Band:
        return _band(asked, length, self.position_buckets, self.max_relative_positions, self.pos_ebd_size, device)


class Band(NamedTuple):
    """The rows of the position table that the distances of a batch use."""

    first: int
    end: int
    distances: Distances


@cache  # never freed: a captured graph reads from its address
def _band(asked: int, length: int, buckets: int, furthest: int, span: int, device: torch.device) -> Band:
    """Band of the distances i - j from 1 - T to Q - 1, bucketed as by transformers' make_log_bucket_position."""
    distances_P = np.arange(1 - length, asked)
    if buckets > 0 and furthest > 0:
        middle = buckets // 2
        size = np.maximum(np.abs(distances_P), 1)
        far = np.ceil(np.log(size / middle) / np.log((furthest - 1) / middle) * (middle - 1)) + middle
        distances_P = np.where(size <= middle, distances_P, far * np.sign(distances_P)).astype(np.int64)
    rows_P = np.clip(distances_P + span, 0, 2 * span - 1)
    first, last = int(rows_P[0]), int(rows_P[-1])
    return Band(first, last + 1, Distances.of((rows_P - first).tolist(), length, device))


@cache  # never freed: a captured graph reads from its address
def _ends(num_rows: int, length: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of `num_rows` rows of equal length."""
    return torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length
