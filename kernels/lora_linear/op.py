"""lora_linear: a frozen linear layer and its LoRA update, with closed-form gradients.

Against autograd over the plain expression it saves only x and the T x R product, computes the T x R gradient once, adds
both parts of y and of dx into one buffer, and forms no dW.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastpeft.kernels.lora_linear import split
from fastpeft.kernels.lora_linear.dropout import draw_seed, keep_mask
from fastpeft.kernels.lora_linear.quantised import dequantised, is_quantised, weight_shape

LARGEST_RANK = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(eq=False)
class LoraMeasures:
    """What lora_linear can tell on the way. A call fills in one that is passed to it; a later call overwrites it.

    All are at least fp32 (fp64 where the factors are) and carry no gradient.
    """

    gram_a: torch.Tensor | None = None
    """A A^T, (R, R), after forward."""
    gram_b: torch.Tensor | None = None
    """B^T B, (R, R), after forward."""
    db_square: torch.Tensor | None = None
    """||dL/dB||_F^2, a scalar tensor, after backward; None where lora_b needs no gradient."""
    db_square_masked: torch.Tensor | None = None
    """The same of the gradient that the rows of `row_mask` alone give; None without a mask."""


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    row_mask: torch.Tensor | None = None,
    measures: LoraMeasures | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + scale (D(x) A^T) B^T with W and bias frozen (arXiv:2106.09685, eq. 3).

    D is inverted dropout, on the input of the update only. Its mask is made from `seed`, in backward again.
    Under autocast x, weight and bias are cast to its dtype.

    Args:
        x: (..., I), bf16, fp16, fp32 or fp64.
        weight: (O, I) in the dtype of x, frozen; or a 4-bit parameter of bitsandbytes, which is dequantised in forward
            and again in backward.
        bias: (O,), frozen, or None.
        lora_a: (R, I), in any floating dtype; its gradient comes in that dtype. R is 1 to 256.
        lora_b: (O, R), likewise.
        scale: lora_alpha / R, no unit.
        dropout: probability in [0, 1) of an element of x to be dropped.
        seed: int64 of one element on x's device; None draws one from torch's generator there.
        row_mask: (T,) bool, T the number of rows of x; read only where there are `measures`.
        measures: is filled in.

    Returns:
        (..., O), in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a rank or a dropout out of range.
        ImportError: the weight is 4-bit and bitsandbytes is not there.
    """
    seeds = None if seed is None else (seed,)
    noted = None if measures is None else (measures,)
    return lora_linear_grouped(
        x, (weight,), (bias,), (lora_a,), (lora_b,), (scale,),
        dropout=dropout, seeds=seeds, row_mask=row_mask, measures=noted,
    )[0]  # fmt: skip


def lora_linear_grouped(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    lora_as: Sequence[torch.Tensor],
    lora_bs: Sequence[torch.Tensor],
    scales: Sequence[float],
    *,
    dropout: float = 0.0,
    seeds: Sequence[torch.Tensor] | None = None,
    row_mask: torch.Tensor | None = None,
    measures: Sequence[LoraMeasures] | None = None,
) -> tuple[torch.Tensor, ...]:
    """lora_linear of several projections of one x (query, key and value; gate and up); O and R may differ.

    The update's skinny products of all projections are one, and dx is accumulated in one buffer. Arguments, results and
    errors are those of lora_linear, one entry for each projection.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear_grouped(
                x.to(dtype),
                [w if is_quantised(w) else w.to(dtype) for w in weights],
                [None if b is None else b.to(dtype) for b in biases],
                lora_as, lora_bs, scales, dropout=dropout, seeds=seeds, row_mask=row_mask, measures=measures,
            )  # fmt: skip
    _check_call(x, weights, biases, lora_as, lora_bs, scales, dropout, seeds, row_mask, measures)
    if not dropout:
        seeds = None
    elif seeds is None:
        seeds = [draw_seed(x.device) for _ in weights]
    parts = [
        _Part(*each)
        for each in zip(weights, biases, scales, seeds or [None] * len(weights), measures or [None] * len(weights))
    ]
    factors = [factor for pair in zip(lora_as, lora_bs) for factor in pair]
    return _LoraLinear.apply(x, _Call(parts, dropout, row_mask), *factors)


@dataclass(frozen=True)
class _Part:
    """One projection, but for its factors."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    seed: torch.Tensor | None
    measures: LoraMeasures | None


