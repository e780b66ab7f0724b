"""weighted_frobenius: the penalty on all adapted matrices and the gradient norms, in one launch over flat buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.flat_layout import FlatLayout, MatrixGroup
from fastpeft.kernels.launch import launch

PENALTIES = ("product", "factors")
BLOCK = 512
"""Elements that a program sums per iteration."""


@dataclass(frozen=True)
class FrobeniusResult:
    """Scalars and (K,) vectors on the device, in the dtype of the buffers."""

    norm: torch.Tensor
    """||g|| of the whole gradient buffer, with the penalty's gradient added; not finite if the gradient is not."""
    penalty: torch.Tensor
    """Sum of the penalties of all matrices; 0 without a penalty."""
    penalty_norm: torch.Tensor
    """Norm of the penalty's gradient."""
    share: torch.Tensor
    """penalty_norm divided by the norm of the adapter's gradient, without the task head's."""
    parts_K: torch.Tensor
    """(1 or 2, K): the penalty of each matrix as one row, or as two rows that add up to it."""
    square_grad_b_K: torch.Tensor | None
    """||dL/dB_k||^2 before the penalty's gradient was added; None without `measure`."""
    square_a_K: torch.Tensor | None
    """||A_k||^2; None without `measure`."""

    @property
    def values(self) -> torch.Tensor:
        """(K,), the penalty of each matrix."""
        return self.parts_K.sum(0)


@torch.no_grad()
def weighted_frobenius(
    data: torch.Tensor,
    grad: torch.Tensor,
    layout: FlatLayout,
    coefficient_K: torch.Tensor | None = None,
    *,
    penalty: str = "product",
    into: torch.Tensor | None = None,
    measure: bool = False,
) -> FrobeniusResult:
    """Add the gradient of sum_k c_k ||s_k B_k A_k||_F^2 to `grad` and compute the norms (IW-LoRA, section 3).

    The gradients are 2 c s^2 (B^T B) A and 2 c s^2 B (A A^T), from R x R Gram matrices. Penalties are clamped at >= 0.
    On a GPU it is one launch for the whole model and deterministic to the bit; coefficients of 0 give the same bits as
    no penalty. For a rank above 64 one program forms the Gram matrix of a factor, in blocks of 64.

    Args:
        data: (num_total,) fp32 or fp64, parameters in the order of `layout`.
        grad: (num_total,), their gradients; the penalty's gradient is added in place.
        coefficient_K: (K,) c_k in the model's order, in the dtype of `data`. None computes the norms only.
        penalty: `product`, or `factors`: sum_k c_k (||A_k||_F^2 + ||B_k||_F^2), without s.
        into: (num_factors,), receives the penalty's gradient instead of `grad`, which stays unchanged.
        measure: also return the norms that the sensitivity sketch needs.

    Returns:
        FrobeniusResult, on the device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown penalty.
    """
    _check(data, grad, layout, coefficient_K, penalty, into)
    if runs_triton(data):
        return _launch(data, grad, layout, coefficient_K, penalty, into, measure)
    index_K = layout.index_K
    square_b_K = square_a_K = None
    if measure:
        square_b_K, square_a_K = data.new_empty(layout.num_matrices), data.new_empty(layout.num_matrices)
        for group, own_K in zip(layout.groups, index_K):
            square_b_K[own_K] = group.stack_b(grad).square().sum((1, 2))
            square_a_K[own_K] = group.stack_a(data).square().sum((1, 2))
    value_K, square = data.new_zeros(layout.num_matrices), data.new_zeros(())
    if coefficient_K is not None:
        for group, own_K in zip(layout.groups, index_K):
            weight_K = coefficient_K[own_K]
            if penalty == "product":
                value_K[own_K], more = _add_product(group, data, grad, weight_K, into)
            else:
                value_K[own_K], more = _add_factors(group, data, grad, weight_K, into)
            square += more
    adapter = torch.linalg.vector_norm(grad[: layout.num_adapter])
    head = torch.linalg.vector_norm(grad[layout.num_adapter :])
    penalty_norm = square.clamp_min(0).sqrt()
    share = penalty_norm / adapter.clamp_min(1e-30)
    return FrobeniusResult(
        torch.hypot(adapter, head), value_K.sum(), penalty_norm, share, value_K[None], square_b_K, square_a_K
    )


def tiles(max_rank: int, aligned_rows: bool) -> dict[str, int]:
    """Tile sizes of the kernel: rows of a block of the Gram matrix, number of blocks, columns of a factor, warps.

    They depend on the layout alone, so that launches with and without a penalty sum in the same order. BLOCK_N is
    limited by the registers of the smallest supported GPU generation.
    """
    chunk, num_chunks = _chunks(max_rank)
    block_n = {16: 64, 32: 32, 64: 32 if num_chunks == 1 and aligned_rows else 16}[chunk]
    num_warps = 4 if chunk == 16 else 8
    return {"CHUNK": chunk, "NUM_CHUNKS": num_chunks, "BLOCK_N": block_n, "BLOCK": BLOCK, "num_warps": num_warps}


