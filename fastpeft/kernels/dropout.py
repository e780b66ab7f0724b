"""Which elements dropout leaves: made from a seed, in forward and again in backward, never stored."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastpeft.kernels import dispatch
from fastpeft.kernels.ops.lora_linear.reference import drop_below, philox_keep


def draw_seed(device: torch.device) -> torch.Tensor:
    """int64 of one element on `device`, from torch's default generator there."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropout_mask(shape: tuple[int, ...], dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """What an operation with this seed keeps of an x of this shape on the seed's device.

    On a GPU the mask is lora_linear's `reference.philox_keep`, whichever way the operation is computed there, and with
    TRITON_INTERPRET=1 also on the CPU. Else on the CPU it is the stream of SFC64 (Doty-Humphrey, PractRand).

    Args:
        shape: (..., I).
        dropout: probability in [0, 1) of an element to be dropped.
        seed: int64 of one element.

    Returns:
        bool in this shape.

    Raises:
        ValueError: a dropout out of range, a shape without an axis, a seed of another dtype or size.
    """
    if not 0 <= dropout < 1 or not shape or seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"dropout_mask: shape {tuple(shape)}, dropout {dropout}, seed {seed.dtype} {tuple(seed.shape)}; expected "
            "(..., I), a probability in [0, 1), and torch.int64 (1,)"
        )
    num_columns = shape[-1]
    num_rows = math.prod(shape[:-1])
    return keep_mask(num_rows, num_columns, dropout, seed, torch.bool).reshape(shape)


def keep_mask(num_rows: int, num_columns: int, dropout: float, seed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) of ones and zeros in `dtype`."""
    if seed.device.type == "cpu" and not dispatch.interpreting():
        return _generated_mask(num_rows * num_columns, dropout, seed, dtype).view(num_rows, num_columns)
    if dispatch.interpreting() or dispatch.has_triton():
        from fastpeft.kernels.ops.lora_linear.fused import fused_keep_mask

        return fused_keep_mask(num_rows, num_columns, dropout, seed, dtype)
    return philox_keep(num_rows, num_columns, dropout, seed).to(dtype)


_SETTLING = 18
"""Words at the start of SFC64, in which the seed is not yet mixed."""


def _generated_mask(num: int, dropout: float, seed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`num` ones and zeros, each from 16 bits of a word of 64. `bernoulli_` takes some ten times as long."""
    generator = np.random.SFC64(0)
    key = np.uint64(int(seed) & (2**64 - 1))
    words = np.array([key, key, key, 1], dtype=np.uint64)
    generator.state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
    draws = generator.random_raw(_SETTLING - (-num // 4))[_SETTLING:]
    numbers = torch.from_numpy(draws.view(np.int16))[:num]
    return torch.ge(numbers, min(drop_below(dropout), 2**16 - 1) - 2**15, out=torch.empty(num, dtype=dtype))
