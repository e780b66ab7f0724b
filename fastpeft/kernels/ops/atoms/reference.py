"""The specification of atom routing: plain PyTorch, differentiated by autograd.

Shape suffixes: T tokens, M atoms, Q width of the canonical space, K atoms kept per token.
"""

from __future__ import annotations

import torch


def route_atoms_reference(
    z_TQ: torch.Tensor, v_MQ: torch.Tensor, slope_M: torch.Tensor, bias_M: torch.Tensor, top_k: int, gated: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(coefficients, indices, gates) of each token's atoms, (T, K) each.

    The gate is 1 where the logit is positive, else 0; its gradient is that of the sigmoid (straight-through).
    """
    s_TM = z_TQ @ v_MQ.t()
    logit_TM = s_TM * slope_M + bias_M
    index_TK = logit_TM.topk(top_k, dim=1).indices
    s_TK, logit_TK = s_TM.gather(1, index_TK), logit_TM.gather(1, index_TK)
    if not gated:
        return s_TK, index_TK, torch.ones_like(s_TK)
    soft_TK = logit_TK.sigmoid()
    gate_TK = soft_TK + ((logit_TK > 0).to(soft_TK.dtype) - soft_TK).detach()
    return gate_TK * s_TK, index_TK, gate_TK


def gather_atoms_reference(c_TK: torch.Tensor, index_TK: torch.Tensor, u_MQ: torch.Tensor) -> torch.Tensor:
    """sum_k c_k u[index_k], (T, Q)."""
    return (c_TK[..., None] * u_MQ[index_TK]).sum(1)
