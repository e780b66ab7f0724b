"""Triton kernels of gradient_norm: one partial result of ||G^T X||_F per tile, reduced by the caller in a fixed order.

A weight may have two uses in a forward pass, (X, G) and (X2, G2), with T and T2 rows. A single use is passed twice,
with T2 = 0. Rows are contiguous: X (T, I), G (T, O).

Shape suffixes: T tokens, I in, O out; in a tile M and N tokens, K features.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "ieee":  # the interpreter stores bf16 as integers and would multiply those
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product(
    acc_OI, x_ptr, g_ptr, num_rows, num_in, num_out, o_O, i_I,
    EVEN: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + G^T X for one tile of columns of G and of X, over all rows."""
    t_T = tl.arange(0, BLOCK_T)
    x_ptrs = x_ptr + t_T[:, None].to(tl.int64) * num_in + i_I[None, :]
    g_ptrs = g_ptr + t_T[:, None].to(tl.int64) * num_out + o_O[None, :]
    for start in range(0, num_rows, BLOCK_T):
        there_T1 = (t_T < num_rows - start)[:, None]
        if EVEN:
            x_TI = tl.load(x_ptrs, mask=there_T1, other=0.0)
            g_TO = tl.load(g_ptrs, mask=there_T1, other=0.0)
        else:
            x_TI = tl.load(x_ptrs, mask=there_T1 & (i_I < num_in)[None, :], other=0.0)
            g_TO = tl.load(g_ptrs, mask=there_T1 & (o_O < num_out)[None, :], other=0.0)
        acc_OI = _dot(tl.trans(g_TO), x_TI, acc_OI, PRECISION)
        x_ptrs += BLOCK_T * num_in
        g_ptrs += BLOCK_T * num_out
    return acc_OI


@triton.jit(do_not_specialize=["num_rows", "num_rows2"])
def gradient_norm_direct(
    # tensors
    x_ptr, g_ptr, x2_ptr, g2_ptr, partial_ptr,
    # shapes
    num_rows, num_rows2, num_in, num_out,
    # tiles; EVEN: I and O are multiples of BLOCK_I and BLOCK_O
    EVEN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the norm of one BLOCK_O x BLOCK_I tile of G^T X + G2^T X2; the tile itself is never stored."""
    tile = tl.program_id(0)
    num_tiles_in = tl.cdiv(num_in, BLOCK_I)
    o_O = (tile // num_tiles_in) * BLOCK_O + tl.arange(0, BLOCK_O)
    i_I = (tile % num_tiles_in) * BLOCK_I + tl.arange(0, BLOCK_I)
    acc_OI = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    acc_OI = _product(acc_OI, x_ptr, g_ptr, num_rows, num_in, num_out, o_O, i_I, EVEN, BLOCK_T, PRECISION)
    acc_OI = _product(acc_OI, x2_ptr, g2_ptr, num_rows2, num_in, num_out, o_O, i_I, EVEN, BLOCK_T, PRECISION)
    tl.store(partial_ptr + tile, tl.sqrt(tl.sum(acc_OI * acc_OI)))


@triton.jit
def _gram(
    a_ptr, b_ptr, rows_a, rows_b, num_features,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A B^T of two blocks of rows, of which the first rows_a and rows_b exist."""
    m_M, k_K = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m_M[:, None] * num_features + k_K[None, :]
    b_ptrs = b_ptr + m_M[:, None] * num_features + k_K[None, :]
    there_a, there_b = (m_M < rows_a)[:, None], (m_M < rows_b)[:, None]
    acc_MN = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, num_features, BLOCK_K):
        if EVEN:
            a_MK = tl.load(a_ptrs, mask=there_a, other=0.0)
            b_NK = tl.load(b_ptrs, mask=there_b, other=0.0)
        else:
            inside = (k_K < num_features - start)[None, :]
            a_MK = tl.load(a_ptrs, mask=there_a & inside, other=0.0)
            b_NK = tl.load(b_ptrs, mask=there_b & inside, other=0.0)
        acc_MN = _dot(a_MK, tl.trans(b_NK), acc_MN, PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return acc_MN


@triton.jit(do_not_specialize=["num_rows", "num_rows2"])
def gradient_norm_gram(
    # tensors
    x_ptr, g_ptr, x2_ptr, g2_ptr, partial_ptr,
    # shapes
    num_rows, num_rows2, num_in, num_out,
    # tiles; EVEN: I and O are multiples of BLOCK_K
    EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the sum of one BLOCK x BLOCK tile of (X X^T) o (G G^T). Only the lower triangle of tiles is computed, and
    its tiles off the diagonal count twice."""
    tile = tl.program_id(0)
    a = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    a -= (a * (a + 1) // 2 > tile).to(tl.int32)  # the root may round to either side
    a += ((a + 1) * (a + 2) // 2 <= tile).to(tl.int32)
    b = tile - a * (a + 1) // 2
    # Blocks of the first use, then of the second.
    first = tl.cdiv(num_rows, BLOCK)
    row_a = tl.where(a < first, a, a - first).to(tl.int64) * BLOCK
    row_b = tl.where(b < first, b, b - first).to(tl.int64) * BLOCK
    rows_a = tl.where(a < first, num_rows, num_rows2) - row_a
    rows_b = tl.where(b < first, num_rows, num_rows2) - row_b
    x_MN = _gram(
        tl.where(a < first, x_ptr, x2_ptr) + row_a * num_in, tl.where(b < first, x_ptr, x2_ptr) + row_b * num_in,
        rows_a, rows_b, num_in, EVEN, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip
    g_MN = _gram(
        tl.where(a < first, g_ptr, g2_ptr) + row_a * num_out, tl.where(b < first, g_ptr, g2_ptr) + row_b * num_out,
        rows_a, rows_b, num_out, EVEN, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip
    tl.store(partial_ptr + tile, tl.sum(x_MN * g_MN) * tl.where(a == b, 1.0, 2.0))
