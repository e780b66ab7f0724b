"""The penalty's Triton kernel: one program per factor of each matrix, and per slice of the other parameters."""

import triton
import triton.language as tl


@triton.jit
def _sum_squares(x_ptr, length, BLOCK: tl.constexpr):
    """Sum of squares of `length` elements from x_ptr on. The order of summation depends only on the length."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = length // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        x = tl.load(x_ptr + at + lanes)
        total += x * x
    x = tl.load(x_ptr + whole + lanes, mask=whole + lanes < length, other=0.0)
    return tl.sum(total + x * x)


@triton.jit
def _load(x_ptr, chunk, at, rank, num, IS_A: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of a factor, its offsets and its mask: rows of A (CHUNK, BLOCK_N), columns of B (BLOCK_N, CHUNK)."""
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    n = at + tl.arange(0, BLOCK_N)
    if IS_A:
        places = r[:, None] * num + n[None, :]
        mask = (r < rank)[:, None] & (n < num)[None, :]
    else:
        places = n[:, None] * rank + r[None, :]
        mask = (n < num)[:, None] & (r < rank)[None, :]
    return tl.load(x_ptr + places, mask=mask, other=0.0), places, mask


@triton.jit
def _gram(
    x_ptr, gram_ptr, rank, num, IS_A: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store A A^T or B^T B at gram_ptr, padded with zeros to CHUNK * NUM_CHUNKS rows and columns."""
    lanes = tl.arange(0, CHUNK)
    for pair in range(NUM_CHUNKS * NUM_CHUNKS):
        row, column = pair // NUM_CHUNKS, pair % NUM_CHUNKS  # pyright: ignore[reportOperatorIssue] (constexpr)
        gram = tl.zeros((CHUNK, CHUNK), tl.float32)
        for at in range(0, num, BLOCK_N):
            left, _, _ = _load(x_ptr, row, at, rank, num, IS_A, CHUNK, BLOCK_N)
            right, _, _ = _load(x_ptr, column, at, rank, num, IS_A, CHUNK, BLOCK_N)
            if IS_A:
                gram = tl.dot(left, tl.trans(right), gram, input_precision="tf32x3")
            else:
                gram = tl.dot(tl.trans(left), right, gram, input_precision="tf32x3")
        places = (row * CHUNK + lanes)[:, None] * (CHUNK * NUM_CHUNKS) + (column * CHUNK + lanes)[None, :]
        tl.store(gram_ptr + places, gram)


@triton.jit
def _add_product(
    data_ptr, into_ptr, gram_ptr, factor, rank, num,
    IS_A: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradient factor * G A or factor * B G, G the other factor's Gram matrix. Returns its sum of squares and
    its inner product with A or B."""
    lanes = tl.arange(0, CHUNK)
    squares = tl.zeros((CHUNK, BLOCK_N) if IS_A else (BLOCK_N, CHUNK), tl.float32)
    products = tl.zeros_like(squares)
    for step in range(tl.cdiv(num, BLOCK_N) * NUM_CHUNKS):
        at, row = step // NUM_CHUNKS * BLOCK_N, step % NUM_CHUNKS
        part = tl.zeros_like(squares)
        for column in range(NUM_CHUNKS):  # G is symmetric
            places = (row * CHUNK + lanes)[:, None] * (CHUNK * NUM_CHUNKS) + (column * CHUNK + lanes)[None, :]
            x, _, _ = _load(data_ptr, column, at, rank, num, IS_A, CHUNK, BLOCK_N)
            gram = tl.load(gram_ptr + places)
            if IS_A:
                part = tl.dot(gram, x, part, input_precision="tf32x3")
            else:
                part = tl.dot(x, tl.trans(gram), part, input_precision="tf32x3")
        part *= factor
        x, places, mask = _load(data_ptr, row, at, rank, num, IS_A, CHUNK, BLOCK_N)
        if ADD:
            tl.store(into_ptr + places, tl.load(into_ptr + places, mask=mask, other=0.0) + part, mask=mask)
        else:
            tl.store(into_ptr + places, part, mask=mask)
        squares += part * part
        products += part * x
    return tl.sum(tl.sum(squares, 1), 0), tl.sum(tl.sum(products, 1), 0)


@triton.jit
def _add_scaled(data_ptr, into_ptr, factor, length, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradient factor * x of the penalty `factors`. Returns as _add_product."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, length, BLOCK):
        mask = at + lanes < length
        x = tl.load(data_ptr + at + lanes, mask=mask, other=0.0)
        if ADD:
            old = tl.load(into_ptr + at + lanes, mask=mask, other=0.0)
            tl.store(into_ptr + at + lanes, old + factor * x, mask=mask)
        else:
            tl.store(into_ptr + at + lanes, factor * x, mask=mask)
        total += x * x
    square = tl.sum(total)
    return factor * factor * square, factor * square


@triton.jit
def _add_penalty(
    data_ptr, into_ptr, coefficient_ptr, scale_ptr, grams_ptr, task_ptr, program, num_matrices, start, length, other,
    PENALTY: tl.constexpr, ADD: tl.constexpr, ALIGNED_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The penalty of this program's factor, if it has one. Returns the gradient's sum of squares, and the value."""
    square, product = 0.0, 0.0
    if program < 2 * num_matrices:
        is_a = program < num_matrices
        k = program % num_matrices
        factor = 2.0 * tl.load(coefficient_ptr + k)
        own_ptr, to_ptr = data_ptr + start, into_ptr + start
        if PENALTY == "factors":
            if ALIGNED_ROWS:
                length = tl.multiple_of(length, 4)
            square, product = _add_scaled(  # pyright: ignore[reportGeneralTypeIssues] (compiled by Triton)
                own_ptr, to_ptr, factor, length, ADD, BLOCK
            )
        else:
            scale = tl.load(scale_ptr + k)
            factor *= scale * scale
            rank, num = tl.load(task_ptr + 3).to(tl.int32), tl.load(task_ptr + 4).to(tl.int32)
            num_other = tl.load(task_ptr + 5).to(tl.int32)
            if ALIGNED_ROWS:
                rank, num, num_other = tl.multiple_of(rank, 4), tl.multiple_of(num, 4), tl.multiple_of(num_other, 4)
            side = CHUNK * NUM_CHUNKS
            gram_ptr = grams_ptr + (2 * k + is_a.to(tl.int32)) * (side * side)  # Gram matrix of the other factor
            if is_a:
                _gram(data_ptr + other, gram_ptr, rank, num_other, False, CHUNK, NUM_CHUNKS, BLOCK_N)
                tl.debug_barrier()
                square, product = _add_product(
                    own_ptr, to_ptr, gram_ptr, factor, rank, num, True, ADD, CHUNK, NUM_CHUNKS, BLOCK_N
                )
            else:
                _gram(data_ptr + other, gram_ptr, rank, num_other, True, CHUNK, NUM_CHUNKS, BLOCK_N)
                tl.debug_barrier()
                square, _ = _add_product(
                    own_ptr, to_ptr, gram_ptr, factor, rank, num, False, ADD, CHUNK, NUM_CHUNKS, BLOCK_N
                )
        product = tl.where(product < 0, 0.0, 0.5 * product)
        tl.debug_barrier()  # the caller reads the gradient again, in another layout
    return square, product


@triton.jit
def _total(partials_ptr, num, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, num, BLOCK):  # bypass L1: other programs wrote these
        total += tl.load(partials_ptr + at + lanes, mask=at + lanes < num, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def weighted_frobenius_kernel(
    # flat buffers
    data_ptr, grad_ptr, into_ptr,
    # of each matrix
    coefficient_ptr, scale_ptr, grams_ptr,
    # descriptors, results
    tasks_ptr, partials_ptr, totals_ptr, ticket_ptr,
    num_matrices, num_adapter_tasks, num_tasks,
    PENALTY: tl.constexpr, ADD: tl.constexpr, MEASURE: tl.constexpr,
    ALIGNED: tl.constexpr, ALIGNED_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    task_ptr = tasks_ptr + program * 6
    start, length, other = tl.load(task_ptr), tl.load(task_ptr + 1).to(tl.int32), tl.load(task_ptr + 2)
    if ALIGNED:
        start, other = tl.multiple_of(start, 4), tl.multiple_of(other, 4)
    before, size, square, product = 0.0, 0.0, 0.0, 0.0
    if MEASURE:
        before = _sum_squares(grad_ptr + start, length, BLOCK)
        size = _sum_squares(data_ptr + start, length, BLOCK)
    if PENALTY != "none":
        square, product = _add_penalty(  # pyright: ignore[reportGeneralTypeIssues] (compiled by Triton)
            data_ptr, into_ptr, coefficient_ptr, scale_ptr, grams_ptr, task_ptr, program, num_matrices, start, length,
            other, PENALTY, ADD, ALIGNED_ROWS, CHUNK, NUM_CHUNKS, BLOCK_N, BLOCK,
        )  # fmt: skip
    after = _sum_squares(grad_ptr + start, length, BLOCK)
    tl.store(partials_ptr + program, after)
    tl.store(partials_ptr + num_tasks + program, square)
    tl.store(partials_ptr + 2 * num_tasks + program, product)
    tl.store(partials_ptr + 3 * num_tasks + program, before)
    tl.store(partials_ptr + 4 * num_tasks + program, size)
    tl.debug_barrier()
    # The last program to arrive sums in a fixed order, so that the result does not depend on which one it is.
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == num_tasks - 1:
        tl.store(ticket_ptr, 0)
        adapter = _total(partials_ptr, num_adapter_tasks, BLOCK)
        head = _total(partials_ptr + num_adapter_tasks, num_tasks - num_adapter_tasks, BLOCK)
        squares = _total(partials_ptr + num_tasks, num_adapter_tasks, BLOCK)
        products = _total(partials_ptr + 2 * num_tasks, num_adapter_tasks, BLOCK)
        adapter, penalty = tl.sqrt_rn(adapter), tl.sqrt_rn(squares)
        tl.store(totals_ptr, tl.sqrt_rn(adapter * adapter + head))
        tl.store(totals_ptr + 1, products)
        tl.store(totals_ptr + 2, penalty)
        tl.store(totals_ptr + 3, penalty / tl.maximum(adapter, 1e-30))
