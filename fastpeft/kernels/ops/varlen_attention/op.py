"""varlen_attention: attention within rows of tokens that lie one behind another, without padding.

Three ways, by what each can do:

- on a GPU in half precision without dropout, torch.nn.attention.varlen, where this torch has it;
- on a GPU with dropout or in fp32, where every token sees its whole row, the kernel of disentangled_attention without
  tables of positions;
- else, and on a CPU, neighbours of one length together: no mask of padding, and never a matrix of all tokens.

Shape suffixes: N rows, T tokens of all rows, H heads, G heads of keys, D features of a head, L tokens of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from fastpeft.kernels.ops.attention.op import attention
from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.op import disentangled_attention, takes_triton
from fastpeft.kernels.sequences import Sequences

_WIDEST = 256
"""Features of a head that torch's varlen attention takes, in multiples of 8."""


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
        query: (T, H, D) in a floating dtype; (N, H, D) of each row's first token with `first_only`.
        key, value: (T, G, D) in its dtype; H is a multiple of G.
        sequences: where the rows lie.
        scale: of the scores.
        causal: a token sees itself and those before it.
        window: with `causal`, of these the last so many.
        first_only: only the first token of a row asks.
        dropout: probability in [0, 1) of a weight to be dropped; draws from torch's generator.

    Returns:
        In the shape of query, contiguous.

    Raises:
        ValueError: shapes that do not fit each other; a window without `causal`.
    """
    _check(query, key, value, sequences, causal, window, first_only)
    queries = sequences.firsts if first_only else sequences
    if window is not None and window >= sequences.longest:
        window = None
    theirs = _torch_varlen()
    if theirs is not None and not dropout and _suits_torch(query):
        return theirs(query, key, value, queries, sequences, scale, causal, window)
    if not causal and takes_triton(query) and query.shape[1] == key.shape[1]:
        distances = _distances(sequences.longest, query.device)
        cu_queries = queries.cu_seqlens if first_only else None
        return disentangled_attention(
            query,
            key,
            value,
            None,
            None,
            distances,
            scale,
            sequences.cu_seqlens,
            cu_queries=cu_queries,
            dropout=dropout,
        )
    return _by_runs(query, key, value, queries, sequences, scale, causal and not first_only, window, dropout)


def _check(query, key, value, sequences: Sequences, causal: bool, window: int | None, first_only: bool) -> None:
    asked = len(sequences.lengths) if first_only else sequences.num_tokens
    num_tokens, num_heads, width = key.shape
    wanted = {
        "query": query.shape[0] == asked and query.shape[2] == width and query.shape[1] % num_heads == 0,
        "key": num_tokens == sequences.num_tokens,
        "value": value.shape == key.shape,
        "dtypes": query.dtype == key.dtype == value.dtype,
        "window": window is None or (causal and window > 0),
    }
    wrong = [name for name, right in wanted.items() if not right]
    if wrong:
        raise ValueError(
            f"varlen_attention: {', '.join(wrong)}: query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, {len(sequences.lengths)} rows of {sequences.num_tokens} tokens, window {window}; "
            "expected (T, H, D) and (T, G, D), and a window above 0 where attention is causal"
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
        k_NLHD, v_NLHD = (_for_each_head(x, q_NQHD.shape[2]) for x in (k_NLGD, v_NLGD))
        bias = None
        if causal:
            seen = _seen(q_NQHD.shape[1], window, q_NQHD.device)
            bias = torch.zeros(seen.shape, dtype=q_NQHD.dtype, device=seen.device)
            bias = bias.masked_fill_(~seen, torch.finfo(q_NQHD.dtype).min)[None, None]
        return attention(q_NQHD, k_NLHD, v_NLHD, scale, bias, dropout=dropout)
    grouped = q_NQHD.shape[2] != k_NLGD.shape[2]
    if grouped and _shares_one_at_a_time(k_NLGD):
        k_NLGD, v_NLGD, grouped = *(_for_each_head(x, q_NQHD.shape[2]) for x in (k_NLGD, v_NLGD)), False
    mask = None if window is None else _seen(q_NQHD.shape[1], window, q_NQHD.device)
    y = nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_NQHD, k_NLGD, v_NLGD)),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return y.transpose(1, 2).contiguous()


def _shares_one_at_a_time(k_NLGD: torch.Tensor) -> bool:
    """Whether torch's backward on a CPU would have fewer groups of heads than threads, of which it gives each group
    one: for a single row whose heads share their keys it is slower on two threads than on one (bench/LOG.md)."""
    groups = k_NLGD.shape[0] * k_NLGD.shape[2]
    return k_NLGD.device.type == "cpu" and torch.is_grad_enabled() and groups < torch.get_num_threads()


def _for_each_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)


def _seen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(L, L) bool: which keys a query sees."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@cache  # for good: a captured graph reads from where it lies
def _distances(longest: int, device: torch.device) -> Distances:
    """Where no table is read, one row for all."""
    return Distances.of([0] * (2 * longest - 1), longest, device)


# ---- torch's own -------------------------------------------------------------------------------


def _suits_torch(query: torch.Tensor) -> bool:
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and is_half and query.shape[-1] <= _WIDEST and query.shape[-1] % 8 == 0


@cache
def _torch_varlen() -> Callable[..., torch.Tensor] | None:
    """torch's varlen attention, as this torch calls it; None where it has none with a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = set(inspect.signature(varlen_attn).parameters)
    if not {"scale", "window_size"} <= known:
        return None

    def attend(query, key, value, queries: Sequences, sequences: Sequences, scale, causal, window) -> torch.Tensor:
        more: dict[str, Any] = {"scale": scale}
        if causal and queries is sequences:
            more["window_size"] = (-1 if window is None else window - 1, 0)
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in known:
                more["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        longest = 1 if queries is not sequences else sequences.longest
        places = queries.cu_seqlens, sequences.cu_seqlens, longest, sequences.longest
        found = varlen_attn(query.contiguous(), key.contiguous(), value.contiguous(), *places, **more)
        assert isinstance(found, torch.Tensor), "a pair only where more is asked for"
        return found

    return attend
