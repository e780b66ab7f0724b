"""Dropout masks, generated from a seed in forward and again in backward, so that no mask is stored."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastpeft.kernels import dispatch
from fastpeft.kernels.ops.lora_linear.reference import drop_below, philox_keep


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed, int64 of one element on `device`, drawn from torch's default generator there."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropout_mask(shape: tuple[int, ...], dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """The elements that an operation with this seed keeps of an x of this shape on the seed's device.

    On a GPU the mask is `philox_keep` of ops/lora_linear/reference.py, for the PyTorch and the Triton form alike, and
    with TRITON_INTERPRET=1 also on the CPU. Otherwise on the CPU it is the stream of SFC64 (Doty-Humphrey, PractRand).

    Args:
        shape: (..., I).
        dropout: probability in [0, 1) that an element is dropped.
        seed: int64 of one element.

    Returns:
        bool in this shape, True where the element is kept.

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
    """(rows, columns) in `dtype`: 1 where an element is kept, else 0."""
    if seed.device.type == "cpu" and not dispatch.interpreting():
        return _generated_mask(num_rows * num_columns, dropout, seed, dtype).view(num_rows, num_columns)
    if dispatch.interpreting() or dispatch.has_triton():
        from fastpeft.kernels.ops.lora_linear.fused import fused_keep_mask

        return fused_keep_mask(num_rows, num_columns, dropout, seed, dtype)
    return philox_keep(num_rows, num_columns, dropout, seed).to(dtype)


_SETTLING = 18
"""Words discarded at the start of SFC64, before the seed is mixed into its state."""


def _generated_mask(num: int, dropout: float, seed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`num` ones and zeros, four from each 64-bit word. `bernoulli_` takes about ten times as long."""
    generator = np.random.SFC64(0)
    key = np.uint64(int(seed) & (2**64 - 1))
    words = np.array([key, key, key, 1], dtype=np.uint64)
    generator.state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
    draws = generator.random_raw(_SETTLING - (-num // 4))[_SETTLING:]
    numbers = torch.from_numpy(draws.view(np.int16))[:num]
    return torch.ge(numbers, min(drop_below(dropout), 2**16 - 1) - 2**15, out=torch.empty(num, dtype=dtype))
