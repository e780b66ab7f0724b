"""Recomputation in backward of activations that are cheap to compute, from tensors that are saved anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Source(NamedTuple):
    """How to recompute a tensor."""

    make: Callable[..., torch.Tensor]
    """Called with `tensors` under no_grad; returns the same values in the same shape."""
    tensors: tuple[torch.Tensor, ...]
    version: int
    """Version counter of the tensor when it was made. A later version means that it was changed in place."""


def made_of(y: torch.Tensor, make: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Record on `y` that make(*tensors) recomputes it. `tensors` should be saved for backward anyway."""
    y._fastpeft_source = Source(make, tensors, y._version)  # type: ignore[attr-defined]
    return y


def source_of(y: torch.Tensor) -> Source | None:
    """The source recorded on this tensor object; None if there is none, or if y was changed in place since."""
    source = getattr(y, "_fastpeft_source", None)
    return source if source is not None and source.version == y._version else None
