"""Packing of several rows into one, kept apart by positions that restart with each: less padding, the same targets.

transformers makes a mask of such positions for most decoders. Some ignore them, and then a row sees its neighbour, in
silence: whether this model does is tried.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fastpeft.data.tokenise import Ragged
from fastpeft.device_memory import is_out_of_memory
from fastpeft.errors import first_line
from fastpeft.models.backbone import Backbone
from fastpeft.models.lm_head import hidden_states
from fastpeft.tasks.chat.chat_rows import ChatRows
from fastpeft.tasks.self_check import apart, longest_row, spread_rows, tolerance, trying


def pack(rows: ChatRows, backbone: Backbone) -> tuple[ChatRows, str]:
    """(the rows packed, or as they are where the model would let them leak; what to tell the user)."""
    fault = leak(rows, backbone)
    if fault is not None:
        kind = type(backbone.model).__name__
        return rows, f"dataset.packing: {kind} does not keep packed rows apart ({fault}): they are trained unpacked"
    found = packed(rows)
    return found, f"packed: {len(rows):,} rows into {len(found):,} of {rows.max_length:,} tokens at most"


def packed(rows: ChatRows) -> ChatRows:
    """The same rows, as many to a row of `max_length` tokens as fit. A row is of its first conversation."""
    members = _bins(rows.lengths, rows.max_length)
    order = np.concatenate(members)
    tokens = Ragged.of(_part(rows.tokens, rows, order[i]) for i in range(len(order)))
    ends = np.cumsum([len(own) for own in members])
    lengths = rows.lengths[order]
    return replace(
        rows,
        tokens=tokens.flat,
        offsets=tokens.offsets[np.concatenate([[0], ends])],
        is_labelled=np.concatenate([_part(rows.is_labelled, rows, row) for row in order]),
        sources=rows.sources[[int(own[0]) for own in members]],
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
    )


def _part(flat: np.ndarray, rows: ChatRows, row: int) -> np.ndarray:
    return flat[rows.offsets[row] : rows.offsets[row + 1]]


def _bins(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Which rows share one: the longest first, each where the least room is left (best fit decreasing)."""
    members: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is left, which), sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            members.append([])
            room, which = capacity, len(members) - 1
        else:
            room, which = rooms.pop(at)
        members[which].append(row)
        insort(rooms, (room - length, which))
    return [np.array(sorted(own), dtype=np.int64) for own in members]


def leak(rows: ChatRows, backbone: Backbone) -> str | None:
    """What is wrong where a row stands behind another, in words; None where its logits are those that it has alone."""
    model = backbone.model
    some = [_part(rows.tokens, rows, row)[: longest_row(model)].tolist() for row in spread_rows(model, rows.lengths)]
    first, *others = (own for own in some if len(own) > 1)
    try:
        with trying(model):
            largest = max(_difference(model, first, own) for own in others or [first])
    except Exception as error:  # models refuse what they cannot take in ways of their own
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    return None if largest <= tolerance(backbone) else f"its logits differ by {largest:.2g} of their size"


def _difference(model: nn.Module, neighbour: list[int], own: list[int]) -> float:
    """Of the last token's logits, as training has them, behind a neighbour and alone."""
    device = next(model.parameters()).device
    positions = torch.tensor([[*range(len(neighbour)), *range(len(own))]], device=device)
    last = torch.tensor([len(neighbour) + len(own) - 1], device=device)
    behind_1D, weight, bias = hidden_states(model, torch.tensor([neighbour + own], device=device), last, positions)
    alone_1D, _, _ = hidden_states(
        model, torch.tensor([own], device=device), torch.tensor([len(own) - 1], device=device)
    )
    logits = (nn.functional.linear(hidden.to(weight.dtype), weight, bias) for hidden in (behind_1D, alone_1D))
    return apart(*(found - found.mean(-1, keepdim=True) for found in logits))
