"""Quantisation of matrices to 8 or 4 bits with one scale per row, in training and in files.

Training uses the quantised values (straight-through: the gradient ignores the rounding), so that a file holds exactly
the values that were evaluated. Quantising dequantised values gives the same codes and scales: a scale keeps 16 of
fp32's 24 bits, so that its products with codes are exact.
"""

from __future__ import annotations

from typing import Any

import torch

LEVELS = {8: 127, 4: 7}
"""Bits -> the largest code; codes are symmetric."""
_KEPT_BITS = -256
"""Mask on the bits of fp32 that clears the lowest 8."""


def quantise(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows x columns, int8) and scales (rows, fp32) of a matrix. A row of zeros has scale 0."""
    levels = LEVELS[bits]
    largest = weight.detach().abs().amax(dim=1).float()
    scale = ((largest / levels).view(torch.int32) & _KEPT_BITS).view(torch.float32)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).to(weight.dtype)
    codes = (weight.detach() / divisor[:, None]).round_().clamp_(-levels, levels)
    return torch.where(scale[:, None] > 0, codes, torch.zeros_like(codes)).to(torch.int8), scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 matrix that codes and scales stand for."""
    return codes.float() * scale[:, None]


def straight_through(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The quantised values of a matrix, in its dtype, with the gradient of the identity."""
    return _StraightThrough.apply(weight, bits)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bits: int) -> torch.Tensor:
        return dequantise(*quantise(weight, bits)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of -7 to 7, two per byte (uint8, one-dimensional). An odd number of codes is padded with 0."""
    flat = codes.flatten().to(torch.int16) + 8
    pairs = torch.nn.functional.pad(flat, (0, len(flat) % 2), value=8).view(-1, 2)
    return (pairs[:, 0] + 16 * pairs[:, 1]).to(torch.uint8)


def unpack_int4(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Invert pack_int4; returns int8 of this shape.

    Raises:
        ValueError: codes outside of -7 to 7, or padding that is not 0.
    """
    both = torch.stack([packed & 15, packed >> 4], dim=1).flatten().to(torch.int8) - 8
    size = shape[0] * shape[1]
    if bool((both == -8).any()) or bool(both[size:].any()):
        raise ValueError("4-bit codes beyond -7 to 7")
    return both[:size].view(shape)
