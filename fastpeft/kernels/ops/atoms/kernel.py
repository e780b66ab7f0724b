"""Triton kernels of route_atoms and gather_atoms.

All tensors are fp32 and contiguous, index int64. A program of `route_kernel` holds the logits of BLOCK_T tokens over
all atoms, and takes their maximum TOP_K times. Products are in full fp32, not TF32: the order of the logits can depend
on their last bits, and the products are small.

Shape suffixes: T tokens, M atoms, Q width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    # tensors
    z_ptr, v_ptr, slope_ptr, bias_ptr, s_ptr, logit_ptr, index_ptr,
    # shapes
    num_tokens, num_atoms, width,
    # tiles
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """s, logit and index, (T, TOP_K) each, of the atoms with the largest logit = slope s + bias, s = <z, v>.

    Logits descend within a row; among equal ones the atom with the lowest index comes first.
    """
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_M, q_Q = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_Q)
    there_T, there_M, there_Q = t_T < num_tokens, m_M < num_atoms, q_Q < width
    z_TQ = tl.load(z_ptr + t_T[:, None] * width + q_Q[None, :], mask=there_T[:, None] & there_Q[None, :], other=0.0)
    v_MQ = tl.load(v_ptr + m_M[:, None] * width + q_Q[None, :], mask=there_M[:, None] & there_Q[None, :], other=0.0)
    slope_M = tl.load(slope_ptr + m_M, mask=there_M, other=0.0)
    bias_M = tl.load(bias_ptr + m_M, mask=there_M, other=0.0)
    s_TM = tl.dot(z_TQ, tl.trans(v_MQ), input_precision="ieee")
    left_TM = tl.where(there_M[None, :], s_TM * slope_M[None, :] + bias_M[None, :], float("-inf"))
    for k in range(TOP_K):
        logit_T = tl.max(left_TM, axis=1)
        best_T = tl.min(tl.where(left_TM == logit_T[:, None], m_M[None, :], BLOCK_M), axis=1)
        is_best_TM = m_M[None, :] == best_T[:, None]
        place_T = t_T * TOP_K + k
        tl.store(s_ptr + place_T, tl.sum(tl.where(is_best_TM, s_TM, 0.0), axis=1), mask=there_T)
        tl.store(logit_ptr + place_T, logit_T, mask=there_T)
        found_T = tl.minimum(best_T, num_atoms - 1)  # a NaN logit equals nothing: keep the index valid
        tl.store(index_ptr + place_T, found_T.to(tl.int64), mask=there_T)
        left_TM = tl.where(is_best_TM, float("-inf"), left_TM)


@triton.jit(do_not_specialize=["num_tokens"])
def gather_kernel(
    # tensors
    c_ptr, index_ptr, u_ptr, y_ptr,
    # shapes
    num_tokens, width,
    # tiles
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """y = sum_k c_k u[index_k], (T, Q)."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    q_Q = tl.arange(0, BLOCK_Q)
    there_T, there_Q = t_T < num_tokens, q_Q < width
    acc_TQ = tl.zeros((BLOCK_T, BLOCK_Q), dtype=tl.float32)
    for k in range(TOP_K):
        c_T = tl.load(c_ptr + t_T * TOP_K + k, mask=there_T, other=0.0)
        atom_T = tl.load(index_ptr + t_T * TOP_K + k, mask=there_T, other=0)
        there_TQ = there_T[:, None] & there_Q[None, :]
        acc_TQ += c_T[:, None] * tl.load(u_ptr + atom_T[:, None] * width + q_Q[None, :], mask=there_TQ, other=0.0)
    tl.store(y_ptr + t_T[:, None] * width + q_Q[None, :], acc_TQ, mask=there_T[:, None] & there_Q[None, :])
