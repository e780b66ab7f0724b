"""Atom routing: the selection of dictionary atoms for each token, and their weighted sum.

route_atoms scores every atom for each token and keeps the K best; gather_atoms sums the kept atoms. On a CPU both are
dense products over all M atoms: at M 128 and Q 16 these cost less than the memory traffic of a gather. On a GPU they
are Triton kernels that never write a T x M table.

Shape suffixes: T tokens, M atoms, Q width of the canonical space, K atoms kept per token.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.launch import launch, refuse_second_order

LARGEST_K = 8
"""A larger K is computed by PyTorch."""
BLOCK_T, GATHER_BLOCK_T = 32, 64
NUM_WARPS, NUM_STAGES = 4, 2
LARGEST_M, LARGEST_Q = 128, 32
"""A program holds BLOCK_T x M logits and M x Q atoms. PyTorch computes larger dictionaries too."""


class RouterCount:
    """Totals over the route_atoms calls of a batch: the number of active atoms, and the gradient of that number.

    route_atoms adds to it in backward, so that a forward pass repeated by gradient checkpointing counts once. The
    gradient is by v, slope and bias; z is treated as a constant.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.num_active: torch.Tensor | None = None
        self.num_tokens: torch.Tensor | None = None
        self.grad_v: torch.Tensor | None = None
        self.grad_slope: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None

    def add(self, **parts: torch.Tensor) -> None:
        for name, part in parts.items():
            before = getattr(self, name)
            setattr(self, name, part if before is None else before + part)


