"""lora_linear in PyTorch's own products: the form `split`, and the only one on a CPU.

Both skinny products carry the scale: S = s D(x) A^T and dS = s dY B. So y = x W^T + bias + S B^T, dx = dY W + D'(dS A),
dA = dS^T D(x) and dB = dY^T S need none.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kept:
    """What dropout leaves of x."""

    mask_TI: torch.Tensor
    """Ones and zeros in the dtype of x."""
    factor: float
    """1 / (1 - dropout)."""


def skinny(x_TI: torch.Tensor, a_RI: torch.Tensor, scale: float, out_TR: torch.Tensor | None = None) -> torch.Tensor:
    """scale * x A^T, into `out_TR` if it is given."""
    if out_TR is None:
        out_TR = x_TI.new_empty(x_TI.shape[0], a_RI.shape[0])
    return out_TR.addmm_(x_TI, a_RI.t(), beta=0, alpha=scale)


def forward(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, s_TR: torch.Tensor, b_OR: torch.Tensor
) -> torch.Tensor:
    y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
    return y_TO.addmm_(s_TR, b_OR.t())


def factor_gradient(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    """factor * left^T right in `dtype`."""
    product = left.new_empty(left.shape[1], right.shape[1]).addmm_(left.t(), right, beta=0, alpha=factor)
    return product.to(dtype)


def db_with_masked(
    dy_TO: torch.Tensor, s_TR: torch.Tensor, row_mask_T: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """dB, and the part of it that comes from the rows of the mask; dy is read once."""
    both = factor_gradient(dy_TO, torch.cat([s_TR, s_TR * row_mask_T[:, None]], dim=1), dtype)
    rank = s_TR.shape[1]
    return both[:, :rank].contiguous(), both[:, rank:]


def square_sum(matrix: torch.Tensor) -> torch.Tensor:
    """||matrix||_F^2 as a scalar tensor, at least fp32."""
    return matrix.to(measure_dtype(matrix)).square().sum()


def grams(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A A^T and B^T B."""
    a_RI, b_OR = lora_a.detach().to(measure_dtype(lora_a)), lora_b.detach().to(measure_dtype(lora_b))
    return a_RI @ a_RI.t(), b_OR.t() @ b_OR


def measure_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
