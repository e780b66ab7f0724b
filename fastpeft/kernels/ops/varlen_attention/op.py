"""varlen_attention: attention within each of several packed rows of tokens, without padding.

`choose_way` takes the first implementation that supports the call:

- on a GPU torch.nn.attention.varlen: half precision without dropout;
- on a GPU, for bidirectional attention, the kernel of disentangled_attention without position tables: dropout and
  fp32;
- on a GPU FlexAttention: decoders in fp32, and head sizes that FlashAttention does not support;
- where the host knows the lengths, one call per run of neighbouring rows of equal length: no padding mask, and never a
  T x T matrix. On a CPU it is the only one;
- in a captured step, whose replays have other lengths, one call over all tokens with a mask.

Shape suffixes: N rows, T tokens of all rows, H heads, G heads of keys, D features of a head, L tokens of a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.kernels.ops.attention.op import attention
from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.op import WIDEST, disentangled_attention, takes_triton
from fastpeft.kernels.ops.varlen_attention import torch_attention
from fastpeft.kernels.ops.varlen_attention.masked import bias_of, by_mask, for_each_head
from fastpeft.kernels.ops.varlen_attention.torch_attention import flex_fault, varlen_fault
from fastpeft.kernels.sequences import Sequences

VARLEN, FLEX = "torch.nn.attention.varlen", "FlexAttention"
KERNEL, RUNS, MASK = "fastpeft's kernel", "rows of one length at a time", "all tokens under a mask"


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scale: float,
    *,
    causal: bool = False,
    window: int | None = None,
    first_only: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """D(softmax(scale Q K^T)) V in each row (arXiv:1706.03762, eq. 1).

    Args:
        query: (T, H, D) in a floating dtype; with `first_only` (N, H, D), the first token of each row.
        key, value: (T, G, D) in the dtype of query; H is a multiple of G.
        sequences: offsets of the rows.
        scale: factor on the scores.
        causal: a token attends to itself and to the tokens before it.
        window: with `causal`, the number of most recent tokens, itself included, that a token attends to.
        first_only: only the first token of a row is a query; it attends to the whole row.
        dropout: probability in [0, 1) that a weight is dropped; draws from torch's generator.

    Returns:
        In the shape of query, contiguous.

    Raises:
        ValueError: shapes that do not fit each other; a window without `causal`; `causal` with `first_only`.
    """
    _check(query, key, value, sequences, causal, window, first_only)
    if window is not None and window >= sequences.longest:
        window = None
    way = choose_way(query, key.shape[1], causal, dropout, knows_lengths=sequences.lengths is not None).name
    asked: dict[str, Any] = {"causal": causal, "window": window, "first_only": first_only}
    if way == VARLEN:
        return torch_attention.varlen(query, key, value, sequences, scale, **asked)
    if way == KERNEL:
        return disentangled_attention(
            query,
            key,
            value,
            None,
            None,
            _distances(sequences.longest, query.device),
            scale,
            sequences.cu_seqlens,
            cu_queries=sequences.firsts.cu_seqlens if first_only else None,
            dropout=dropout,
        )
    if way == FLEX:
        return torch_attention.flex(query, key, value, sequences, scale, **asked)
    if way == RUNS:
        queries = sequences.firsts if first_only else sequences
        return _by_runs(query, key, value, queries, sequences, scale, causal, window, dropout)
    return by_mask(query, key, value, sequences, scale, **asked, dropout=dropout)


class Way(NamedTuple):
    """The implementation that computes a call."""

    name: str
    """VARLEN, KERNEL, FLEX, RUNS or MASK."""
    why: str
    """Why each implementation before this one was refused. Empty on a CPU and where the first one was taken."""


def choose_way(
    query: torch.Tensor, num_key_heads: int, causal: bool, dropout: float, *, knows_lengths: bool = True
) -> Way:
    """The first implementation that supports the call.

    Args:
        query: (any, H, D); only its device, dtype, H and D are read.
        knows_lengths: whether the host knows the lengths of the rows. In a captured step it does not.
    """
    fault = varlen_fault(query, dropout)
    if fault is None:
        return Way(VARLEN, "")
    why = f"{VARLEN}: {fault}"
    if not causal and takes_triton(query) and query.shape[1] == num_key_heads:
        return Way(KERNEL, why if query.is_cuda else "")
    if query.is_cuda:
        theirs = "decoders are none of its" if causal else f"it takes heads of up to {WIDEST} features, not in fp64"
        why += f"; {KERNEL}: {theirs}"
        fault = flex_fault(query, num_key_heads, dropout)
        if fault is None:
            return Way(FLEX, why)
    last = RUNS if knows_lengths else MASK
    return Way(last, f"{why}; {FLEX}: {fault}" if query.is_cuda else "")


def _check(query, key, value, sequences: Sequences, causal: bool, window: int | None, first_only: bool) -> None:
    asked = sequences.num_rows if first_only else sequences.num_tokens
    num_tokens, num_heads, width = key.shape
    wanted = {
        "query": query.shape[0] == asked and query.shape[2] == width and query.shape[1] % num_heads == 0,
        "key": num_tokens == sequences.num_tokens,
        "value": value.shape == key.shape,
        "dtypes": query.dtype == key.dtype == value.dtype,
        "window": window is None or (causal and window > 0),
        "first_only": not (first_only and causal),
    }
    wrong = [name for name, right in wanted.items() if not right]
    if wrong:
        raise ValueError(
            f"varlen_attention: {', '.join(wrong)}: query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, {sequences.num_rows} rows of {sequences.num_tokens} tokens, window {window}; "
            "expected (T, H, D) and (T, G, D), a window above 0 where attention is causal, and no first_only there"
        )


# ---- rows of one length at a time --------------------------------------------------------------


def _by_runs(query, key, value, queries, sequences, scale, causal, window, dropout) -> torch.Tensor:
    runs, asked = sequences.runs, 1 if queries is not sequences else None
    sizes = [rows * length for rows, length in runs]
    parts = zip(
        query.split([rows * (asked or length) for rows, length in runs]), key.split(sizes), value.split(sizes), runs
    )
    found = []
    for q, k, v, (rows, length) in parts:
        q_NQHD, k_NLGD, v_NLGD = (x.view(rows, -1, *x.shape[1:]) for x in (q, k, v))
        narrower = window is not None and window < length
        y = _attend(q_NQHD, k_NLGD, v_NLGD, scale, causal, window if narrower else None, dropout)
        found.append(y.flatten(0, 1))
    return found[0] if len(found) == 1 else torch.cat(found)


def _attend(q_NQHD, k_NLGD, v_NLGD, scale, causal: bool, window: int | None, dropout: float) -> torch.Tensor:
    """(N, Q, H, D), contiguous."""
    if dropout:
        k_NLHD, v_NLHD = (for_each_head(x, q_NQHD.shape[2]) for x in (k_NLGD, v_NLGD))
        bias = None
        if causal:
            bias = bias_of(_seen(q_NQHD.shape[1], window, q_NQHD.device), q_NQHD.dtype)
        return attention(q_NQHD, k_NLHD, v_NLHD, scale, bias, dropout=dropout)
    grouped = q_NQHD.shape[2] != k_NLGD.shape[2]
    mask = None if window is None else _seen(q_NQHD.shape[1], window, q_NQHD.device)
    y = nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_NQHD, k_NLGD, v_NLGD)),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return y.transpose(1, 2).contiguous()


def _seen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(L, L) bool: the keys that each query attends to."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@cache  # never freed: a captured graph reads from its address
def _distances(longest: int, device: torch.device) -> Distances:
    """All distances map to row 0, because without a position table no row is read."""
    return Distances.of([0] * (2 * longest - 1), longest, device)
