"""lora_linear: a frozen linear layer and its LoRA update, with closed-form gradients.

Autograd over the plain expression saves and computes more. This saves only x and the T x R product, computes the T x R
gradient once, accumulates both terms of y and of dx in one buffer, and forms no dW. An x with a recorded source
(kernels/recompute.py) is not saved either: backward recomputes it.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastpeft.kernels.dropout import draw_seed
from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.ops.lora_linear import compute
from fastpeft.kernels.ops.lora_linear.compute import Call, LoraMeasures, Part
from fastpeft.kernels.ops.lora_linear.quantised import is_quantised, weight_shape
from fastpeft.kernels.recompute import Source, source_of

LARGEST_RANK = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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

    D is inverted dropout, on the input of the update only. Forward and backward both generate its mask from `seed`.
    Under autocast x, weight and bias are cast to the autocast dtype.

    Args:
        x: (..., I), bf16, fp16, fp32 or fp64.
        weight: (O, I) in the dtype of x, frozen; or a 4-bit parameter of bitsandbytes, which is dequantised in forward
            and again in backward.
        bias: (O,), frozen, or None.
        lora_a: (R, I), in any floating dtype; its gradient has that dtype. R is 1 to 256.
        lora_b: (O, R), likewise.
        scale: lora_alpha / R, no unit.
        dropout: probability in [0, 1) that an element of x is dropped.
        seed: int64 of one element on x's device; None draws one from torch's generator there.
        row_mask: (T,) bool, T the number of rows of x; read only with `measures`.
        measures: filled in by this call.

    Returns:
        (..., O), in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a rank or a dropout out of range.
        ImportError: the weight is 4-bit and bitsandbytes is not installed.
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

    One product computes x A^T for all projections, and dx is accumulated in one buffer. Arguments, results and errors
    are those of lora_linear, with one entry per projection.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
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
        Part(*each)
        for each in zip(
            weights, biases, map(float, scales), seeds or [None] * len(weights), measures or [None] * len(weights)
        )
    ]
    factors = [factor for pair in zip(lora_as, lora_bs) for factor in pair]
    x_TI, call = x.reshape(x.shape[:-1].numel(), x.shape[-1]), Call(parts, dropout, row_mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *factors)):
        ys = _LoraLinear.apply(x_TI, call, source_of(x), *factors)
    else:
        ys = _forward(x_TI, call, factors)[0]
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)  # views made here may be changed in place


def _forward(
    x_TI: torch.Tensor, call: Call, factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None], list[compute.Pair]]:
    """Of each projection: y; s D(x) A^T, or None where backward computes it; A and B in the dtype of x."""
    cast = [(a.to(x_TI.dtype), b.to(x_TI.dtype)) for a, b in zip(factors[::2], factors[1::2])]
    return *compute.forward(x_TI, call, cast), cast


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, call: Call, source: Source | None, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ys, s_TR, cast = _forward(x_TI, call, factors)
        weights = [None if is_quantised(part.weight) else part.weight for part in call.parts]
        kept = (x_TI,) if source is None else source.tensors
        ctx.save_for_backward(*s_TR, *(f for pair in cast for f in pair), *weights, *kept)
        ctx.call, ctx.dtypes = call, [factor.dtype for factor in factors]
        ctx.make, ctx.num_in = source and source.make, x_TI.shape[1]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys_TO: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("lora_linear")
        size = len(ctx.call.parts)
        saved = ctx.saved_tensors
        s_TR, factors, kept = saved[:size], saved[size : 3 * size], saved[4 * size :]
        needs_x, _, _, *needs = ctx.needs_input_grad
        used = [i for i in range(size) if dys_TO[i] is not None]
        if not used:
            return None, None, None, *[None] * (2 * size)
        x_TI = kept[0] if ctx.make is None else ctx.make(*kept).reshape(-1, ctx.num_in)

        def pairs(items: Sequence) -> list:
            return [item for i in used for item in items[2 * i : 2 * i + 2]]

        cast = pairs(factors)
        dx_TI, found = compute.backward(
            [dy for dy in dys_TO if dy is not None], x_TI, replace(ctx.call, parts=[ctx.call.parts[i] for i in used]),
            [s_TR[i] for i in used], list(zip(cast[::2], cast[1::2])), needs_x, pairs(needs), pairs(ctx.dtypes),
        )  # fmt: skip
        gradients: list[torch.Tensor | None] = [None] * (2 * size)
        for i, da, db in zip(used, found[::2], found[1::2]):
            gradients[2 * i : 2 * i + 2] = da, db
        return dx_TI, None, None, *gradients


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
    num_rows = x.shape[:-1].numel()
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
    shape = weight_shape(weight)
    rank = lora_a.shape[0] if lora_a.ndim else 0
    fits = x.ndim > 0 and len(shape) == lora_a.ndim == lora_b.ndim == 2
    if fits:
        num_out, num_in = shape
        fits = x.shape[-1] == num_in == lora_a.shape[1] and lora_b.shape == (num_out, rank)
        fits = fits and (bias is None or bias.shape == (num_out,))
    if not fits:
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