@dataclass(frozen=True)
class _Call:
    parts: list[_Part]
    dropout: float
    row_mask_T: torch.Tensor | None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Call, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI = [a.to(x.dtype) for a in factors[::2]]
        b_OR = [b.to(x.dtype) for b in factors[1::2]]
        s_TR = _skinny_products(x_TI, a_RI, call)
        ys = []
        for part, s, b in zip(call.parts, s_TR, b_OR):
            ys.append(split.forward(x_TI, dequantised(part.weight, x.dtype), part.bias, s, b))
        for part, a, b in zip(call.parts, factors[::2], factors[1::2]):
            if part.measures is not None:
                part.measures.gram_a, part.measures.gram_b = split.grams(a, b)
        weights = [None if is_quantised(part.weight) else part.weight for part in call.parts]
        ctx.save_for_backward(x_TI, *s_TR, *a_RI, *b_OR, *weights)
        ctx.call, ctx.x_shape, ctx.dtypes = call, x.shape, [factor.dtype for factor in factors]
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, size = ctx.call, len(ctx.call.parts)
        x_TI, *saved = ctx.saved_tensors
        s_TR, a_RI, b_OR, weights = (saved[i * size : (i + 1) * size] for i in range(4))
        needs_x, _, *needs = ctx.needs_input_grad
        dys_TO = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        ds_all, ds_TR = _skinny_gradients(dys_TO, b_OR, call)
        kept = [_kept(x_TI, part.seed, call.dropout) for part in call.parts]
        dx = None
        if needs_x:
            dx = _input_gradient(dys_TO, weights, ds_all, ds_TR, a_RI, kept, call).view(ctx.x_shape)
        das = _a_gradients(ds_all, ds_TR, x_TI, kept, ctx.dtypes[::2], needs[::2])
        gradients = []
        for i, part in enumerate(call.parts):
            db = None
            if needs[2 * i + 1]:
                db = _b_gradient(dys_TO[i], s_TR[i], ctx.dtypes[2 * i + 1], part.measures, call.row_mask_T)
            gradients += [das[i], db]
        return dx, None, *gradients


def _kept(x_TI: torch.Tensor, seed: torch.Tensor | None, dropout: float) -> split.Kept | None:
    if seed is None:
        return None
    return split.Kept(keep_mask(*x_TI.shape, dropout, seed, x_TI.dtype), 1 / (1 - dropout))


def _skinny_products(x_TI: torch.Tensor, a_RI: list[torch.Tensor], call: _Call) -> list[torch.Tensor]:
    """s D(x) A^T of each projection; without dropout from one product."""
    if call.dropout:
        dropped = [_kept(x_TI, part.seed, call.dropout) for part in call.parts]
        return [
            split.skinny(kept.mask_TI.mul_(x_TI), a, part.scale * kept.factor)
            for kept, a, part in zip(dropped, a_RI, call.parts)
        ]
    scales = [part.scale for part in call.parts]
    if len(a_RI) == 1:
        return [split.skinny(x_TI, a_RI[0], scales[0])]
    alike = len(set(scales)) == 1
    s_all = split.skinny(x_TI, torch.cat(a_RI), scales[0] if alike else 1.0)
    s_TR = list(s_all.split([a.shape[0] for a in a_RI], dim=1))
    return s_TR if alike else [s.mul_(scale) for s, scale in zip(s_TR, scales)]


