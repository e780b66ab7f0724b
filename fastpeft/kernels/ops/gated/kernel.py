"""gated's Triton kernels: elementwise in fp32, rounded once at the end."""

import triton
import triton.language as tl


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x))."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    # gelu_tanh: (1 + tanh u) / 2 = sigmoid(2 u)
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit(do_not_specialize=["num"])
def gated_kernel(gate_ptr, up_ptr, y_ptr, num, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num
    gate = tl.load(gate_ptr + places, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues] (compiled by Triton)
    y = value * tl.load(up_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num"])
def gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, num, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num
    gate = tl.load(gate_ptr + places, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues] (compiled by Triton)
    dy = tl.load(dy_ptr + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(dgate_ptr + places, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + places, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)
