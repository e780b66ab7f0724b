"""||dL/dW||_F of a frozen weight, from its layer's input X and output gradient G: dL/dW = G^T X.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import math

import torch

# Rows of the O x I gradient that exist at one time.
TILE_ROWS = 256


def gradient_norm(x_TI: torch.Tensor, g_TO: torch.Tensor) -> torch.Tensor:
    """||G^T X||_F in fp32 (fp64 for fp64 input), never storing the O x I product.

    For few tokens, T < O I / (O + I), the Gram form sum((X X^T) o (G G^T)) is cheaper
    (arXiv:2009.03106 uses it per example). A weight used twice in a forward gets the rows of both
    uses, concatenated: the uses add up before the norm.

    Returns: a scalar tensor, in units of loss per unit of weight.
    """
    if x_TI.shape[0] != g_TO.shape[0]:
        raise ValueError(f"gradient_norm: {x_TI.shape[0]} rows of X but {g_TO.shape[0]} of G")
    num_tokens, num_in, num_out = x_TI.shape[0], x_TI.shape[1], g_TO.shape[1]
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    if num_tokens < num_in * num_out / (num_in + num_out):
        x_TI, g_TO = x_TI.to(wide), g_TO.to(wide)  # the sum cancels: half precision loses too much
        return ((x_TI @ x_TI.t()) * (g_TO @ g_TO.t())).sum().clamp_min(0).sqrt()
    total = torch.zeros((), dtype=wide, device=x_TI.device)
    for start in range(0, num_out, TILE_ROWS):
        tile = g_TO[:, start : start + TILE_ROWS].t() @ x_TI
        total += tile.to(wide).square().sum()
    return total.sqrt()


def sketch_norm(db_norm: torch.Tensor, scale: float, variance: float, rank: int) -> torch.Tensor:
    """Estimate ||dL/dW||_F from ||dL/dB||_F, free in any LoRA backward.

    dL/dB = s G^T (X A^T), and for A with i.i.d. zero-mean entries of variance v,
    E_A ||dL/dB||_F^2 = s^2 v R ||G^T X||_F^2. PEFT's default A has v = 1 / (3 I).
    """
    return db_norm / (scale * math.sqrt(variance * rank))
