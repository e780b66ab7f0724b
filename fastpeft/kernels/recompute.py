"""Activations that cost little are not kept for backward: what they were made of is, and they are made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Source(NamedTuple):
    """How a tensor was made."""

    make: Callable[..., torch.Tensor]
    """Of `tensors`, the same values and shape. Under no_grad."""
    tensors: tuple[torch.Tensor, ...]
    version: int
    """Of the tensor that was made; a later one holds something else."""


def made_of(y: torch.Tensor, make: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Note on `y` that make(*tensors) gives it again. For `tensors` that backward keeps anyway."""
    y._fastpeft_source = Source(make, tensors, y._version)  # type: ignore[attr-defined]
    return y


def source_of(y: torch.Tensor) -> Source | None:
    """What was noted on this very tensor, if it is still true."""
    source = getattr(y, "_fastpeft_source", None)
    return source if source is not None and source.version == y._version else None
