"""Starting Triton kernels, and counting that they were started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES: Counter[str] = Counter()
"""How often this process has launched each Triton kernel, by the kernel's name."""


def launch(kernel: Any, grid: tuple[int, ...] | Callable[[dict], tuple[int, ...]], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the device of the first tensor among `args`."""
    LAUNCHES[kernel.__name__] += 1
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
