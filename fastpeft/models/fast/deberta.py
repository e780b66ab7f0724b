"""DeBERTa's attention: only the distances that a batch has are projected, and no scores of positions are gathered.

Shapes: N rows, T tokens, Q of them asked for, H heads, P = Q + T - 1 distances.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from fastpeft.kernels.ops.attention.op import attention
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
        attention_mask: torch.Tensor,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
        num_queries: int | None = None,
    ) -> tuple[torch.Tensor, None]:
        """`relative_pos` is what transformers' encoder makes of the length. `num_queries`: only of the first tokens."""
        if output_attentions or query_states is not None or rel_embeddings is None or attention_mask.ndim != 4:
            assert num_queries is None, "asked for by the last layer, which has none of these"
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        length = hidden_states.shape[1]
        asked = length if num_queries is None else num_queries
        query = self.query_proj(hidden_states if asked == length else hidden_states[:, :asked])
        key, value = self.key_proj(hidden_states), self.value_proj(hidden_states)
        position_keys, position_queries = self._positions(asked, length, rel_embeddings)
        parts = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        padding = attention_mask.diagonal(dim1=-2, dim2=-1)[:, :, None, :] == 0
        bias = torch.zeros(padding.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(padding, torch.finfo(query.dtype).min)
        y = attention(
            self._heads(query),
            self._heads(key),
            self._heads(value),
            1 / math.sqrt(query.shape[-1] // self.num_attention_heads * parts),
            bias,
            position_keys,
            position_queries,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return y.flatten(2), None

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, -1)

    def _positions(
        self, asked: int, length: int, rel_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(P, H, D) of the distances i - j, from i = Q - 1 down for the keys' table, up for the queries'."""
        rows_P = self._table_rows(asked, length)
        first, last = int(rows_P[0]), int(rows_P[-1])
        band = self.pos_dropout(rel_embeddings[first : last + 1]).unsqueeze(0)
        queries = keys = None
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else cast(Any, self).pos_query_proj
            queries = self._heads(project(band)[0])
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else cast(Any, self).pos_key_proj
            keys = self._heads(project(band)[0])
        if last - first + 1 != len(rows_P):  # far distances share rows
            index_P = torch.from_numpy(rows_P - first).to(band.device)
            queries, keys = (None if x is None else x.index_select(0, index_P) for x in (queries, keys))
        return None if keys is None else keys.flip(0), queries

    def _table_rows(self, asked: int, length: int) -> Any:
        """Of the distances i - j from 1 - T to Q - 1, ascending; on the host."""
        import numpy as np

        distances_P = np.arange(1 - length, asked)
        buckets, furthest = self.position_buckets, self.max_relative_positions
        if buckets > 0 and furthest > 0:
            middle = buckets // 2
            size = np.maximum(np.abs(distances_P), 1)
            far = np.ceil(np.log(size / middle) / np.log((furthest - 1) / middle) * (middle - 1)) + middle
            distances_P = np.where(size <= middle, distances_P, far * np.sign(distances_P)).astype(np.int64)
        span = self.pos_ebd_size
        return np.clip(distances_P + span, 0, 2 * span - 1)
