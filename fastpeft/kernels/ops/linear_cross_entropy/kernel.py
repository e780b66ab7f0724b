"""Triton kernel of the cross entropies: one program per row of logits computes its loss, gradient and statistics.

Shape suffixes: V columns of a block of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(row_ptr, start, v_V, vocab, width):
    """Logits from `start` on, -inf beyond the vocabulary. The load is masked by `width`, which keeps it vectorised."""
    z_V = tl.load(row_ptr + start + v_V, mask=v_V < width - start, other=0.0).to(tl.float32)
    return tl.where(v_V < vocab - start, z_V, float("-inf"))


@triton.jit(do_not_specialize=["num_labelled"])
def cross_entropy_row(
    # tensors; the gradient may be written over the logits
    logits_ptr, gradient_ptr, label_ptr, weight_ptr, loss_ptr, fisher_ptr, entropy_ptr,
    # shapes and strides; rows from num_labelled on have no label, so that only their entropy is computed; columns from
    # `vocab` to `width` are padding that may be read and written
    num_labelled, vocab, width, logits_stride, gradient_stride, ignore_index, smoothing,
    HAS_WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATISTICS: tl.constexpr, SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Pass 1, online: the maximum, and sums of e, e^2 and e log e with e = exp(z - max). Pass 2: the gradient
    weight * (p - target)."""
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    has_label = (row < num_labelled) & (label != ignore_index)
    logits_ptr += row.to(tl.int64) * logits_stride
    gradient_ptr += row.to(tl.int64) * gradient_stride
    v_V = tl.arange(0, BLOCK_V)
    if (row < num_labelled) & (label == ignore_index):
        tl.store(loss_ptr + row, 0.0)
        if STATISTICS:
            tl.store(fisher_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
        if GRADIENT:
            zero_V = tl.zeros((BLOCK_V,), dtype=gradient_ptr.dtype.element_ty)
            for start in range(0, vocab, BLOCK_V):
                tl.store(gradient_ptr + start + v_V, zero_V, mask=v_V < width - start)
        return

    is_class = has_label & (label >= 0) & (label < vocab)  # any other label gives a loss of NaN
    target = tl.where(is_class, label, -1).to(tl.int32)
    label_logit = tl.load(logits_ptr + target, mask=is_class, other=float("nan")).to(tl.float32)
    top = -3.0e38  # not -inf: -inf minus itself is NaN
    rest = 0.0  # sum of e over all but the label: rest / total is 1 - p, exact even for p near 1
    rest_squares = 0.0
    moment = 0.0  # sum of e (z - top)
    total_logit = 0.0
    for start in range(0, vocab, BLOCK_V):
        z_V = _logits(logits_ptr, start, v_V, vocab, width)
        new_top = tl.maximum(top, tl.max(z_V))
        shrink = tl.exp(top - new_top)
        e_V = tl.exp(z_V - new_top)
        rest_V = tl.where(v_V == target - start, 0.0, e_V)
        if STATISTICS:
            seen = rest * shrink + tl.where(has_label & (target < start), tl.exp(label_logit - new_top), 0.0)
            moment = shrink * moment + (top - new_top) * seen
            moment += tl.sum(e_V * tl.maximum(z_V - new_top, -1.0e30))  # 0 times -inf is NaN
            rest_squares = shrink * shrink * rest_squares + tl.sum(rest_V * rest_V)
        rest = shrink * rest + tl.sum(rest_V)
        if SMOOTHING:
            total_logit += tl.sum(tl.where(v_V < vocab - start, z_V, 0.0))
        top = new_top

    total = rest + tl.where(has_label, tl.exp(label_logit - top), 0.0)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row, mask=has_label, other=0.0).to(tl.float32)
    loss = tl.log(total) + (top - label_logit)
    if SMOOTHING:
        loss = (1.0 - smoothing) * loss + smoothing * (tl.log(total) + (top - total_logit / vocab))
    tl.store(loss_ptr + row, tl.where(has_label, loss * weight, 0.0))
    if STATISTICS:
        fisher = (rest_squares + rest * rest) / (total * total)
        tl.store(fisher_ptr + row, tl.where(has_label, fisher, 0.0))
        tl.store(entropy_ptr + row, tl.log(total) - moment / total)
    if GRADIENT:  # noqa: SIM102 -- a compile-time condition, the inner one is not
        if row < num_labelled:
            tl.debug_barrier()  # all threads have read the label's logit before it is overwritten
            scale = weight / total
            for start in range(0, vocab, BLOCK_V):
                z_V = _logits(logits_ptr, start, v_V, vocab, width)
                g_V = tl.where(v_V == target - start, -rest, tl.exp(z_V - top)) * scale
                if SMOOTHING:
                    g_V += (tl.where(v_V == target - start, smoothing, 0.0) - smoothing / vocab) * weight
                tl.store(gradient_ptr + start + v_V, g_V.to(gradient_ptr.dtype.element_ty), mask=v_V < width - start)
