"""secant_sums: the sums from which schedules compute curvature along the last two updates, in one launch.

Shape suffixes: U units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.flat_layout import FlatLayout
from fastpeft.kernels.launch import launch

BLOCK, BLOCK_ROWS, NUM_WARPS = 512, 64, 4


class SecantSums(NamedTuple):
    """One entry per adapted matrix in the model's order, then one per other parameter."""

    along_U: torch.Tensor
    """<g, d>."""
    along_before_U: torch.Tensor
    """<g, d'>."""
    square_U: torch.Tensor
    """<d sqrt(v), d'>. NaN while the divisor of v is 0."""


def secant_sums(
    data: torch.Tensor,
    grad: torch.Tensor,
    previous: torch.Tensor,
    older: torch.Tensor,
    second: torch.Tensor,
    divisor: torch.Tensor,
    layout: FlatLayout,
) -> SecantSums:
    """Sums per unit along d = data - previous and d' = older; then, in place, older = d and previous = data.

    On a GPU it is one launch, which reads five flat buffers and writes two of them. It is deterministic to the bit. A
    gradient that is not finite makes this call's sums invalid, but not `previous` and `older`.

    Args:
        data, grad, previous, older, second: (num_total,) fp32 or fp64, in the order of `layout`.
        divisor: (), floating-point: v = second / divisor.

    Returns:
        SecantSums of (num_units,), in the dtype of `data`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    layout.check("secant_sums", data=data, grad=grad, previous=previous, older=older, second=second)
    if divisor.dim() or divisor.device != data.device or not divisor.is_floating_point():
        raise ValueError(
            f"secant_sums: divisor is {divisor.dtype} of shape {tuple(divisor.shape)} on {divisor.device}; "
            f"expected a floating-point scalar on {data.device}"
        )
    if runs_triton(data):
        return _launch(data, grad, previous, older, second, divisor, layout)
    terms = data.new_empty(3, layout.num_total)
    along, before, square = terms
    torch.mul(grad, older, out=before)
    # On one thread NumPy's root is faster than torch's.
    if data.is_cpu:
        np.sqrt(second.numpy(), out=square.numpy())
    else:
        torch.sqrt(second, out=square)
    square.mul_(older)
    last = torch.sub(data, previous, out=older)
    square.mul_(last)
    torch.mul(grad, last, out=along)
    previous.copy_(data)
    along_U, before_U, square_U = layout.unit_sums(terms)  # one call: on a CPU its cost is the memory that it reads
    return SecantSums(along_U, before_U, square_U / divisor.sqrt().to(data.dtype))


def _launch(data, grad, previous, older, second, divisor, layout) -> SecantSums:
    from fastpeft.kernels.ops.secant.kernel import secant_kernel

    num_slices = len(layout.slices)
    sums_U4 = data.new_empty(layout.num_units, 4)
    launch(
        secant_kernel,
        (num_slices,),
        data,
        grad,
        previous,
        older,
        second,
        divisor,
        layout.slices,
        layout.units,
        data.new_empty(num_slices, 4),
        sums_U4,
        layout.tickets,
        ALIGNED=layout.aligned,
        BLOCK=BLOCK,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=NUM_WARPS,
    )
    return SecantSums(*sums_U4[:, :3].unbind(1))
