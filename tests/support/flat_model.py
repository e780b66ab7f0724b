"""Flat buffers of random numbers, with matrices of several shapes, other parameters and a head."""

from __future__ import annotations

import torch

from fastpeft.kernels import FlatLayout, MatrixGroup

# (indices, rank, in, out, scale): ranks are filled in; no size is a multiple of a tile.
SHAPES = (((2, 0), 17, 31, 2.0), ((1,), 129, 67, 0.5))
EXTRA, HEAD = (7, 40), (33, 3)


def make_layout(ranks, device="cpu", shapes=SHAPES, extra=EXTRA, head=HEAD) -> FlatLayout:
    """One group a shape, of its own rank."""
    groups, place = [], 0
    for (indices, num_in, num_out, scale), rank in zip(shapes, ranks, strict=True):
        groups.append(MatrixGroup(indices, rank, num_in, num_out, scale, place))
        place = groups[-1].end
    return FlatLayout(groups, extra, head, device)


class Random:
    """Random tensors of one seed, drawn on the CPU in fp64."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return drawn.to(self.dtype).to(self.device)
