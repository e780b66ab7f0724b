"""lora_linear in PyTorch's own products: the form `split`. On a CPU it is the only form, apart from compute.merges.

Alternatives on a CPU (fp32, T 1250, R 8, 2 threads, interleaved, I x O 384 x 384, 384 x 1536, 1536 x 384), in time
relative to this code:
    W + s B A merged for the forward product only   1.00, 0.94, 0.96, within the noise
    bias and update as one product of rank R + 1    1.00, 1.00, 0.98
    dx with the update last instead of first        1.02, 1.08, 1.01
    dB as dY^T s                                    2.7, 4.9, 2.6

Both skinny products include the scale: S = s D(x) A^T and dS = s dY B. So y = x W^T + bias + S B^T,
dx = dY W + D'(dS A), dA = dS^T D(x) and dB = dY^T S need none.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpeft.kernels import dispatch

NARROW = 8
"""Up to this rank dY B in fp32 on a CPU takes two to four times as long as with a row-major copy of B^T."""


@dataclass(frozen=True)
class Kept:
    """The dropout mask of x."""

    mask_TI: torch.Tensor
    """Ones and zeros in the dtype of x."""
    factor: float
    """1 / (1 - dropout)."""


def skinny_buffer(x_TI: torch.Tensor, rank: int) -> torch.Tensor:
    """(T, R), uninitialised. For Triton its rows start at multiples of 16 elements, so that loads are vectorised."""
    width = -(-rank // 16) * 16 if dispatch.runs_triton(x_TI) else rank
    return x_TI.new_empty(x_TI.shape[0], width)[:, :rank]


def skinny(x_TI: torch.Tensor, a_RI: torch.Tensor, scale: float, out_TR: torch.Tensor | None = None) -> torch.Tensor:
    """scale * x A^T, (T, R), in `out_TR` if given."""
    rank = a_RI.shape[0]
    if out_TR is None:
        out_TR = skinny_buffer(x_TI, rank)
    if rank <= NARROW and not x_TI.is_cuda:
        a_RI = a_RI.contiguous()  # copies if it is a transposed B
    return out_TR.addmm_(x_TI, a_RI.t(), beta=0, alpha=scale)


def forward(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, s_TR: torch.Tensor, b_OR: torch.Tensor
) -> torch.Tensor:
    """y = x W^T + bias + s B^T."""
    y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
    return y_TO.addmm_(s_TR, b_OR.t())


def merged(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A."""
    return torch.addmm(weight_OI, b_OR, a_RI, alpha=scale)


def a_gradient(ds_TR: torch.Tensor, x_TI: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    """factor * dS^T x in `dtype`."""
    if factor == 1.0 and _fp32_from_half(x_TI, dtype):
        return torch.mm(ds_TR.t(), x_TI, out_dtype=dtype)
    return x_TI.new_empty(ds_TR.shape[1], x_TI.shape[1]).addmm_(ds_TR.t(), x_TI, beta=0, alpha=factor).to(dtype)


def b_gradient(dy_TO: torch.Tensor, s_TR: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dY^T s in `dtype`. A CPU computes (s^T dY)^T in a third of the time; on a GPU that would be one more launch."""
    if _fp32_from_half(dy_TO, dtype):
        return torch.mm(dy_TO.t(), s_TR, out_dtype=dtype)
    if dy_TO.is_cuda:
        return dy_TO.new_empty(dy_TO.shape[1], s_TR.shape[1]).addmm_(dy_TO.t(), s_TR, beta=0).to(dtype)
    return dy_TO.new_empty(dy_TO.shape[1], s_TR.shape[1], dtype=dtype).copy_((s_TR.t() @ dy_TO).t())


def _fp32_from_half(source: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether cuBLAS can write the result in `dtype`, without a cast after the product."""
    return source.is_cuda and source.dtype.itemsize == 2 and dtype == torch.float32


def db_with_masked(
    dy_TO: torch.Tensor, s_TR: torch.Tensor, row_mask_T: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """dB, and the part of it that comes from the rows in the mask; dy is read once for both."""
    rank = s_TR.shape[1]
    both = b_gradient(dy_TO, torch.cat([s_TR, s_TR * row_mask_T[:, None]], dim=1), dtype)
    return both[:, :rank].contiguous(), both[:, rank:]


def square_sum(matrix: torch.Tensor) -> torch.Tensor:
    """||matrix||_F^2 as a scalar tensor, at least fp32."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)).square().sum()
