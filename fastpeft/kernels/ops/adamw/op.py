"""adamw_step: clipping, non-finite guard, learning rates per block, AdamW and the sums for schedules, in one launch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw as torch_adamw

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.flat_layout import FlatLayout
from fastpeft.kernels.launch import launch
from fastpeft.kernels.ops.adamw import reference
from fastpeft.kernels.ops.adamw.reference import AdamWOptions

BLOCK, BLOCK_ROWS, NUM_WARPS = 512, 64, 4
SUMS = ("grad_sq", "mean_sq", "second", "descent")
"""Columns of AdamWResult.sums."""


@dataclass(frozen=True)
class AdamWResult:
    skipped: torch.Tensor
    """1.0 if the step was skipped because the norm or the loss is not finite; else 0.0."""
    sums: torch.Tensor | None
    """(num_units, 4), columns as in SUMS; None unless `reduces` names any. On a CPU the columns that it does not name
    are NaN. A row per adapted matrix in the model's order, then one per other parameter. Each entry sums over the
    elements: g^2; the squared bias-corrected mean of g; the bias-corrected mean of g^2; g u (1 - rate decay). g is the
    gradient before clipping. The means are those after this step. u is the direction of the step before,
    theta <- theta - rate u, and `rate` that step's learning rate; before the first step the entry is 0."""


@torch.no_grad()
def adamw_step(
    data: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    layout: FlatLayout,
    *,
    lr: float | torch.Tensor,
    norm: torch.Tensor,
    options: AdamWOptions,
    loss: torch.Tensor | None = None,
    multiplier_K: torch.Tensor | None = None,
    reduces: Collection[str] = (),
) -> AdamWResult:
    """One step of AdamW (arXiv:1711.05101) over flat buffers, in place. On a GPU the host reads nothing.

    `grad` is clipped in place to `options.max_norm`. A step whose norm or loss is not finite changes no bit. On a GPU
    it is one launch and deterministic to the bit.

    Args:
        data, grad, exp_avg, exp_avg_sq: (num_total,) fp32 or fp64, in the order of `layout`.
        step: (), fp32: number of steps taken. Incremented unless this step is skipped.
        lr: learning rate of the adapter: a number; or (), fp64 on the device, which every replay of a captured step
            reads again. Both give the same bits.
        norm: (), norm of `grad` before clipping, in its dtype, from weighted_frobenius.
        loss: (), also checked by the guard.
        multiplier_K: (num_blocks,), factor on the learning rate of each block; other parameters have 1.
        reduces: names from SUMS, the columns to compute in AdamWResult.sums.

    Returns:
        AdamWResult, on the device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    buffers = data, grad, exp_avg, exp_avg_sq, step
    _check(buffers, layout, norm, loss, multiplier_K, lr)
    if runs_triton(data):
        return _launch(buffers, layout, lr, norm, loss, multiplier_K, options, reduces)
    good = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    skipped = (~good).to(data.dtype)
    divisor = (norm / options.max_norm).clamp_min(1.0) if options.max_norm else torch.ones_like(norm)
    sums = _sums_before(buffers, layout, options, reduces)
    if data.dtype == torch.float32:
        before = None if multiplier_K is None else data.clone()
        _step_fused(buffers, layout, lr, divisor, skipped, options)
        if before is not None and multiplier_K is not None:  # an update is proportional to its rate
            torch.lerp(before, data, layout.spread(multiplier_K, fill=1.0), out=data)
    else:
        _step_plainly(buffers, layout, lr, divisor, good, multiplier_K, options)
    if not reduces:
        return AdamWResult(skipped, None)
    bias1, bias2 = _bias_corrections(step, options)
    if "mean_sq" in reduces:
        sums["mean_sq"] = layout.unit_sums(exp_avg * exp_avg) / bias1**2
    if "second" in reduces:
        sums["second"] = layout.unit_sums(exp_avg_sq) / bias2
    unknown_U = data.new_full((layout.num_units,), math.nan)
    return AdamWResult(skipped, torch.stack([sums.get(name, unknown_U) for name in SUMS], dim=1))


def _check(buffers, layout, norm, loss, multiplier_K, lr) -> None:
    data, grad, exp_avg, exp_avg_sq, step = buffers
    layout.check("adamw_step", data=data, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, tensor in {"step": step, "norm": norm, "loss": loss}.items():
        if tensor is None:
            continue
        if tensor.dim() or tensor.device != data.device or not tensor.is_floating_point():
            raise ValueError(
                f"adamw_step: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
                f"expected a floating-point scalar on {data.device}"
            )
    if isinstance(lr, torch.Tensor) and (lr.dtype, lr.dim(), lr.device) != (torch.float64, 0, data.device):
        raise ValueError(
            f"adamw_step: lr is {lr.dtype} of shape {tuple(lr.shape)} on {lr.device}; expected a number, or a float64 "
            f"scalar on {data.device}"
        )
    if norm.dtype != data.dtype:
        raise ValueError(f"adamw_step: norm is {norm.dtype}; expected {data.dtype}, as the buffers are")
    wanted = (layout.num_blocks,), data.dtype, data.device
    if multiplier_K is not None and (multiplier_K.shape, multiplier_K.dtype, multiplier_K.device) != wanted:
        raise ValueError(
            f"adamw_step: multiplier_K is {multiplier_K.dtype} of shape {tuple(multiplier_K.shape)} on "
            f"{multiplier_K.device}; expected {data.dtype} of shape {wanted[0]} on {data.device}"
        )


Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _step_fused(
    buffers: Buffers,
    layout: FlatLayout,
    lr: float | torch.Tensor,
    divisor: torch.Tensor,
    skipped: torch.Tensor,
    options: AdamWOptions,
) -> None:
    """torch's fused AdamW, once for the adapter and once for the head. Each call increments its own step counter."""
    *flats, step = buffers
    cut, total = layout.num_adapter, layout.num_total
    before = step.clone() if 0 < cut < total else step
    for part, decay, ratio, count in (
        (slice(0, cut), options.weight_decay, 1.0, step),
        (slice(cut, total), options.head_weight_decay, options.head_ratio, before),
    ):
        if part.start == part.stop:
            continue
        data, grad, exp_avg, exp_avg_sq = (flat[part] for flat in flats)
        torch_adamw(
            [data],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [count],
            fused=True,
            grad_scale=divisor,
            found_inf=skipped,
            amsgrad=False,
            beta1=options.beta1,
            beta2=options.beta2,
            lr=lr * ratio,
            weight_decay=decay,
            eps=options.eps,
            maximize=False,
        )


