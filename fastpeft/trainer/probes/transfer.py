"""Figures on their way from the device to the host, without a wait until somebody reads them."""

from __future__ import annotations

import numpy as np
import torch


class Transfer:
    """From a GPU all figures go in one copy, which nothing waits for until `wait`."""

    # Of a copy that is under way.
    _sizes: dict[str, torch.Size]
    _host: torch.Tensor
    _arrived: torch.cuda.Event

    def __init__(self, values: dict[str, np.ndarray] | None = None) -> None:
        """`values`: what has arrived already."""
        self._values = values

    @classmethod
    def launch(cls, tensors: dict[str, torch.Tensor]) -> Transfer:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if not next(iter(tensors.values())).is_cuda:
            return cls({name: tensor.to(torch.float64, copy=True).numpy() for name, tensor in tensors.items()})
        self = cls()
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        self._sizes = {name: tensor.shape for name, tensor in tensors.items()}
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._host.copy_(packed, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        return self

    def wait(self) -> dict[str, np.ndarray]:
        """By their names, in float64."""
        if self._values is None:
            self._arrived.synchronize()
            parts = self._host.double().split([size.numel() for size in self._sizes.values()])
            self._values = {name: part.view(size).numpy() for (name, size), part in zip(self._sizes.items(), parts)}
        return self._values
