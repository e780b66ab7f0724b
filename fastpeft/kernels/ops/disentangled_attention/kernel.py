"""The Triton kernels of disentangled_attention.

A program takes BLOCK queries, or keys, of one row and head, and iterates over the other side in steps of BLOCK. Within
such a tile the distances i - j are a band of 2 BLOCK - 1. The position term of the scores is therefore a product
(BLOCK, 2 BLOCK) with the band's rows of a table, from which each query gathers a window that is shifted by one column
per query: `slant`. Neither that product nor the weights leave the chip.

Backward recomputes the weights from the logarithm of their sum. It is infinite for masked queries, whose weights are
then 0, so that nothing else needs to mask them. The gradients of the tables are summed along diagonals of tiles, which
share one band. Every sum has a fixed order, and there are no atomics.

Row lengths are read on the device. Arguments that change with the batch are not specialised.

Symbols: row n of tokens, query i, key j, H heads, D features of a head, P distances.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastpeft.kernels.ops.lora_linear.kernel import keep_columns

LOG2_E = tl.constexpr(1.4426950408889634)
CHANGING = ["num_distances", "max_keys", "num_rows", "num_splits", "num_diagonals", "blocks_k", "num_table_rows"]


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "ieee":  # the interpreter stores bf16 as integers and would multiply those
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _heads(ptr, tokens, inside, stride, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D): the features of head h, 0 where `inside` is false."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tokens.to(tl.int64)[:, None] * stride + h * D + d[None, :]
    return tl.load(ptrs, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_heads(ptr, tokens, inside, stride, h, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tokens.to(tl.int64)[:, None] * stride + h * D + d[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _band(
    table_ptr, rows_ptr, first, num_distances, max_keys, stride, h,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(2 BLOCK, BLOCK_D): rows of a table for the distances from `first` on, clamped to those that exist."""
    places = first + max_keys - 1 + tl.arange(0, 2 * BLOCK)
    rows = tl.load(rows_ptr + tl.minimum(tl.maximum(places, 0), num_distances - 1))
    return _heads(table_ptr, rows, rows >= 0, stride, h, D, BLOCK_D)


@triton.jit
def _scores(
    q, k, pk_ptr, pq_ptr, rows_ptr, first, num_distances, max_keys, stride, h,
    C2P: tl.constexpr, P2C: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) scores before the scale; `first` is the distance from the tile's first query to its last key."""
    near = tl.arange(0, BLOCK)
    slant = near[:, None] - near[None, :] + (BLOCK - 1)
    scores = _dot(q, tl.trans(k), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
    if C2P:
        band = _band(pk_ptr, rows_ptr, first, num_distances, max_keys, stride, h, BLOCK, D, BLOCK_D)
        each = _dot(q, tl.trans(band), tl.zeros((BLOCK, 2 * BLOCK), tl.float32), PRECISION)
        scores += tl.gather(each, slant, 1)
    if P2C:
        band = _band(pq_ptr, rows_ptr, first, num_distances, max_keys, stride, h, BLOCK, D, BLOCK_D)
        each = _dot(band, tl.trans(k), tl.zeros((2 * BLOCK, BLOCK), tl.float32), PRECISION)
        scores += tl.gather(each, slant, 0)
    return scores


@triton.jit
def _by_query(ds, BLOCK: tl.constexpr):
    """(BLOCK, 2 BLOCK): the gradient by each query's product with each row of the band, from that by the scores."""
    at = tl.arange(0, BLOCK)[:, None] - tl.arange(0, 2 * BLOCK)[None, :] + (BLOCK - 1)
    inside = (at >= 0) & (at < BLOCK)
    return tl.where(inside, tl.gather(ds, tl.where(inside, at, 0), 1), 0.0)


@triton.jit
def _by_key(ds, BLOCK: tl.constexpr):
    """(2 BLOCK, BLOCK): the gradient by each key's product with each row of the band."""
    at = tl.arange(0, 2 * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :] - (BLOCK - 1)
    inside = (at >= 0) & (at < BLOCK)
    return tl.where(inside, tl.gather(ds, tl.where(inside, at, 0), 0), 0.0)


@triton.jit
def _taking_part(places, num, first_token, mask_ptr, HAS_MASK: tl.constexpr):
    """Whether each token is inside its row and not masked."""
    real = places < num
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + first_token + places, mask=real, other=0) != 0)
    return real


