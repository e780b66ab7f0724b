"""Sums per unit in a fixed order, the last part of Triton kernels over the slices of a FlatLayout."""

import triton
import triton.language as tl


@triton.jit
def sum_unit(
    a, b, c, d, program, unit, units_ptr, partials_ptr, sums_ptr, tickets_ptr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Store one slice's four sums. The program that finishes last in its unit adds up the sums of all slices, in slice
    order."""
    row_ptr = partials_ptr + program * 4
    tl.store(row_ptr, a)
    tl.store(row_ptr + 1, b)
    tl.store(row_ptr + 2, c)
    tl.store(row_ptr + 3, d)
    first, num = tl.load(units_ptr + unit * 2), tl.load(units_ptr + unit * 2 + 1).to(tl.int32)
    tl.debug_barrier()
    if tl.atomic_add(tickets_ptr + unit, 1, sem="acq_rel") == num - 1:
        tl.store(tickets_ptr + unit, 0)
        rows, columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, 4)
        total = tl.zeros((BLOCK_ROWS, 4), tl.float32)
        for at in range(0, num, BLOCK_ROWS):  # bypass L1: other programs wrote these sums
            places = (first + at + rows)[:, None] * 4 + columns[None, :]
            inside = (at + rows < num)[:, None] & (columns < 4)[None, :]
            total += tl.load(partials_ptr + places, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(sums_ptr + unit * 4 + columns, tl.sum(total, 0))
