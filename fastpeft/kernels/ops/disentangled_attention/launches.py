"""disentangled_attention's Triton kernels, as functions of tensors. Nothing is asked of the device."""

from __future__ import annotations

from dataclasses import dataclass
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

PROGRAMS, MOST_SPLITS = 264, 32
"""Of position_gradients_kernel, two for each multiprocessor of an H100; so many sums of one band at most."""


@dataclass(frozen=True)
class Tiles:
    block: int
    """Queries and keys of a tile."""
    num_warps: int
    num_stages: int


def tiles(length: int, width: int, dtype: torch.dtype) -> Tiles:
    """For rows of up to so many tokens; no larger than what compiles without a spill for every GPU (tests/support)."""
    block = 32 if dtype == torch.float32 or width > 64 else 64
    return Tiles(min(block, max(16, 1 << (length - 1).bit_length())), 4, 1)


class _Call:
    """What all kernels are given."""

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
        self.tiles = tiles(max(distances.max_queries, distances.max_keys), self.width, query.dtype)
        self.blocks_q, self.blocks_k = (-(-n // self.tiles.block) for n in (distances.max_queries, distances.max_keys))
        mask, seed = attended.mask, attended.seed
        rows = attended.cu_queries, attended.cu_seqlens
        self.pointers = [*self.inputs, *self.tables, distances.rows_P, *rows]
        self.pointers += [query if mask is None else mask.view(torch.int8), query if seed is None else seed]
        strides = [x.stride(0) for x in self.inputs]
        self.numbers = [distances.rows_P.numel(), distances.max_keys, *strides, self.num_heads * self.width]
        self.numbers += [self.num_heads, attended.scale, drop_below(attended.dropout), 1 / (1 - attended.dropout)]
        self.constants: dict[str, Any] = {
            "BLOCK": self.tiles.block,
            "D": self.width,
            "BLOCK_D": max(16, 1 << (self.width - 1).bit_length()),
            "num_warps": self.tiles.num_warps,
            "num_stages": self.tiles.num_stages,
        } | self.has
        self.choices = {
            "HAS_MASK": mask is not None,
            "DROPOUT": attended.dropout > 0,
            "PRECISION": precision(query.dtype),
        }

    def launch(self, kernel: Any, grid: tuple[int, int, int], *rest: torch.Tensor, more: tuple[int, ...] = ()) -> None:
        if all(grid):
            launch(kernel, grid, *self.pointers, *rest, *self.numbers, *more, **self.constants, **self.choices)

    def over_queries(self) -> tuple[int, int, int]:
        return self.blocks_q, self.num_heads, self.num_rows

    def over_keys(self) -> tuple[int, int, int]:
        return self.blocks_k, self.num_heads, self.num_rows


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """Itself where the heads of a token lie one behind another, as in a projection's output or a part of one."""
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
    """y, and log2 of the sum of each query's weights, (T, H) in fp32."""
    call = _Call(query, key, value, position_keys, position_queries, attended)
    y = torch.zeros_like(query, memory_format=torch.contiguous_format)
    logsum = query.new_empty(query.shape[:2], dtype=torch.float32)
    call.launch(attend_kernel, call.over_queries(), y, logsum)
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
) -> tuple[torch.Tensor | None, ...]:
    """Of query, key, value and the two tables."""
    call = _Call(query, key, value, position_keys, position_queries, attended)
    dy, delta = dy.contiguous(), torch.empty_like(logsum)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    call.launch(query_gradients_kernel, call.over_queries(), y, dy, logsum, delta, dq)
    call.launch(key_gradients_kernel, call.over_keys(), dy, logsum, delta, dk, dv)
    dpk, dpq = (None if x is None else torch.zeros_like(x) for x in (position_keys, position_queries))
    if dpk is not None or dpq is not None:
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
    """Fills both."""
    num_diagonals = call.blocks_q + call.blocks_k - 1
    splits = max(1, min(call.num_rows, MOST_SPLITS, PROGRAMS // (num_diagonals * call.num_heads)))
    part = dy.new_empty(splits, call.num_heads, num_diagonals, 2, 2 * call.tiles.block, call.width, dtype=torch.float32)
    numbers = call.num_rows, splits, num_diagonals, call.blocks_k
    grid = num_diagonals, call.num_heads, splits
    call.launch(position_gradients_kernel, grid, dy, logsum, delta, part, more=numbers)
    distances = call.attended.distances
    launch(
        sum_positions_kernel,
        (distances.num_rows, call.num_heads),
        *(part, distances.starts_R1, part if dpk is None else dpk, part if dpq is None else dpq),
        *(distances.max_keys, splits, num_diagonals, call.blocks_k, call.num_heads * call.width, call.num_heads),
        call.attended.scale,
        **{name: call.constants[name] for name in ("BLOCK", "D", "BLOCK_D")},
        **call.has,
        SPLITS=1 << (splits - 1).bit_length(),
        num_warps=4,
    )
