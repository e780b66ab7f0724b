"""rms_norm's Triton kernels: a program takes BLOCK_M rows of D features, in fp32; its result is rounded once."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, num_rows, D, eps, offset, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / D + eps)
    gain = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    tl.store(y_ptr + places, (x * rstd[:, None] * gain[None, :]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, num_rows, D, offset, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dx = rstd (g - n mean(g n)) with g = dy * gain and n = x rstd."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
    n = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
    gain = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    g = tl.load(dy_ptr + places, mask=mask, other=0.0).to(tl.float32) * gain[None, :]
    dx = rstd[:, None] * (g - n * (tl.sum(g * n, axis=1) / D)[:, None])
    tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=mask)
