"""Work of a training step, by what its operations compute and move, and ceilings of machines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
ATTENTION = "_scaled_dot_product"
FUNCTIONS = ("gelu", "silu", "exp", "tanh", "erf", "softmax", "log", "sigmoid", "rsqrt")
"""Parts of names of operations that count as functions."""
SLOW = ("softmax", "backward")
"""Parts of names of functions that evaluate more than one of FUNCTIONS per element."""
TINY, THIN, NARROW = 16, 64, 192
Step = Callable[[], object]


@dataclass
class Work:
    """Work of a step."""

    product_flops: float = 0.0
    tiny_flops: float = 0.0
    """FLOPs of products with a side of TINY or less, such as LoRA's, which no machine computes at full speed."""
    thin_flops: float = 0.0
    """FLOPs of products with a side above TINY, up to THIN."""
    narrow_flops: float = 0.0
    """FLOPs of products with a side above THIN, up to NARROW."""
    batched_flops: float = 0.0
    """FLOPs of batches of small products, as in attention."""
    attention_flops: float = 0.0
    function_elements: float = 0.0
    slow_elements: float = 0.0
    bytes: float = 0.0
    """Bytes of all operations except products, attention, copies and layer norms."""
    copied_bytes: float = 0.0
    norm_bytes: float = 0.0
    product_bytes: float = 0.0
    calls: float = 0.0

    def continued(self, deeper: Work, at: float) -> Work:
        """Linear extrapolation: at 0 this work, at 1 that of `deeper`."""
        pairs = ((getattr(self, one.name), getattr(deeper, one.name)) for one in fields(self))
        return Work(*(own + at * (other - own) for own, other in pairs))


@dataclass(frozen=True)
class Ceilings:
    product_flops_s: float
    tiny_flops_s: float
    thin_flops_s: float
    narrow_flops_s: float
    batched_flops_s: float
    attention_flops_s: float
    function_elements_s: float
    slow_elements_s: float
    bytes_s: float
    copied_bytes_s: float
    norm_bytes_s: float
    call_s: float = 0.0

    def parts(self, work: Work) -> dict[str, float]:
        """Part -> least seconds for `work`."""
        return {
            "products": max(
                work.product_flops / self.product_flops_s
                + work.tiny_flops / self.tiny_flops_s
                + work.thin_flops / self.thin_flops_s
                + work.narrow_flops / self.narrow_flops_s
                + work.batched_flops / self.batched_flops_s,
                work.product_bytes / self.bytes_s,
            ),
            "attention": work.attention_flops / self.attention_flops_s,
            "functions": work.function_elements / self.function_elements_s + work.slow_elements / self.slow_elements_s,
            "traffic": work.bytes / self.bytes_s
            + work.copied_bytes / self.copied_bytes_s
            + work.norm_bytes / self.norm_bytes_s,
            "calls": work.calls * self.call_s,
        }


GPUS = {
    name: Ceilings(*(6 * [flops_s]), *(2 * [math.inf]), *(3 * [bytes_s]))
    for name, flops_s, bytes_s in (("A100", 312e12, 2.04e12), ("H200", 989e12, 4.8e12))
}
"""Dense bf16 and memory bandwidth, from NVIDIA's data sheets of the SXM cards."""


class Counter(TorchDispatchMode):
    """Adds up the work of the operations in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.work.calls += 1
        if not func.is_view:
            self._add(func, args, kwargs or {}, out)
        return out

    def _add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        work, name, packet = self.work, str(func), func.overloadpacket
        tensors = {id(x): x for x in tree_iter((args, kwargs, out)) if isinstance(x, torch.Tensor)}.values()
        moved = sum(x.numel() * x.element_size() for x in tensors)
        if ATTENTION in name:
            work.attention_flops += _attention_flops(args, backward="backward" in name)
        elif packet == ATEN.addmm_ or packet in flop_registry:
            flops = (
                2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
                if packet == ATEN.addmm_
                else flop_registry[packet](*args, **kwargs, out_val=out)
            )
            side = min(min(x.shape[-2:]) for x in tensors if x.ndim > 1)
            if packet == ATEN.bmm:
                work.batched_flops += flops
            elif side <= TINY:
                work.tiny_flops += flops
            elif side <= THIN:
                work.thin_flops += flops
            elif side <= NARROW:
                work.narrow_flops += flops
            else:
                work.product_flops += flops
            work.product_bytes += moved
        elif any(part in name for part in FUNCTIONS):
            elements = max(x.numel() for x in tensors)
            if any(part in name for part in SLOW):
                work.slow_elements += elements
            else:
                work.function_elements += elements
        elif "layer_norm" in name:
            work.norm_bytes += moved
        elif name.startswith(("aten.copy_", "aten.clone")):
            work.copied_bytes += moved
        elif not name.startswith(("aten.empty", "aten.detach", "aten.new_empty")):
            work.bytes += moved


def _attention_flops(args: Any, backward: bool) -> float:
    query, key = args[1:3] if backward else args[:2]
    rows, heads, length, width = query.shape
    return (10 if backward else 4) * rows * heads * length * key.shape[2] * width


def count(step: Step) -> Work:
    with Counter() as counter:
        step()
    return counter.work