def route_atoms(
    z: torch.Tensor,
    v: torch.Tensor,
    slope: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    gated: bool = True,
    count: RouterCount | None = None,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k atoms of each token by logit_j = slope_j <z, v_j> + bias_j, and the coefficient of each.

    Args:
        z: (T, Q), tokens in the canonical space.
        v: (M, Q), the reading vectors of the atoms.
        slope, bias: (M,), parameters of the router.
        top_k: K, at least 1 and at most M.
        gated: gate_j is 1 where the logit is positive, else 0; its gradient is the sigmoid's (straight-through).
            False: gate_j is 1 for all of the top_k.
        count: with `gated`, gets the number of active atoms and its gradient, in backward.
        weight: (T,), 0 or 1: the tokens that `count` includes; None includes all.

    Returns:
        c (T, K): gate_j <z, v_j>, with gradients for z and v, and with `gated` for slope and bias too. index (T, K),
        int64.

    Raises:
        ValueError: shapes that do not fit.
    """
    if z.ndim != 2 or v.ndim != 2 or z.shape[1] != v.shape[1] or not slope.shape == bias.shape == v.shape[:1]:
        raise ValueError(
            f"route_atoms: z {tuple(z.shape)}, v {tuple(v.shape)}, slope {tuple(slope.shape)}, bias "
            f"{tuple(bias.shape)}; expected (T, Q), (M, Q), (M,), (M,)"
        )
    if not 1 <= top_k <= len(v):
        raise ValueError(f"route_atoms: top_k {top_k} of {len(v)} atoms; expected 1 to {len(v)}")
    c, index = _Route.apply(z, v, slope, bias, top_k, gated, count, weight)
    return c, index


def gather_atoms(c: torch.Tensor, index: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """sum_k c_k u[index_k] of each token.

    Args:
        c: (T, K), coefficients from route_atoms.
        index: (T, K), int64, distinct within a row, from route_atoms.
        u: (M, Q), the writing vectors of the atoms.

    Returns:
        (T, Q), with gradients for c and u.

    Raises:
        ValueError: shapes that do not fit.
    """
    if c.shape != index.shape or c.ndim != 2 or u.ndim != 2:
        raise ValueError(
            f"gather_atoms: c {tuple(c.shape)}, index {tuple(index.shape)}, u {tuple(u.shape)}; expected (T, K) twice "
            "and (M, Q)"
        )
    return _Gather.apply(c, index, u)


def _fits_triton(z: torch.Tensor, num_atoms: int, width: int, top_k: int) -> bool:
    return runs_triton(z) and num_atoms <= LARGEST_M and width <= LARGEST_Q and top_k <= LARGEST_K


def _spread(values_TK: torch.Tensor, index_TK: torch.Tensor, num_atoms: int) -> torch.Tensor:
    """(T, M), the values at their atoms and 0 elsewhere."""
    return values_TK.new_zeros(len(values_TK), num_atoms).scatter_(1, index_TK, values_TK)


# ---- route -----------------------------------------------------------------------------------


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, bias: torch.Tensor, top_k: int, gated: bool,
        count: RouterCount | None, weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        how = _route_triton if _fits_triton(z, len(v), v.shape[1], top_k) else _route_dense
        s, logit, index = how(z, v, slope, bias, top_k)
        ctx.save_for_backward(z, v, slope, s, logit, index, *(() if weight is None else (weight,)))
        ctx.gated, ctx.count = gated, count
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return (s * (logit > 0) if gated else s.clone()), index

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """With a = gate and l the logit: ds = dc a + dl slope, dl = dc s sigmoid'(l)."""
        refuse_second_order("route_atoms")
        z, v, slope, s, logit, index, *weight = ctx.saved_tensors
        dc = gradients[0]
        if dc is None:
            return (None,) * 8
        if not ctx.gated:
            ds_TM = _spread(dc, index, len(v))
            return ds_TM @ v, ds_TM.t() @ z, None, None, None, None, None, None
        soft = logit.sigmoid()
        d_soft = soft * (1 - soft)
        if ctx.count is not None:
            _count(ctx.count, z, len(v), slope, s, logit, index, d_soft, *weight)
        dl = dc * s * d_soft
        ds_TM = _spread(dc * (logit > 0) + dl * slope[index], index, len(v))
        d_slope, d_bias = _spread(dl * s, index, len(v)).sum(0), _spread(dl, index, len(v)).sum(0)
        dz = ds_TM @ v if ctx.needs_input_grad[0] else None
        return dz, ds_TM.t() @ z, d_slope, d_bias, None, None, None, None


def _count(
    count: RouterCount, z: torch.Tensor, num_atoms: int, slope: torch.Tensor, s: torch.Tensor, logit: torch.Tensor,
    index: torch.Tensor, d_soft: torch.Tensor, weight: torch.Tensor | None = None,
) -> None:  # fmt: skip
    gate = (logit > 0).to(s.dtype)
    if weight is None:
        num_tokens = s.new_full((), len(s))
    else:
        gate, d_soft, num_tokens = gate * weight[:, None], d_soft * weight[:, None], weight.sum()
    d_TM = _spread(d_soft, index, num_atoms)
    count.add(
        num_active=gate.sum(),
        num_tokens=num_tokens,
        grad_bias=d_TM.sum(0),
        grad_slope=_spread(d_soft * s, index, num_atoms).sum(0),
        grad_v=(d_TM * slope).t() @ z,
    )


def _route_dense(
    z: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, bias: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s_TM = z @ v.t()
    logit_TM = torch.addcmul(bias, s_TM, slope)
    logit, index = logit_TM.topk(top_k, dim=1)
    return s_TM.gather(1, index), logit, index


def _route_triton(
    z: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, bias: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastpeft.kernels.ops.atoms.kernel import route_kernel

    z, v = z.contiguous(), v.contiguous()
    (num_tokens, width), num_atoms = z.shape, len(v)
    s, logit = z.new_empty(num_tokens, top_k), z.new_empty(num_tokens, top_k)
    index = torch.empty(num_tokens, top_k, dtype=torch.int64, device=z.device)
    if num_tokens:
        launch(
            route_kernel, (-(-num_tokens // BLOCK_T),), z, v, slope.contiguous(), bias.contiguous(), s, logit, index,
            num_tokens, num_atoms, width,
            TOP_K=top_k, BLOCK_T=BLOCK_T, BLOCK_M=_power_of_two(num_atoms), BLOCK_Q=_power_of_two(width),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return s, logit, index


def _power_of_two(size: int) -> int:
    """The next power of two, at least 16, the smallest side of tl.dot."""
    return max(16, 1 << (size - 1).bit_length())


# ---- gather ----------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, index: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(c, index, u)
        if _fits_triton(c, len(u), u.shape[1], c.shape[1]):
            return _gather_triton(c, index, u)
        return _spread(c, index, len(u)) @ u

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("gather_atoms")
        c, index, u = ctx.saved_tensors
        dy = gradients[0]
        dc = (dy @ u.t()).gather(1, index) if ctx.needs_input_grad[0] else None
        du = _spread(c, index, len(u)).t() @ dy if ctx.needs_input_grad[2] else None
        return dc, None, du


def _gather_triton(c: torch.Tensor, index: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    from fastpeft.kernels.ops.atoms.kernel import gather_kernel

    (num_tokens, top_k), width = c.shape, u.shape[1]
    y = c.new_empty(num_tokens, width)
    if num_tokens:
        launch(
            gather_kernel, (-(-num_tokens // GATHER_BLOCK_T),), c.contiguous(), index.contiguous(), u.contiguous(), y,
            num_tokens, width,
            TOP_K=top_k, BLOCK_T=GATHER_BLOCK_T, BLOCK_Q=_power_of_two(width),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return y