def _chunks(max_rank: int) -> tuple[int, int]:
    chunk = min(64, max(16, 1 << (max(1, max_rank) - 1).bit_length()))
    return chunk, -(-max(1, max_rank) // chunk)


def _check(data, grad, layout, coefficient_K, penalty, into) -> None:
    name = "weighted_frobenius"
    layout.check(name, data=data, grad=grad)
    if penalty not in PENALTIES:
        raise ValueError(f"{name}: penalty is {penalty!r}; expected one of {', '.join(PENALTIES)}")
    shapes = {
        "coefficient_K": (coefficient_K, (layout.num_matrices,)),
        "into": (into, (layout.num_factors,)),
    }
    for argument, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}; expected {shape}, contiguous")
        if tensor.dtype != data.dtype or tensor.device != data.device:
            raise ValueError(
                f"{name}: {argument} is {tensor.dtype} on {tensor.device}; expected {data.dtype} on {data.device}"
            )


def _launch(data, grad, layout, coefficient_K, penalty, into, measure) -> FrobeniusResult:
    from fastpeft.kernels.ops.frobenius.kernel import weighted_frobenius_kernel

    num_tasks, num = len(layout.tasks), layout.num_matrices
    shape = tiles(layout.max_rank, layout.aligned_rows)
    side = shape["CHUNK"] * shape["NUM_CHUNKS"]
    partials, totals = data.new_empty(5, num_tasks), data.new_empty(4)
    needs_grams = coefficient_K is not None and penalty == "product"
    launch(
        weighted_frobenius_kernel,
        (num_tasks,),
        data,
        grad,
        grad if into is None else into,
        layout.scale_K if coefficient_K is None else coefficient_K,
        layout.scale_K,
        data.new_empty(num, 2, side, side) if needs_grams else data,
        layout.tasks,
        partials,
        totals,
        layout.tickets,
        num,
        layout.num_adapter_tasks,
        num_tasks,
        PENALTY="none" if coefficient_K is None else penalty,
        ADD=into is None,
        MEASURE=measure,
        ALIGNED=layout.aligned,
        ALIGNED_ROWS=layout.aligned_rows,
        **shape,
    )
    norm, penalty_sum, penalty_norm, share = totals.unbind()
    return FrobeniusResult(
        norm,
        penalty_sum,
        penalty_norm,
        share,
        partials[2, : 2 * num].view(2, num),
        partials[3, num : 2 * num] if measure else None,
        partials[4, :num] if measure else None,
    )


Values = tuple[torch.Tensor, torch.Tensor]


def _add_product(
    group: MatrixGroup,
    data: torch.Tensor,
    grad: torch.Tensor,
    weight_K: torch.Tensor,
    into: torch.Tensor | None,
) -> Values:
    """Penalty of each matrix, and the squared norm of the gradient: ||G_B A||^2 = <G_B^2, G_A>, from Gram matrices."""
    a_KRI, b_KOR = group.stack_a(data), group.stack_b(data)
    gram_a_KRR, gram_b_KRR = torch.bmm(a_KRI, a_KRI.mT), torch.bmm(b_KOR.mT, b_KOR)
    factor_K11 = (weight_K * group.scale**2)[:, None, None]
    scaled_a_KRR, scaled_b_KRR = gram_a_KRR * (2 * factor_K11), gram_b_KRR * (2 * factor_K11)
    if into is None:
        group.stack_a(grad).baddbmm_(scaled_b_KRR, a_KRI)
        group.stack_b(grad).baddbmm_(b_KOR, scaled_a_KRR)
    else:
        torch.bmm(scaled_b_KRR, a_KRI, out=group.stack_a(into))
        torch.bmm(b_KOR, scaled_a_KRR, out=group.stack_b(into))
    value_K = (scaled_a_KRR * gram_b_KRR).sum((1, 2)).mul_(0.5).clamp_min_(0)
    mixed_KRR = torch.bmm(scaled_b_KRR, gram_a_KRR)
    return value_K, torch.dot(mixed_KRR.flatten(), scaled_a_KRR.add_(scaled_b_KRR).flatten())


def _add_factors(
    group: MatrixGroup, data: torch.Tensor, grad: torch.Tensor, weight_K: torch.Tensor, into: torch.Tensor | None
) -> Values:
    a_KRI, b_KOR = group.stack_a(data), group.stack_b(data)
    square_K = a_KRI.square().sum((1, 2)) + b_KOR.square().sum((1, 2))
    double_K11 = (2 * weight_K)[:, None, None]
    if into is None:
        group.stack_a(grad).addcmul_(a_KRI, double_K11)
        group.stack_b(grad).addcmul_(b_KOR, double_K11)
    else:
        torch.mul(a_KRI, double_K11, out=group.stack_a(into))
        torch.mul(b_KOR, double_K11, out=group.stack_b(into))
    return weight_K * square_K, (4 * weight_K.square() * square_K).sum()
