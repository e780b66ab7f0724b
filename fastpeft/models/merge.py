"""Temporary merge of adapted layers into W + s B A, as for decoding, which is undone exactly.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import psutil
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fastpeft.device_memory import is_out_of_memory
from fastpeft.kernels.ops.lora_linear.op import DTYPES
from fastpeft.models.layers import active_adapter, has_hooks, is_bare, is_fused
from fastpeft.models.sharded_base import is_sharded

_HOST = torch.device("cpu")
_SHARE_OF_FREE = 0.5
"""Share of the free memory for copies of weights; the rest is left for the cache and the activations."""


@dataclass
class Merged:
    """Which layers `merged` has merged."""

    num_merged: int = 0
    num_on_host: int = 0
    """Number of merged layers that were overwritten in place, with their own weight saved in CPU memory."""
    kept: dict[str, str] = field(default_factory=dict)
    """LoRA layers that were not merged: name and reason."""


@contextmanager
def merged(model: nn.Module) -> Iterator[Merged]:
    """Context in which each LoRA layer over a dense weight is an nn.Linear of W + s B A.

    The sum is computed in fp32 and rounded once to W's dtype. The adapted layers, W and the factors are not changed:
    the same modules return at the end of the block or on an exception. Only if the device has no memory for a second
    weight, W is copied to CPU memory, overwritten, and copied back at the end, bit for bit.

    A layer is left unmerged if its base is in 4 bits or sharded over ranks, if it is disabled, already merged, a LoRA
    variant or has hooks, if several adapters are active, or if there is no memory for it. `model` itself must not be
    such a LoRA layer.
    """
    done, memory = Merged(), _Memory()
    sharing = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    layers: list[tuple[str, Any]] = [
        (n, module) for n, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    with ExitStack() as undo:
        for path, layer in layers:
            factors = _factors(layer)
            if isinstance(factors, str):
                done.kept[path] = factors
                continue
            weight = layer.base_layer.weight
            on_host = not memory.fits(weight, weight.device)
            if on_host and (sharing[weight.data_ptr()] > 1 or not memory.fits(weight, _HOST)):
                done.kept[path] = "there is no memory for a second weight"
                continue
            try:
                plain = _merge(layer.base_layer, factors, undo if on_host else None)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                done.kept[path] = "there was no memory to merge it"
                continue
            above, _, name = path.rpartition(".")
            modules = model.get_submodule(above)._modules
            undo.callback(modules.__setitem__, name, layer)
            modules[name] = plain
            done.num_merged += 1
            done.num_on_host += on_host
        yield done


class _Memory:
    """The memory left for copies of weights on each device."""

    def __init__(self) -> None:
        self._left: dict[torch.device, float] = {}

    def fits(self, weight: torch.Tensor, device: torch.device) -> bool:
        """Whether a copy of `weight` fits on the device; if so, it is counted."""
        left = self._left.setdefault(device, _SHARE_OF_FREE * free_bytes(device))
        size = weight.numel() * weight.element_size()
        if size > left:
            return False
        self._left[device] = left - size
        return True


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


@torch.no_grad()
def _merge(base: nn.Linear, factors: tuple[torch.Tensor, torch.Tensor, float], undo: ExitStack | None) -> nn.Linear:
    """A layer with the merged weight. With `undo` it overwrites `base`'s weight, and registers how to restore it."""
    lora_a, lora_b, scale = factors
    weight = base.weight.data
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        total = torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scale)
    if undo is None:
        merged_weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
    else:
        original = torch.empty_like(weight, device=_HOST, pin_memory=weight.is_cuda).copy_(weight)
        undo.callback(weight.copy_, original)
        weight.copy_(total)
        merged_weight = base.weight
    plain = copy.copy(base)
    plain._parameters = {**base._parameters, "weight": cast("nn.Parameter", merged_weight)}
    return plain


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | str:
    """A (R x I), B (O x R) and s; or why the layer cannot be merged."""
    base = layer.base_layer
    if is_sharded(getattr(base, "weight", None)):
        return "its weight is shared out over the ranks"
    if not is_bare(base, nn.Linear) or type(base.weight) is not nn.Parameter or base.weight.dtype not in DTYPES:
        return f"the base layer is {type(base).__name__}, not a plain nn.Linear"
    if not is_fused(layer):
        return f"the layer is {type(layer).__name__}"
    if has_hooks(layer) or getattr(layer, "probe", None) is not None:
        return "the layer has hooks"
    name = active_adapter(layer)
    if name is None:
        return "it has not one active adapter"
    return layer.factors(name) or "its adapter is not plain LoRA"
