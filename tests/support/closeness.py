"""How far a result is from what it should be, and how much memory it took."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance in fp64; NaN anywhere makes it NaN, which no bound passes."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made; views are none."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out
