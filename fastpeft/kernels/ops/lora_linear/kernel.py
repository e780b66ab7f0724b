"""The Triton kernels of lora_linear.

Forward and dx are one computation: out = x w + s l2 with s = scale x l1, where (x, w, l1, l2) is (x, W^T, A^T, B^T) in
forward and (dY, W, B, A) in backward. dA and dB take one launch over splits of the tokens and one that adds these up.

Decisions:
- s is computed in the main loop (INLINE), which costs R / BLOCK_N more multiplications but no second pass over x. Or
  skinny_kernel has computed it before, and s l2 extends the sum by R columns.
- Both skinny products include the scale, so that nothing else needs it.
- One Philox call decides on eight columns. In forward skinny_kernel applies dropout; in backward it applies to the
  update of dx.
- No atomics: sums over the tokens are split into partial sums, which one program adds up in a fixed order.

Arguments that change with the number of tokens are not specialised: a new batch size rarely recompiles a kernel.

Symbols: M rows (tokens), K columns of x, N columns of out, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def _dot(u, v, acc, PRECISION: tl.constexpr):
    if PRECISION == "ieee":  # the interpreter stores bf16 as integers and would multiply those
        return acc + tl.dot(u.to(tl.float32), v.to(tl.float32), input_precision=PRECISION)
    return tl.dot(u, v, acc, input_precision=PRECISION)


@triton.jit
def keep_columns(seed_ptr, rows_M, first_column, drop_below, BLOCK_N: tl.constexpr):
    """(rows, BLOCK_N), True where an element is kept: reference.philox_keep from `first_column`, a multiple of 8."""
    groups = (first_column // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    zero = groups * 0
    r0, r1, r2, r3 = tl.philox(  # pyright: ignore[reportGeneralTypeIssues] (compiled by Triton)
        tl.load(seed_ptr), rows_M[:, None], groups, zero, zero, n_rounds=PHILOX_ROUNDS
    )
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(rows_M.shape[0], BLOCK_N // 2)
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(rows_M.shape[0], BLOCK_N)
    return numbers.to(tl.int32) >= drop_below


@triton.jit(do_not_specialize=["num_rows"])
def keep_mask_kernel(
    out_ptr, seed_ptr, num_rows, num_columns, drop_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    keep = keep_columns(seed_ptr, rows, first, drop_below, BLOCK_N)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptrs, keep.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _factor(ptr, inner, rank, num_inner, R: tl.constexpr, R_INNER: tl.constexpr, EVEN: tl.constexpr):
    """A tile of A (R x inner) or, with R_INNER, of B (inner x R), zero beyond R and beyond num_inner.

    `inner` and `rank` are index tensors that broadcast to the tile. Their axes decide whether it is transposed.
    """
    ptrs = ptr + (inner.to(tl.int64) * R + rank if R_INNER else rank.to(tl.int64) * num_inner + inner)
    if EVEN:
        return tl.load(ptrs, mask=(rank < R) & (inner >= 0), other=0.0)
    return tl.load(ptrs, mask=(rank < R) & (inner < num_inner), other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def lora_matmul_kernel(
    x_ptr, w_ptr, bias_ptr, l1_ptr, l2_ptr, s_ptr, out_ptr, seed_ptr,
    num_rows, K, N, stride_x, stride_w, stride_s, scale, drop_below, keep_factor,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, FORWARD: tl.constexpr, W_K_INNER: tl.constexpr, INLINE: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x w + s l2 (+ bias), one BLOCK_M x BLOCK_N tile per program. With INLINE the programs of the first columns
    also write s."""
    tile = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * blocks_n)
    height = min(blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + (tile % (GROUP_M * blocks_n)) % height
    block_n = (tile % (GROUP_M * blocks_n)) // height

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(rows, num_rows - 1).to(tl.int64)  # rows beyond the last one are computed, never stored
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + inside[:, None] * stride_x + ks[None, :]
    if W_K_INNER:
        w_ptrs = w_ptr + columns.to(tl.int64)[None, :] * stride_w + ks[:, None]
    else:
        w_ptrs = w_ptr + ks.to(tl.int64)[:, None] * stride_w + columns[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=ks[None, :] < K - first, other=0.0)
        if EVEN_K and EVEN_N:
            w = tl.load(w_ptrs)
        elif EVEN_K:
            w = tl.load(w_ptrs, mask=columns[None, :] < N, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(ks[:, None] < K - first) & (columns[None, :] < N), other=0.0)
        acc = _dot(x, w, acc, PRECISION)
        if INLINE:
            l1 = _factor(l1_ptr, first + ks[:, None], ranks[None, :], K, R, not FORWARD, EVEN_K)
            s_acc = _dot(x, l1, s_acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K if W_K_INNER else BLOCK_K * stride_w

    if INLINE:
        s = (s_acc * scale).to(x_ptr.dtype.element_ty)
        if block_n == 0:
            s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * stride_s + ranks[None, :]
            tl.store(s_ptrs, s, mask=(rows < num_rows)[:, None] & (ranks < R)[None, :])
        l2 = _factor(l2_ptr, columns[None, :], ranks[:, None], N, R, FORWARD, EVEN_N)
        acc = _dot(s, l2, acc, PRECISION)
    else:
        update = acc if not DROPOUT else tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, R, BLOCK_R):
            s_ptrs = s_ptr + inside[:, None] * stride_s + first + ranks[None, :]
            s = tl.load(s_ptrs, mask=(first + ranks < R)[None, :], other=0.0)
            l2 = _factor(l2_ptr, columns[None, :], first + ranks[:, None], N, R, FORWARD, EVEN_N)
            update = _dot(s, l2, update, PRECISION)
        if DROPOUT:
            keep = keep_columns(seed_ptr, rows, block_n * BLOCK_N, drop_below, BLOCK_N)
            acc += tl.where(keep, update * keep_factor, 0.0)
        else:
            acc = update
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    if EVEN_N:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None])
    else:
        mask = (rows < num_rows)[:, None] & (columns < N)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_kernel(
    x_ptr, l1_ptr, s_ptr, seed_ptr, num_rows, K, stride_x, stride_s, scale, drop_below,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    FORWARD: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s = scale D(x) l1; `scale` includes the factor 1 / (1 - dropout)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(rows, num_rows - 1).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        x_ptrs = x_ptr + inside[:, None] * stride_x + first + ks[None, :]
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=ks[None, :] < K - first, other=0.0)
        if DROPOUT:
            x = tl.where(keep_columns(seed_ptr, rows, first, drop_below, BLOCK_K), x, 0.0)
        l1 = _factor(l1_ptr, first + ks[:, None], ranks[None, :], K, R, not FORWARD, EVEN_K)
        acc = _dot(x, l1, acc, PRECISION)
    s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * stride_s + ranks[None, :]
    s = (acc * scale).to(s_ptr.dtype.element_ty)
    tl.store(s_ptrs, s, mask=(rows < num_rows)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["num_rows", "rows_a_split"])
