"""Transfer of measurements from the device to the host, without a wait until they are read."""

from __future__ import annotations

import numpy as np
import torch


class Transfer:
    """One asynchronous copy of all values from a GPU, which only `wait` waits for."""

    # State of a copy in progress.
    _sizes: dict[str, torch.Size]
    _host: torch.Tensor
    _arrived: torch.cuda.Event

    def __init__(self, values: dict[str, np.ndarray] | None = None) -> None:
        """`values`: values that are on the host already."""
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
        """The values by name, in float64."""
        if self._values is None:
            self._arrived.synchronize()
            parts = self._host.double().split([size.numel() for size in self._sizes.values()])
            self._values = {name: part.view(size).numpy() for (name, size), part in zip(self._sizes.items(), parts)}
        return self._values