def _skinny_gradients(
    dys_TO: list[torch.Tensor], b_OR: list[torch.Tensor], call: _Call
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """dS = s dY B of each projection: all side by side, and each as a view of that."""
    ranks = [b.shape[1] for b in b_OR]
    ds_all = dys_TO[0].new_empty(dys_TO[0].shape[0], sum(ranks))
    ds_TR = list(ds_all.split(ranks, dim=1))
    for dy, b, ds, part in zip(dys_TO, b_OR, ds_TR, call.parts):
        split.skinny(dy, b.t(), part.scale, out_TR=ds)
    return ds_all, ds_TR


def _input_gradient(
    dys_TO: list[torch.Tensor],
    weights: list[torch.Tensor | None],
    ds_all: torch.Tensor,
    ds_TR: list[torch.Tensor],
    a_RI: list[torch.Tensor],
    kept: list[split.Kept | None],
    call: _Call,
) -> torch.Tensor:
    """dx = sum of dY W + D'(dS A) in one buffer."""
    dx_TI = None
    for dy, weight, part in zip(dys_TO, weights, call.parts):
        weight_OI = dequantised(part.weight, dy.dtype) if weight is None else weight
        dx_TI = dy @ weight_OI if dx_TI is None else dx_TI.addmm_(dy, weight_OI)
    if not call.dropout:
        return split.add_dx(dx_TI, ds_all, a_RI[0] if len(a_RI) == 1 else torch.cat(a_RI), None)
    for ds, a, mask in zip(ds_TR, a_RI, kept):
        split.add_dx(dx_TI, ds, a, mask)
    return dx_TI


def _a_gradients(
    ds_all: torch.Tensor,
    ds_TR: list[torch.Tensor],
    x_TI: torch.Tensor,
    kept: list[split.Kept | None],
    dtypes: list[torch.dtype],
    needed: list[bool],
) -> list[torch.Tensor | None]:
    """dA = dS^T D(x) of each projection; without dropout from one product."""
    if kept[0] is not None:
        return [
            split.factor_gradient(ds, k.mask_TI.mul_(x_TI), dtype, k.factor) if wanted else None
            for ds, k, dtype, wanted in zip(ds_TR, kept, dtypes, needed)
        ]
    if not any(needed):
        return [None] * len(needed)
    da_all = split.factor_gradient(ds_all, x_TI, dtypes[0])
    das = da_all.split([ds.shape[1] for ds in ds_TR])
    return [da.to(dtype) if wanted else None for da, dtype, wanted in zip(das, dtypes, needed)]


def _b_gradient(
    dy_TO: torch.Tensor,
    s_TR: torch.Tensor,
    dtype: torch.dtype,
    measures: LoraMeasures | None,
    row_mask_T: torch.Tensor | None,
) -> torch.Tensor:
    if measures is None or row_mask_T is None:
        db_OR = split.factor_gradient(dy_TO, s_TR, dtype)
    else:
        db_OR, masked = split.db_with_masked(dy_TO, s_TR, row_mask_T.reshape(-1), dtype)
        measures.db_square_masked = split.square_sum(masked)
    if measures is not None:
        measures.db_square = split.square_sum(db_OR)
    return db_OR


# ---- what does not fit -----------------------------------------------------------------------


def _check_call(x, weights, biases, lora_as, lora_bs, scales, dropout, seeds, row_mask, measures) -> None:
    lists = {"weights": weights, "biases": biases, "lora_as": lora_as, "lora_bs": lora_bs, "scales": scales}
    lists |= {"seeds": seeds} if seeds is not None else {}
    lists |= {"measures": measures} if measures is not None else {}
    if len({len(each) for each in lists.values()}) != 1 or not weights:
        lengths = ", ".join(f"{len(each)} {name}" for name, each in lists.items())
        raise ValueError(f"lora_linear: expected one entry for each projection, got {lengths}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: dropout is {dropout}; expected a probability in [0, 1)")
    if x.dtype not in DTYPES:
        raise ValueError(f"lora_linear: x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for weight, bias, lora_a, lora_b in zip(weights, biases, lora_as, lora_bs):
        _check_part(x, weight, bias, lora_a, lora_b)
    for seed in seeds or ():
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(
                f"lora_linear: seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; expected torch.int64 (1,) "
                f"on {x.device}"
            )
    num_rows = x.numel() // max(1, x.shape[-1])
    if row_mask is not None and (
        row_mask.dtype != torch.bool or row_mask.shape not in ((num_rows,), x.shape[:-1]) or row_mask.device != x.device
    ):
        raise ValueError(
            f"lora_linear: row_mask is {row_mask.dtype} {tuple(row_mask.shape)} on {row_mask.device}; expected "
            f"torch.bool ({num_rows},) on {x.device}"
        )


def _check_part(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
) -> None:
    num_out, num_in = shape = weight_shape(weight)
    rank = lora_a.shape[0]
    fits = lora_a.shape == (rank, num_in) and lora_b.shape == (num_out, rank)
    if x.shape[-1] != num_in or not fits or (bias is not None and bias.shape != (num_out,)):
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)}, weight {tuple(shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}, lora_a {tuple(lora_a.shape)} and lora_b "
            f"{tuple(lora_b.shape)} do not fit; expected x (..., I), weight (O, I), bias (O,), lora_a (R, I), "
            "lora_b (O, R)"
        )
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"lora_linear: lora_a {tuple(lora_a.shape)} has rank {rank}; expected 1 to {LARGEST_RANK}")
    frozen = {"bias": bias} if is_quantised(weight) else {"weight": weight, "bias": bias}
    for name, tensor in frozen.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"lora_linear: x is {x.dtype} but {name} is {tensor.dtype}; expected the same dtype")
    for name, tensor in {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"lora_linear: x is on {x.device} but {name} is on {tensor.device}")
    for name, tensor in {"lora_a": lora_a, "lora_b": lora_b}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"lora_linear: {name} is {tensor.dtype}; expected a floating dtype")