@triton.jit
def _score_gradients(
    scores, real, logsum, delta, dy, v, seed_ptr, draws, first_key, scale, drop_below, keep_factor,
    DROPOUT: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights after dropout, and the gradients of the scores, (BLOCK, BLOCK) each."""
    weights = tl.exp2(tl.where(real[None, :], scores * (scale * LOG2_E), float("-inf")) - logsum[:, None])
    dweights = _dot(dy, tl.trans(v), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
    dropped = weights
    if DROPOUT:
        keep = keep_columns(seed_ptr, draws, first_key, drop_below, BLOCK)
        dweights = tl.where(keep, dweights * keep_factor, 0.0)
        dropped = tl.where(keep, weights * keep_factor, 0.0)
    return dropped, weights * (dweights - delta[:, None])


@triton.jit(do_not_specialize=CHANGING)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, rows_ptr, cu_queries_ptr, cu_keys_ptr, mask_ptr, seed_ptr, y_ptr, logsum_ptr,
    num_distances, max_keys, stride_q, stride_k, stride_v, stride, H, scale, drop_below, keep_factor,
    C2P: tl.constexpr, P2C: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes y, and log2 of the sum of the unnormalised weights, for BLOCK queries of a row and head."""
    first_i, h, n = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    first_query, first_key = tl.load(cu_queries_ptr + n), tl.load(cu_keys_ptr + n)
    num_i, num_j = tl.load(cu_queries_ptr + n + 1) - first_query, tl.load(cu_keys_ptr + n + 1) - first_key
    if first_i < num_i:
        i = first_i + tl.arange(0, BLOCK)
        tokens = first_query + i
        q = _heads(q_ptr, tokens, i < num_i, stride_q, h, D, BLOCK_D)
        largest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for first_j in range(0, num_j, BLOCK):
            j = first_j + tl.arange(0, BLOCK)
            real = _taking_part(j, num_j, first_key, mask_ptr, HAS_MASK)
            k = _heads(k_ptr, first_key + j, j < num_j, stride_k, h, D, BLOCK_D)
            scores = _scores(
                q, k, pk_ptr, pq_ptr, rows_ptr, first_i - first_j - (BLOCK - 1), num_distances, max_keys, stride, h,
                C2P, P2C, BLOCK, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            scores = tl.where(real[None, :], scores * (scale * LOG2_E), float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger)  # all keys so far are masked
            weights, shrunk = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
            largest, total = larger, total * shrunk + tl.sum(weights, 1)
            if DROPOUT:
                weights = tl.where(keep_columns(seed_ptr, tokens * H + h, first_j, drop_below, BLOCK), weights, 0.0)
            v = _heads(v_ptr, first_key + j, j < num_j, stride_v, h, D, BLOCK_D)
            acc = _dot(weights.to(v.dtype), v, acc * shrunk[:, None], PRECISION)
        asks = _taking_part(i, num_i, first_key, mask_ptr, HAS_MASK) & (total > 0)
        whole = tl.where(asks, total, 1.0)
        y = tl.where(asks[:, None], acc * (keep_factor / whole)[:, None], 0.0)
        _store_heads(y_ptr, tokens, i < num_i, stride, h, y, D, BLOCK_D)
        logsum = tl.where(asks, largest + tl.log2(whole), float("inf"))
        tl.store(logsum_ptr + tokens * H + h, logsum, mask=i < num_i)


@triton.jit(do_not_specialize=CHANGING)
def query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, rows_ptr, cu_queries_ptr, cu_keys_ptr, mask_ptr, seed_ptr, y_ptr, dy_ptr,
    logsum_ptr, delta_ptr, dq_ptr,
    num_distances, max_keys, stride_q, stride_k, stride_v, stride, H, scale, drop_below, keep_factor,
    C2P: tl.constexpr, P2C: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dq, and delta = y . dy for the other kernels, for BLOCK queries of a row and head."""
    first_i, h, n = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    first_query, first_key = tl.load(cu_queries_ptr + n), tl.load(cu_keys_ptr + n)
    num_i, num_j = tl.load(cu_queries_ptr + n + 1) - first_query, tl.load(cu_keys_ptr + n + 1) - first_key
    if first_i < num_i:
        i = first_i + tl.arange(0, BLOCK)
        tokens = first_query + i
        q = _heads(q_ptr, tokens, i < num_i, stride_q, h, D, BLOCK_D)
        dy = _heads(dy_ptr, tokens, i < num_i, stride, h, D, BLOCK_D)
        y = _heads(y_ptr, tokens, i < num_i, stride, h, D, BLOCK_D)
        delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
        tl.store(delta_ptr + tokens * H + h, delta, mask=i < num_i)
        logsum = tl.load(logsum_ptr + tokens * H + h, mask=i < num_i, other=float("inf"))
        dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for first_j in range(0, num_j, BLOCK):
            j = first_j + tl.arange(0, BLOCK)
            real = _taking_part(j, num_j, first_key, mask_ptr, HAS_MASK)
            k = _heads(k_ptr, first_key + j, j < num_j, stride_k, h, D, BLOCK_D)
            v = _heads(v_ptr, first_key + j, j < num_j, stride_v, h, D, BLOCK_D)
            first = first_i - first_j - (BLOCK - 1)
            scores = _scores(
                q, k, pk_ptr, pq_ptr, rows_ptr, first, num_distances, max_keys, stride, h,
                C2P, P2C, BLOCK, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            _, ds = _score_gradients(
                scores, real, logsum, delta, dy, v, seed_ptr, tokens * H + h, first_j, scale, drop_below, keep_factor,
                DROPOUT, BLOCK, PRECISION,
            )  # fmt: skip
            dq = _dot(ds.to(k.dtype), k, dq, PRECISION)
            if C2P:
                band = _band(pk_ptr, rows_ptr, first, num_distances, max_keys, stride, h, BLOCK, D, BLOCK_D)
                dq = _dot(_by_query(ds, BLOCK).to(k.dtype), band, dq, PRECISION)
        _store_heads(dq_ptr, tokens, i < num_i, stride, h, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, rows_ptr, cu_queries_ptr, cu_keys_ptr, mask_ptr, seed_ptr, dy_ptr,
    logsum_ptr, delta_ptr, dk_ptr, dv_ptr,
    num_distances, max_keys, stride_q, stride_k, stride_v, stride, H, scale, drop_below, keep_factor,
    C2P: tl.constexpr, P2C: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv for BLOCK keys of a row and head."""
    first_j, h, n = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    first_query, first_key = tl.load(cu_queries_ptr + n), tl.load(cu_keys_ptr + n)
    num_i, num_j = tl.load(cu_queries_ptr + n + 1) - first_query, tl.load(cu_keys_ptr + n + 1) - first_key
    if first_j < num_j:
        j = first_j + tl.arange(0, BLOCK)
        real = _taking_part(j, num_j, first_key, mask_ptr, HAS_MASK)
        k = _heads(k_ptr, first_key + j, j < num_j, stride_k, h, D, BLOCK_D)
        v = _heads(v_ptr, first_key + j, j < num_j, stride_v, h, D, BLOCK_D)
        dk, dv = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for first_i in range(0, num_i, BLOCK):
            i = first_i + tl.arange(0, BLOCK)
            tokens = first_query + i
            q = _heads(q_ptr, tokens, i < num_i, stride_q, h, D, BLOCK_D)
            dy = _heads(dy_ptr, tokens, i < num_i, stride, h, D, BLOCK_D)
            logsum = tl.load(logsum_ptr + tokens * H + h, mask=i < num_i, other=float("inf"))
            delta = tl.load(delta_ptr + tokens * H + h, mask=i < num_i, other=0.0)
            first = first_i - first_j - (BLOCK - 1)
            scores = _scores(
                q, k, pk_ptr, pq_ptr, rows_ptr, first, num_distances, max_keys, stride, h,
                C2P, P2C, BLOCK, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            dropped, ds = _score_gradients(
                scores, real, logsum, delta, dy, v, seed_ptr, tokens * H + h, first_j, scale, drop_below, keep_factor,
                DROPOUT, BLOCK, PRECISION,
            )  # fmt: skip
            dv = _dot(tl.trans(dropped.to(q.dtype)), dy, dv, PRECISION)
            dk = _dot(tl.trans(ds.to(q.dtype)), q, dk, PRECISION)
            if P2C:
                band = _band(pq_ptr, rows_ptr, first, num_distances, max_keys, stride, h, BLOCK, D, BLOCK_D)
                dk = _dot(tl.trans(_by_key(ds, BLOCK).to(q.dtype)), band, dk, PRECISION)
        _store_heads(dk_ptr, first_key + j, j < num_j, stride, h, dk * scale, D, BLOCK_D)
        _store_heads(dv_ptr, first_key + j, j < num_j, stride, h, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def position_gradients_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, rows_ptr, cu_queries_ptr, cu_keys_ptr, mask_ptr, seed_ptr, dy_ptr,
    logsum_ptr, delta_ptr, part_ptr,
    num_distances, max_keys, stride_q, stride_k, stride_v, stride, H, scale, drop_below, keep_factor,
    num_rows, num_splits, num_diagonals, blocks_k,
    C2P: tl.constexpr, P2C: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes part[split, h, diagonal]: the gradient by the band of one diagonal of tiles, over every num_splits-th row.

    It is (2 BLOCK, D) for the position keys, then the same for the position queries, before the scale.
    """
    diagonal, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ahead = diagonal - (blocks_k - 1)  # tile index of the queries minus that of the keys
    first = ahead * BLOCK - (BLOCK - 1)
    dpk, dpq = tl.zeros((2 * BLOCK, BLOCK_D), tl.float32), tl.zeros((2 * BLOCK, BLOCK_D), tl.float32)
    for n in range(split, num_rows, num_splits):
        first_query, first_key = tl.load(cu_queries_ptr + n), tl.load(cu_keys_ptr + n)
        num_i, num_j = tl.load(cu_queries_ptr + n + 1) - first_query, tl.load(cu_keys_ptr + n + 1) - first_key
        last = tl.minimum(tl.cdiv(num_i, BLOCK), tl.cdiv(num_j, BLOCK) + ahead)
        for tile in range(tl.maximum(ahead, 0), last):
            i = tile * BLOCK + tl.arange(0, BLOCK)
            first_j = (tile - ahead) * BLOCK
            j = first_j + tl.arange(0, BLOCK)
            tokens = first_query + i
            real = _taking_part(j, num_j, first_key, mask_ptr, HAS_MASK)
            q = _heads(q_ptr, tokens, i < num_i, stride_q, h, D, BLOCK_D)
            k = _heads(k_ptr, first_key + j, j < num_j, stride_k, h, D, BLOCK_D)
            v = _heads(v_ptr, first_key + j, j < num_j, stride_v, h, D, BLOCK_D)
            dy = _heads(dy_ptr, tokens, i < num_i, stride, h, D, BLOCK_D)
            logsum = tl.load(logsum_ptr + tokens * H + h, mask=i < num_i, other=float("inf"))
            delta = tl.load(delta_ptr + tokens * H + h, mask=i < num_i, other=0.0)
            scores = _scores(
                q, k, pk_ptr, pq_ptr, rows_ptr, first, num_distances, max_keys, stride, h,
                C2P, P2C, BLOCK, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            _, ds = _score_gradients(
                scores, real, logsum, delta, dy, v, seed_ptr, tokens * H + h, first_j, scale, drop_below, keep_factor,
                DROPOUT, BLOCK, PRECISION,
            )  # fmt: skip
            if C2P:
                dpk = _dot(tl.trans(_by_query(ds, BLOCK).to(q.dtype)), q, dpk, PRECISION)
            if P2C:
                dpq = _dot(_by_key(ds, BLOCK).to(k.dtype), k, dpq, PRECISION)
    d, places = tl.arange(0, BLOCK_D), tl.arange(0, 2 * BLOCK)
    part = (split * H + h).to(tl.int64) * num_diagonals + diagonal
    part_ptrs = part_ptr + part * (4 * BLOCK * D) + places[:, None] * D + d[None, :]
    if C2P:
        tl.store(part_ptrs, dpk, mask=(d < D)[None, :])
    if P2C:
        tl.store(part_ptrs + 2 * BLOCK * D, dpq, mask=(d < D)[None, :])


@triton.jit(do_not_specialize=CHANGING)
def sum_positions_kernel(
    part_ptr, starts_ptr, dpk_ptr, dpq_ptr, max_keys, num_splits, num_diagonals, blocks_k, stride, H, scale,
    C2P: tl.constexpr, P2C: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one row and head of the tables: the sum of the parts of all distances that map to the row.

    A distance is in the bands of up to two diagonals.
    """
    row, h = tl.program_id(0), tl.program_id(1)
    d, splits = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
    dpk, dpq = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for place in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        shifted = place - (max_keys - 1) + blocks_k * BLOCK  # the distance plus a multiple of BLOCK, > 0
        for near in range(2):
            diagonal = shifted // BLOCK - 1 + near
            at = shifted % BLOCK + (BLOCK - 1) - near * BLOCK
            there = (at >= 0) & (diagonal >= 0) & (diagonal < num_diagonals) & (splits < num_splits)
            part = (splits.to(tl.int64) * H + h) * num_diagonals + diagonal
            part_ptrs = part_ptr + (part * (4 * BLOCK * D) + at * D)[:, None] + d[None, :]
            inside = there[:, None] & (d < D)[None, :]
            if C2P:
                dpk += tl.sum(tl.load(part_ptrs, mask=inside, other=0.0), 0)
            if P2C:
                dpq += tl.sum(tl.load(part_ptrs + 2 * BLOCK * D, mask=inside, other=0.0), 0)
    out = row.to(tl.int64) * stride + h * D + d
    if C2P:
        tl.store(dpk_ptr + out, (dpk * scale).to(dpk_ptr.dtype.element_ty), mask=d < D)
    if P2C:
        tl.store(dpq_ptr + out, (dpq * scale).to(dpq_ptr.dtype.element_ty), mask=d < D)
