"""How much memory a piece of work takes beside what is there already: counted, so that it is the same each time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(device: torch.device, work: Callable[[], object], by_tensors: bool = False) -> int:
    """The most that tensors made by `work` hold at once. On a GPU, unless it is to be told `by_tensors` there too, what
    its allocator gives out, which is a little more, and the device is waited for."""
    if device.type == "cuda" and not by_tensors:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Living() as living:
        work()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the memory of tensors from the operation that makes them to their end, in backward passes as well.

    What a kernel holds inside, without a tensor that an operation returns, is not seen: buffers of the size of a tile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), is_new=False)  # a view of what was there before is nothing new
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
