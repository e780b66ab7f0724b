"""Launches Triton kernels and counts the launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES: Counter[str] = Counter()
"""Number of launches of each Triton kernel in this process, by the kernel's name."""


def refuse_second_order(operation: str) -> None:
    """Raise RuntimeError in a closed-form backward under create_graph=True, whose second derivative would silently be
    missing."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operation}: its gradient cannot be differentiated again (create_graph=True); compute with plain "
            "PyTorch what needs that, a model outside of accelerate()"
        )


def launch(kernel: Any, grid: tuple[int, ...] | Callable[[dict], tuple[int, ...]], *args: Any, **meta: Any) -> None:
    """Launch kernel[grid](*args, **meta) on the device of the first tensor in `args`."""
    LAUNCHES[kernel.__name__] += 1
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
