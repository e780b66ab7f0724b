"""rotary's Triton kernel: a program takes BLOCK_M of the N x H x L rows, in any strides. A row has two halves."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_rows, H, L, half,
    x_n, x_h, x_l, x_d, y_n, y_h, y_l, y_d, cos_n, cos_l, cos_d, sin_n, sin_l, sin_d,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Strides are those of (N, H, L, D), 0 where cos and sin are broadcast. `TRANSPOSED` rotates gradients back."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < half)[None, :]
    at, h, n = (rows % L).to(tl.int64), (rows // L % H).to(tl.int64), (rows // (L * H)).to(tl.int64)
    first = columns.to(tl.int64)
    second = first + half
    x_rows, y_rows = (n * x_n + h * x_h + at * x_l)[:, None], (n * y_n + h * y_h + at * y_l)[:, None]
    cos_rows, sin_rows = (n * cos_n + at * cos_l)[:, None], (n * sin_n + at * sin_l)[:, None]
    a = tl.load(x_ptr + x_rows + first[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + x_rows + second[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + cos_rows + first[None, :] * cos_d, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + cos_rows + second[None, :] * cos_d, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + sin_rows + first[None, :] * sin_d, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + sin_rows + second[None, :] * sin_d, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        y_a, y_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        y_a, y_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(y_ptr + y_rows + first[None, :] * y_d, y_a.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + y_rows + second[None, :] * y_d, y_b.to(y_ptr.dtype.element_ty), mask=mask)
