"""Weighted Frobenius penalties of LoRA updates, with their gradients in closed form: the specification.

For the updates Delta_k = s_k B_k A_k of K matrices of one shape:
    product:  sum_k c_k || s_k B_k A_k ||_F^2  =  sum_k c_k s_k^2 < B_k^T B_k , A_k A_k^T >_F
    factors:  sum_k c_k ( ||A_k||_F^2 + ||B_k||_F^2 )
The product form needs two R x R Gram matrices, never the O x I product (IW-LoRA, section 3).

Shape suffixes: K matrices, I in, O out, R rank.
"""

from __future__ import annotations

import torch

from fastpeft.kernels.flat_layout import FlatLayout

Penalty = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def product_penalty(a_KRI: torch.Tensor, b_KOR: torch.Tensor, weight_K: torch.Tensor, scale: float) -> Penalty:
    """Penalty of scale * B A.

    Args:
        a_KRI, b_KOR: stacked factors, fp32 or fp64.
        weight_K: c_k, the coefficient of each matrix.
        scale: s, lora_alpha / rank.

    Returns:
        (value_K, da_KRI, db_KOR): each matrix's weighted penalty, clamped at >= 0, and the gradients of their sum:
        2 c s^2 (B^T B) A and 2 c s^2 B (A A^T).
    """
    gram_a_KRR = a_KRI @ a_KRI.transpose(1, 2)
    gram_b_KRR = b_KOR.transpose(1, 2) @ b_KOR
    factor_K = weight_K * scale**2
    value_K = factor_K * (gram_a_KRR * gram_b_KRR).sum((1, 2)).clamp_min(0)
    double_K11 = (2 * factor_K)[:, None, None]
    return value_K, (gram_b_KRR * double_K11) @ a_KRI, b_KOR @ (gram_a_KRR * double_K11)


def factor_penalty(a_KRI: torch.Tensor, b_KOR: torch.Tensor, weight_K: torch.Tensor, scale: float) -> Penalty:
    """Penalty of the factors themselves, independent of `scale`. Returns as product_penalty."""
    del scale
    value_K = weight_K * (a_KRI.square().sum((1, 2)) + b_KOR.square().sum((1, 2)))
    double_K11 = (2 * weight_K)[:, None, None]
    return value_K, double_K11 * a_KRI, double_K11 * b_KOR


PENALTIES = {"product": product_penalty, "factors": factor_penalty}


def weighted_frobenius(
    data: torch.Tensor, layout: FlatLayout, coefficient_K: torch.Tensor, penalty: str = "product"
) -> tuple[torch.Tensor, torch.Tensor]:
    """((K,) penalty of each matrix, gradient of their sum as a flat buffer)."""
    value_K = torch.empty_like(coefficient_K)
    gradient = torch.zeros_like(data)
    for group, index_K in zip(layout.groups, layout.index_K):
        factors = group.stack_a(data), group.stack_b(data)
        value_K[index_K], da_KRI, db_KOR = PENALTIES[penalty](*factors, coefficient_K[index_K], group.scale)
        group.stack_a(gradient).copy_(da_KRI)
        group.stack_b(gradient).copy_(db_KOR)
    return value_K, gradient
