"""disentangled_attention's Triton kernels, as functions of tensors. The host never waits for the device."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.launch import launch
from fastpeft.kernels.ops.disentangled_attention.kernel import (
    attend_kernel,
    key_gradients_kernel,
    position_gradients_kernel,
    query_gradients_kernel,
    sum_positions_kernel,
)
from fastpeft.kernels.ops.disentangled_attention.row_plan import Attended
from fastpeft.kernels.ops.lora_linear.fused import precision
from fastpeft.kernels.ops.lora_linear.reference import drop_below

PROGRAMS, MOST_SPLITS = 1056, 32
"""Target number of programs of position_gradients_kernel, eight per multiprocessor of an H100; most partial sums per
band."""
BAND_BLOCK = 16
"""Queries and keys of a tile of position_gradients_kernel. With 32 it would spill registers."""
NUM_WARPS = 4


def block(length: int, dtype: torch.dtype) -> int:
    """Queries and keys of the other kernels' tiles, for rows of up to `length` tokens. Larger tiles would spill."""
    return 16 if dtype == torch.float32 or length <= 16 else 32


class _Call:
    """The arguments that all kernels share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_keys: torch.Tensor | None,
        position_queries: torch.Tensor | None,
        attended: Attended,
    ) -> None:
        self.attended, (_, self.num_heads, self.width) = attended, query.shape
        self.num_rows = attended.cu_seqlens.numel() - 1
        self.inputs = [_by_token(x) for x in (query, key, value)]
        tables = [None if x is None else x.contiguous() for x in (position_keys, position_queries)]
        self.has = {"C2P": tables[0] is not None, "P2C": tables[1] is not None}
        self.tables = [query if x is None else x for x in tables]
        distances = attended.distances
        self.block = block(distances.max_keys, query.dtype)
        mask, seed = attended.mask, attended.seed
        rows = attended.cu_queries, attended.cu_seqlens
        self.pointers = [*self.inputs, *self.tables, distances.rows_P, *rows]
        self.pointers += [
            query if mask is None else mask.contiguous().view(torch.int8),
            query if seed is None else seed,
        ]
        strides = [x.stride(0) for x in self.inputs]
        self.numbers = [distances.rows_P.numel(), distances.max_keys, *strides, self.num_heads * self.width]
        self.numbers += [self.num_heads, attended.scale, drop_below(attended.dropout), 1 / (1 - attended.dropout)]
        self.constants: dict[str, Any] = {"D": self.width, "BLOCK_D": max(16, 1 << (self.width - 1).bit_length())}
        self.constants |= self.has | {"num_warps": NUM_WARPS, "num_stages": 1}
        self.choices = {
            "HAS_MASK": mask is not None,
            "DROPOUT": attended.dropout > 0,
            "PRECISION": precision(query.dtype),
        }

    def launch(self, kernel: Any, num_tiles: int, *rest: torch.Tensor) -> None:
        """Launch one program per tile, head and row."""
        grid = num_tiles, self.num_heads, self.num_rows
        if all(grid):
            constants = self.constants | self.choices
            launch(kernel, grid, *self.pointers, *rest, *self.numbers, BLOCK=self.block, **constants)

    def over_queries(self, kernel: Any, *rest: torch.Tensor) -> None:
        self.launch(kernel, -(-self.attended.distances.max_queries // self.block), *rest)

    def over_keys(self, kernel: Any, *rest: torch.Tensor) -> None:
        self.launch(kernel, -(-self.attended.distances.max_keys // self.block), *rest)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """x if the heads of a token are contiguous, as in (a slice of) a projection's output; else a contiguous copy."""
    width = x.shape[-1]
    return x if x.stride(-1) == 1 and x.stride(-2) == width else x.contiguous()


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_keys: torch.Tensor | None,
    position_queries: torch.Tensor | None,
    attended: Attended,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and log2 of the sum of each query's unnormalised weights, (T, H) in fp32."""
    call = _Call(query, key, value, position_keys, position_queries, attended)
    y = torch.zeros_like(query, memory_format=torch.contiguous_format)
    logsum = query.new_empty(query.shape[:2], dtype=torch.float32)
    call.over_queries(attend_kernel, y, logsum)
    return y, logsum


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_keys: torch.Tensor | None,
    position_queries: torch.Tensor | None,
    y: torch.Tensor,
    logsum: torch.Tensor,
    dy: torch.Tensor,
    attended: Attended,
    *,
    of_positions: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key and value, and with `of_positions` of the two tables."""
    call = _Call(query, key, value, position_keys, position_queries, attended)
    dy, delta = dy.contiguous(), torch.empty_like(logsum)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    call.over_queries(query_gradients_kernel, y, dy, logsum, delta, dq)
    call.over_keys(key_gradients_kernel, dy, logsum, delta, dk, dv)
    if not of_positions:
        return dq, dk, dv, None, None
    dpk, dpq = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (position_keys, position_queries)
    )
    _position_gradients(call, dy, logsum, delta, dpk, dpq)
    return dq, dk, dv, dpk, dpq


def _position_gradients(
    call: _Call,
    dy: torch.Tensor,
    logsum: torch.Tensor,
    delta: torch.Tensor,
    dpk: torch.Tensor | None,
    dpq: torch.Tensor | None,
) -> None:
    """Fill dpk and dpq."""
    distances = call.attended.distances
    blocks_q, blocks_k = (-(-num // BAND_BLOCK) for num in (distances.max_queries, distances.max_keys))
    num_diagonals = blocks_q + blocks_k - 1
    splits = max(1, min(call.num_rows, MOST_SPLITS, PROGRAMS // (num_diagonals * call.num_heads)))
    part = dy.new_empty(splits, call.num_heads, num_diagonals, 2, 2 * BAND_BLOCK, call.width, dtype=torch.float32)
    launch(
        position_gradients_kernel,
        (num_diagonals, call.num_heads, splits),
        *(*call.pointers, dy, logsum, delta, part, *call.numbers, call.num_rows, splits, num_diagonals, blocks_k),
        BLOCK=BAND_BLOCK,
        **call.constants,
        **call.choices,
    )
    launch(
        sum_positions_kernel,
        (distances.num_rows, call.num_heads),
        *(part, distances.starts_R1, part if dpk is None else dpk, part if dpq is None else dpq),
        *(distances.max_keys, splits, num_diagonals, blocks_k, call.num_heads * call.width, call.num_heads),
        call.attended.scale,
        BLOCK=BAND_BLOCK,
        SPLITS=1 << (splits - 1).bit_length(),
        **call.constants,
    )