def _sums_before(
    buffers: Buffers, layout: FlatLayout, options: AdamWOptions, reduces: Collection[str]
) -> dict[str, torch.Tensor]:
    """The sums known before the step: g^2, and g u (1 - rate decay) with u from reference.direction."""
    data, grad, exp_avg, exp_avg_sq, step = buffers
    sums = {"grad_sq": layout.unit_sums(grad * grad)} if "grad_sq" in reduces else {}
    if "descent" not in reduces:
        return sums
    if step == 0:
        return sums | {"descent": data.new_zeros(layout.num_units)}
    bias1, bias2 = _bias_corrections(step, options)
    root = math.sqrt(bias2)
    terms = torch.sqrt(exp_avg_sq).add_(options.eps * root)
    torch.div(exp_avg, terms, out=terms)
    decays = options.weight_decay, options.head_weight_decay
    cut = layout.num_total if decays[0] == decays[1] else layout.num_adapter
    for part, decay in zip((slice(cut), slice(cut, None)), decays):
        if decay and part.start != layout.num_total:
            terms[part].add_(data[part], alpha=decay * bias1 / root)
    return sums | {"descent": layout.unit_sums(terms.mul_(grad)) * (root / bias1)}


def _bias_corrections(step: torch.Tensor, options: AdamWOptions) -> tuple[float, float]:
    """1 - beta^step for both betas; step 0 counts as 1. Reads `step` on the host: GPUs do not take this path."""
    count = max(float(step), 1.0)
    return 1 - options.beta1**count, 1 - options.beta2**count


def _step_plainly(
    buffers: Buffers,
    layout: FlatLayout,
    lr: float | torch.Tensor,
    divisor: torch.Tensor,
    good: torch.Tensor,
    multiplier_K: torch.Tensor | None,
    options: AdamWOptions,
) -> None:
    data, grad, exp_avg, exp_avg_sq, step = buffers
    rate = _spread(layout, data, lr, lr * options.head_ratio)
    if multiplier_K is not None:
        rate *= layout.spread(multiplier_K, fill=1.0)
    decay = _spread(layout, data, options.weight_decay, options.head_weight_decay)
    count = step + good.to(step.dtype)
    clipped = grad / divisor
    new = reference.adamw(data, clipped, exp_avg, exp_avg_sq, count, rate, decay, options)
    for old, value in zip((data, exp_avg, exp_avg_sq, grad), (*new, clipped)):
        old.copy_(torch.where(good, value, old))
    step.copy_(count)


def _spread(
    layout: FlatLayout, like: torch.Tensor, adapter: float | torch.Tensor, head: float | torch.Tensor
) -> torch.Tensor:
    """One value for all of the adapter's elements, one for all of the head's."""
    out = torch.empty_like(like)
    out[: layout.num_adapter] = adapter
    out[layout.num_adapter :] = head
    return out


def _launch(buffers, layout, lr, norm, loss, multiplier_K, options, reduces) -> AdamWResult:
    from fastpeft.kernels.ops.adamw.kernel import adamw_kernel

    data = buffers[0]
    num_slices, on_device = len(layout.slices), isinstance(lr, torch.Tensor)
    skipped = data.new_empty(())
    partials, sums = skipped, skipped
    if reduces:
        partials, sums = data.new_empty(num_slices, len(SUMS)), data.new_empty(layout.num_units, len(SUMS))
    launch(
        adamw_kernel,
        (num_slices,),
        *buffers,
        norm,
        data if loss is None else loss,
        skipped,
        lr if on_device else data,
        layout.slices,
        layout.units,
        data if multiplier_K is None else multiplier_K.contiguous(),
        partials,
        sums,
        layout.tickets,
        0.0 if on_device else float(lr),
        float(options.beta1),
        1 - options.beta1,
        math.log(options.beta1) if options.beta1 else -math.inf,
        float(options.beta2),
        1 - options.beta2,
        math.log(options.beta2) if options.beta2 else -math.inf,
        float(options.eps),
        float(options.max_norm),
        float(options.weight_decay),
        float(options.head_weight_decay),
        float(options.head_ratio),
        num_slices,
        layout.num_blocks,
        HAS_LOSS=loss is not None,
        READS_RATE=on_device,
        CLIPS=options.max_norm > 0,
        MULTIPLIES=multiplier_K is not None,
        REDUCES=bool(reduces),
        ALIGNED=layout.aligned,
        BLOCK=BLOCK,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=NUM_WARPS,
    )
    return AdamWResult(skipped, sums if reduces else None)
