"""Rows in 8 or 4 bits with one scale a row, while training as well as in a file.

Training sees the quantised values (straight-through: the gradient passes as if nothing was rounded), so that a file
holds exactly what was scored. Quantising what was dequantised gives the same codes and scales again: a scale keeps 16
of fp32's 24 bits, so that its products with codes are exact.
"""

from __future__ import annotations

from typing import Any

import torch

LEVELS = {8: 127, 4: 7}
"""Bits -> the largest code; codes are symmetric."""
_KEPT_BITS = -256
"""As a mask on fp32: the lowest 8 bits are cut off."""


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
    """Codes of -7 to 7, two in a byte (uint8, one-dimensional); of an odd number the last is 0."""
    flat = codes.flatten().to(torch.int16) + 8
    pairs = torch.nn.functional.pad(flat, (0, len(flat) % 2), value=8).view(-1, 2)
    return (pairs[:, 0] + 16 * pairs[:, 1]).to(torch.uint8)


def unpack_int4(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """What pack_int4 packed, int8 of this shape.

    Raises:
        ValueError: codes beyond -7 to 7, or a padding that is not 0.
    """
    both = torch.stack([packed & 15, packed >> 4], dim=1).flatten().to(torch.int8) - 8
    size = shape[0] * shape[1]
    if bool((both == -8).any()) or bool(both[size:].any()):
        raise ValueError("4-bit codes beyond -7 to 7")
    return both[:size].view(shape)
