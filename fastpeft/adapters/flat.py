"""All trainable parameters in one buffer and their gradients in another; modules hold views.

Clipping, penalty, moments and checkpoints then work on a few tensors. LoRA matrices of one shape
lie side by side, so that a whole group is one stacked view without a copy.

Shape suffixes: K matrices of a group, I in, O out, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.models.inject import LoraBlock


@dataclass(frozen=True)
class LoraGroup:
    """The LoRA matrices of one shape. All tensors are views of the flat buffers."""

    index_K: torch.Tensor
    """Position of each matrix in the list of blocks."""
    scale: float
    a_KRI: torch.Tensor
    b_KOR: torch.Tensor
    grad_a_KRI: torch.Tensor
    grad_b_KOR: torch.Tensor


class FlatParameters:
    """fp32 buffers `data` and `grad`: first the adapter's parameters, then the head's.

    The adapter's are the LoRA factors, grouped by shape, and behind them `extra`.
    """

    def __init__(
        self, blocks: list[LoraBlock], head: Iterable[nn.Parameter], extra: Iterable[nn.Parameter] = ()
    ) -> None:
        shapes: dict[tuple, list[int]] = defaultdict(list)
        for i, block in enumerate(blocks):
            shapes[(*block.lora_a.shape, block.lora_b.shape[0], block.scale)].append(i)
        layout = []
        for indices in shapes.values():
            layout += [blocks[i].lora_a for i in indices] + [blocks[i].lora_b for i in indices]
        self.num_factors = sum(p.numel() for p in layout)
        layout += list(extra)
        self.num_adapter = sum(p.numel() for p in layout)
        layout += list(head)
        device = layout[0].device
        total = sum(p.numel() for p in layout)
        self.data = torch.empty(total, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.data)
        start = 0
        for parameter in layout:
            start = self._adopt(parameter, start)
        self.groups = list(self._stack(shapes))

    @property
    def adapter(self) -> torch.Tensor:
        return self.data[: self.num_adapter]

    @property
    def adapter_grad(self) -> torch.Tensor:
        return self.grad[: self.num_adapter]

    def _adopt(self, parameter: nn.Parameter, start: int) -> int:
        """Move one parameter into the buffers; returns where the next one starts."""
        end = start + parameter.numel()
        view = self.data[start:end].view(parameter.shape)
        view.copy_(parameter.data)
        parameter.data = view
        parameter.grad = self.grad[start:end].view(parameter.shape)
        parameter.requires_grad_(True)
        return end

    def _stack(self, shapes: dict[tuple, list[int]]) -> Iterable[LoraGroup]:
        start = 0
        for (rank, num_in, num_out, scale), indices in shapes.items():
            middle = start + len(indices) * rank * num_in
            end = middle + len(indices) * rank * num_out
            a, b = slice(start, middle), slice(middle, end)
            yield LoraGroup(
                index_K=torch.tensor(indices, device=self.data.device),
                scale=scale,
                a_KRI=self.data[a].view(-1, rank, num_in),
                b_KOR=self.data[b].view(-1, num_out, rank),
                grad_a_KRI=self.grad[a].view(-1, rank, num_in),
                grad_b_KOR=self.grad[b].view(-1, num_out, rank),
            )
            start = end
