"""Peak memory of a piece of work, beyond what was allocated before it. It is counted, so it is reproducible."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(device: torch.device, work: Callable[[], object], by_tensors: bool = False) -> int:
    """The most bytes that tensors made by `work` hold at once.

    Args:
        by_tensors: count tensors on a GPU too. Otherwise a GPU's figure is its allocator's, which is a little larger.
    """
    if device.type == "cuda" and not by_tensors:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Living() as living:
        work()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the memory of tensors from the operation that makes them until they are freed, backward passes included.

    Scratch memory inside a kernel, such as buffers of the size of a tile, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), is_new=False)  # a view of an earlier tensor adds no memory
        out = func(*args, **(kwargs or {}))
        self._note(out, is_new=True)
        return out

    def _note(self, values: Any, is_new: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if is_new else 0
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._end(key, size))
                self._now += size
                self.peak = max(self.peak, self._now)

    def _end(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self._now -= size