def factors_kernel(
    x_ptr, ds_ptr, dy_ptr, s_ptr, row_mask_ptr, seed_ptr, part_ptr, masked_ptr,
    num_rows, num_in, num_out, blocks_a, rows_a_split, stride_x, stride_ds, stride_dy, stride_s, drop_below,
    R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the tokens and BLOCK_F features: part[split] is D(x)^T dS (I x R), then dY^T s (O x R).

    The reduction applies 1 / (1 - dropout). `masked` is dY^T s over the rows in the mask only.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    start = split * rows_a_split
    end = min(start + rows_a_split, num_rows)
    if block < blocks_a:
        _features(
            x_ptr, ds_ptr, row_mask_ptr, seed_ptr, part_ptr, masked_ptr, block * BLOCK_F, split, start, end,
            num_in, 0, num_in + num_out, stride_x, stride_ds, drop_below,
            R, BLOCK_F, BLOCK_T, BLOCK_R, DROPOUT, False, PRECISION,
        )  # fmt: skip
    else:
        _features(
            dy_ptr, s_ptr, row_mask_ptr, seed_ptr, part_ptr, masked_ptr, (block - blocks_a) * BLOCK_F, split, start,
            end, num_out, num_in, num_in + num_out, stride_dy, stride_s, drop_below,
            R, BLOCK_F, BLOCK_T, BLOCK_R, False, HAS_MASK, PRECISION,
        )  # fmt: skip


@triton.jit
def _features(
    wide_ptr, skinny_ptr, row_mask_ptr, seed_ptr, part_ptr, masked_ptr, first, split, start, end,
    num_features, features_before, num_all, stride_wide, stride_skinny, drop_below,
    R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """wide^T skinny over the tokens from start to end."""
    features = first + tl.arange(0, BLOCK_F)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    acc_masked = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    for row in range(start, end, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        inside = (rows < end)[:, None]
        wide_ptrs = wide_ptr + rows.to(tl.int64)[:, None] * stride_wide + features[None, :]
        wide = tl.load(wide_ptrs, mask=inside & (features < num_features)[None, :], other=0.0)
        if DROPOUT:
            wide = tl.where(keep_columns(seed_ptr, rows, first, drop_below, BLOCK_F), wide, 0.0)
        skinny_ptrs = skinny_ptr + rows.to(tl.int64)[:, None] * stride_skinny + ranks[None, :]
        skinny = tl.load(skinny_ptrs, mask=inside & (ranks < R)[None, :], other=0.0)
        acc = _dot(tl.trans(wide), skinny, acc, PRECISION)
        if HAS_MASK:
            wanted = tl.load(row_mask_ptr + rows, mask=rows < end, other=0)
            chosen = tl.where((wanted != 0)[:, None], skinny, 0.0)
            acc_masked = _dot(tl.trans(wide), chosen, acc_masked, PRECISION)
    mask = (features < num_features)[:, None] & (ranks < R)[None, :]
    where = (split.to(tl.int64) * num_all + features_before) * R
    tl.store(part_ptr + where + features[:, None] * R + ranks[None, :], acc, mask=mask)
    if HAS_MASK:
        where = split.to(tl.int64) * num_features * R
        tl.store(masked_ptr + where + features[:, None] * R + ranks[None, :], acc_masked, mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def reduce_factors_kernel(
    part_ptr, masked_ptr, da_ptr, db_ptr, square_ptr, num_in, num_out, num_splits, blocks_a, blocks_b, keep_factor,
    R: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Adds the splits up: dA (R x I), dB (O x R), and per program the sums of squares of dB and of its masked part."""
    block = tl.program_id(0)
    splits = tl.arange(0, SPLITS)[:, None]
    if block < blocks_a:
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_in * R
        part_ptrs = part_ptr + splits.to(tl.int64) * (num_in + num_out) * R + at[None, :]
        part = tl.load(part_ptrs, mask=(splits < num_splits) & inside[None, :], other=0.0)
        total = tl.sum(part, axis=0) * keep_factor
        tl.store(da_ptr + (at % R) * num_in + at // R, total.to(da_ptr.dtype.element_ty), mask=inside)
    else:
        at = (block - blocks_a) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_out * R
        part_ptrs = part_ptr + (splits.to(tl.int64) * (num_in + num_out) + num_in) * R + at[None, :]
        part = tl.load(part_ptrs, mask=(splits < num_splits) & inside[None, :], other=0.0)
        total = tl.sum(part, axis=0)
        tl.store(db_ptr + at, total.to(db_ptr.dtype.element_ty), mask=inside)
        if MEASURE:
            tl.store(square_ptr + block - blocks_a, tl.sum(total * total))
        if HAS_MASK:
            masked_ptrs = masked_ptr + splits.to(tl.int64) * num_out * R + at[None, :]
            part = tl.load(masked_ptrs, mask=(splits < num_splits) & inside[None, :], other=0.0)
            total = tl.sum(part, axis=0)
            tl.store(square_ptr + blocks_b + block - blocks_a, tl.sum(total * total))
