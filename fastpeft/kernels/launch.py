"""Starting Triton kernels, and counting that they were started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES: Counter[str] = Counter()
"""How often this process has launched each Triton kernel, by the kernel's name."""


def refuse_second_order(operation: str) -> None:
    """For a backward of closed form, which create_graph=True would silently differentiate to nothing. RuntimeError."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operation}: its gradient cannot be differentiated again (create_graph=True); compute with plain "
            "PyTorch what needs that, a model outside of accelerate()"
        )


def launch(kernel: Any, grid: tuple[int, ...] | Callable[[dict], tuple[int, ...]], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the device of the first tensor among `args`."""
    LAUNCHES[kernel.__name__] += 1
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
