"""residual_norm's Triton kernels: a program takes BLOCK_M rows of D features, in fp32."""

import triton
import triton.language as tl

from fastpeft.kernels.ops.lora_linear.kernel import keep_columns


@triton.jit(do_not_specialize=["num_rows"])
def residual_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr,
    num_rows, D, eps, drop_below, keep_factor,
    DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        x = tl.where(keep_columns(seed_ptr, rows, 0, drop_below, BLOCK_D), x * keep_factor, 0.0)
    residual = tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + places, total, mask=mask)
    total = total.to(tl.float32)  # normalise the rounded sum, which is what backward reads
    mean = tl.sum(total, axis=1) / D
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / D + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    y = centred * rstd[:, None] * tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def residual_norm_backward_kernel(
    dy_ptr, total_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dx_ptr,
    num_rows, D, drop_below, keep_factor, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dtotal = rstd (g - mean(g) - n mean(g n)) with g = dy * weight and n the normalised total."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
    total = tl.load(total_ptr + places, mask=mask, other=0.0).to(tl.float32)
    n = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + places, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    dtotal = rstd[:, None] * (g - (tl.sum(g, axis=1) / D)[:, None] - n * (tl.sum(g * n, axis=1) / D)[:, None])
    tl.store(dtotal_ptr + places, dtotal.to(dtotal_ptr.dtype.element_ty), mask=mask)
    if DROPOUT:
        dx = tl.where(keep_columns(seed_ptr, rows, 0, drop_below, BLOCK_D), dtotal * keep_factor, 0.0)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=mask)
