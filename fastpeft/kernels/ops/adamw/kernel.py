"""AdamW's Triton kernel: one program per slice of a flat buffer."""

import triton
import triton.language as tl

from fastpeft.kernels.unit_sums import sum_unit


@triton.jit
def _bias(count, log_beta):
    """1 - beta^count in fp64: in fp32 its relative error is 1e-4 for beta 0.999 and small counts."""
    return (1 - tl.exp(count.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def _update(
    data_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, places, mask, good,
    divisor, beta1, rest1, beta2, rest2, eps, bias1, bias2, old_bias1, old_bias2, taken, shrink, rate, decay,
    REDUCES: tl.constexpr,
):  # fmt: skip
    """AdamW of the elements at `places`. Returns the terms of each element in the four sums of AdamWResult."""
    x = tl.load(data_ptr + places, mask=mask, other=0.0)
    raw = tl.load(grad_ptr + places, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + places, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + places, mask=mask, other=0.0)
    g = tl.div_rn(raw, divisor)
    new_m = beta1 * m + rest1 * g
    new_v = beta2 * v + rest2 * g * g
    mean, mean_sq = tl.div_rn(new_m, bias1), tl.div_rn(new_v, bias2)
    new_x = x * shrink - rate * tl.div_rn(mean, tl.sqrt_rn(mean_sq) + eps)
    stored = mask & good
    tl.store(data_ptr + places, new_x, mask=stored)
    tl.store(exp_avg_ptr + places, new_m, mask=stored)
    tl.store(exp_avg_sq_ptr + places, new_v, mask=stored)
    if divisor != 1.0:
        tl.store(grad_ptr + places, g, mask=stored)
    square, dot = tl.zeros_like(x), tl.zeros_like(x)
    if REDUCES:
        old_mean, old_sq = tl.div_rn(m, old_bias1), tl.div_rn(v, old_bias2)
        dot = raw * taken * (tl.div_rn(old_mean, tl.sqrt_rn(old_sq) + eps) + decay * x)
        square = raw * raw
        mean, mean_sq = tl.where(good, mean, old_mean), tl.where(good, mean_sq, old_sq)
    return square, mean * mean, mean_sq, dot


@triton.jit
def adamw_kernel(
    # flat buffers
    data_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr,
    # scalars on the device
    step_ptr, norm_ptr, loss_ptr, skipped_ptr, rate_ptr,
    # descriptors of slices and units, values of blocks, sums of slices and units, counters
    slices_ptr, units_ptr, multiplier_ptr, partials_ptr, sums_ptr, tickets_ptr,
    rate, beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, max_norm,
    decay_adapter, decay_head, head_ratio,
    num_slices, num_blocks,
    HAS_LOSS: tl.constexpr, READS_RATE: tl.constexpr, CLIPS: tl.constexpr, MULTIPLIES: tl.constexpr,
    REDUCES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    slice_ptr = slices_ptr + program * 4
    start, length = tl.load(slice_ptr), tl.load(slice_ptr + 1).to(tl.int32)
    unit, is_head = tl.load(slice_ptr + 2).to(tl.int32), tl.load(slice_ptr + 3) != 0
    if ALIGNED:
        start = tl.multiple_of(start, 4)

    # The guard, and the divisor that clips the gradient.
    norm = tl.load(norm_ptr)
    divisor = 1.0
    finite = tl.where(tl.abs(norm) < float("inf"), 1, 0)  # NaN is not
    if HAS_LOSS:
        finite = tl.where(tl.abs(tl.load(loss_ptr)) < float("inf"), finite, 0)
    good = finite != 0
    if CLIPS:
        divisor = tl.maximum(tl.div_rn(norm, max_norm), 1.0)

    step = tl.load(step_ptr)
    if READS_RATE:  # rounded as the host rounds an argument
        rate = tl.load(rate_ptr).to(tl.float32)
    bias1, bias2 = _bias(step + 1, log_beta1), _bias(step + 1, log_beta2)
    rate = tl.where(is_head, rate * head_ratio, rate)
    decay = tl.where(is_head, decay_head, decay_adapter)
    if MULTIPLIES:
        rate *= tl.load(multiplier_ptr + unit, mask=unit < num_blocks, other=1.0)
    shrink = 1 - rate * decay
    taken = tl.where(step > 0, 1.0, 0.0)
    old_bias1, old_bias2 = bias1, bias2
    if REDUCES:
        old_bias1, old_bias2 = _bias(tl.maximum(step, 1.0), log_beta1), _bias(tl.maximum(step, 1.0), log_beta2)

    # Vectors of four elements, and after them the up to three elements that remain.
    lanes, last = tl.arange(0, BLOCK), tl.arange(0, 4)
    squares, means = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    variances, dots = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    whole = tl.multiple_of(length // 4 * 4, 4)
    for at in range(0, whole, BLOCK):
        square, mean, variance, dot = _update(
            data_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, start + at + lanes, at + lanes < whole, good,
            divisor, beta1, rest1, beta2, rest2, eps, bias1, bias2, old_bias1, old_bias2, taken, shrink, rate,
            decay, REDUCES,
        )  # fmt: skip
        if REDUCES:
            squares += square
            means += mean
            variances += variance
            dots += dot
    square, mean, variance, dot = tl.sum(squares), tl.sum(means), tl.sum(variances), tl.sum(dots)
    if whole < length:
        square4, mean4, variance4, dot4 = _update(
            data_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, start + whole + last, whole + last < length, good,
            divisor, beta1, rest1, beta2, rest2, eps, bias1, bias2, old_bias1, old_bias2, taken, shrink, rate,
            decay, REDUCES,
        )  # fmt: skip
        square += tl.sum(square4)
        mean += tl.sum(mean4)
        variance += tl.sum(variance4)
        dot += tl.sum(dot4)
    if REDUCES:
        sum_unit(
            square, mean, variance, dot, program, unit, units_ptr, partials_ptr, sums_ptr, tickets_ptr + 2, BLOCK_ROWS
        )
    if program == 0:
        tl.store(skipped_ptr, tl.where(good, 0.0, 1.0))
    tl.debug_barrier()
    # Every program has read the step counter when the last one arrives here, so that it may be incremented.
    if tl.atomic_add(tickets_ptr + 1, 1, sem="acq_rel") == num_slices - 1:
        tl.store(tickets_ptr + 1, 0)
        tl.store(step_ptr, tl.where(good, step + 1, step))
