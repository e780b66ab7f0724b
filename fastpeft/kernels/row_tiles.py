"""Tile sizes of Triton kernels that read whole rows: a program takes a few rows and loads each at once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpeft.kernels.dispatch import runs_triton

WIDEST = 8192
"""Largest row that fits into the registers of one program, in features."""
_ELEMENTS = 2048


class RowTiles(NamedTuple):
    block_m: int
    """Rows per program."""
    block_d: int
    """Features, a power of two."""
    num_warps: int


def row_tiles(width: int, elements: int = _ELEMENTS) -> RowTiles:
    """Tile sizes for rows of `width` features, with about `elements` elements per program."""
    block_d = max(16, 1 << (width - 1).bit_length())
    return RowTiles(max(1, elements // block_d), block_d, min(16, max(4, block_d // 256)))


def takes_rows(x: torch.Tensor) -> bool:
    """Whether a kernel over whole rows can compute x (..., D)."""
    return runs_triton(x) and 0 < x.shape[-1] <= WIDEST and x.numel() > 0
