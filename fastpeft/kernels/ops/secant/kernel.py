"""secant_sums' Triton kernel: one program per slice of a flat buffer."""

import triton
import triton.language as tl

from fastpeft.kernels.unit_sums import sum_unit


@triton.jit
def _products(data_ptr, grad_ptr, previous_ptr, older_ptr, second_ptr, places, mask):
    """The terms of each element at `places` in the three sums. Also updates `older` and `previous` there."""
    x = tl.load(data_ptr + places, mask=mask, other=0.0)
    g = tl.load(grad_ptr + places, mask=mask, other=0.0)
    last = x - tl.load(previous_ptr + places, mask=mask, other=0.0)
    before = tl.load(older_ptr + places, mask=mask, other=0.0)
    root = tl.sqrt_rn(tl.load(second_ptr + places, mask=mask, other=0.0))
    tl.store(older_ptr + places, last, mask=mask)
    tl.store(previous_ptr + places, x, mask=mask)
    return g * last, g * before, last * root * before


@triton.jit
def secant_kernel(
    # flat buffers
    data_ptr, grad_ptr, previous_ptr, older_ptr, second_ptr,
    # a scalar on the device
    divisor_ptr,
    # descriptors of slices and units, sums of slices and units, counters
    slices_ptr, units_ptr, partials_ptr, sums_ptr, tickets_ptr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    slice_ptr = slices_ptr + program * 4
    start, length = tl.load(slice_ptr), tl.load(slice_ptr + 1).to(tl.int32)
    unit = tl.load(slice_ptr + 2).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 4)

    # Vectors of four elements, and after them the up to three elements that remain.
    lanes, rest = tl.arange(0, BLOCK), tl.arange(0, 4)
    alongs, befores = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    whole = tl.multiple_of(length // 4 * 4, 4)
    for at in range(0, whole, BLOCK):
        along, before, square = _products(
            data_ptr, grad_ptr, previous_ptr, older_ptr, second_ptr, start + at + lanes, at + lanes < whole
        )
        alongs += along
        befores += before
        squares += square
    along, before, square = tl.sum(alongs), tl.sum(befores), tl.sum(squares)
    if whole < length:
        along4, before4, square4 = _products(
            data_ptr, grad_ptr, previous_ptr, older_ptr, second_ptr, start + whole + rest, whole + rest < length
        )
        along += tl.sum(along4)
        before += tl.sum(before4)
        square += tl.sum(square4)
    square = tl.div_rn(square, tl.sqrt(tl.load(divisor_ptr)).to(tl.float32))
    sum_unit(along, before, square, 0.0, program, unit, units_ptr, partials_ptr, sums_ptr, tickets_ptr + 2, BLOCK_ROWS)
