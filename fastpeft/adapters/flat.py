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

from fastpeft.kernels import FlatLayout, MatrixGroup
from fastpeft.models.inject import LoraBlock
from fastpeft.signals import Blocks


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
        parameters: list[nn.Parameter] = []
        groups, place = [], 0
        for (rank, num_in, num_out, scale), indices in shapes.items():
            parameters += [blocks[i].lora_a for i in indices] + [blocks[i].lora_b for i in indices]
            groups.append(MatrixGroup(tuple(indices), rank, num_in, num_out, scale, place))
            place = groups[-1].end
        extra, head = list(extra), list(head)
        parameters += extra + head
        device = parameters[0].device
        self.layout = FlatLayout(groups, [p.numel() for p in extra], [p.numel() for p in head], device)
        """Where everything lies, for the kernels."""
        self.blocks = Blocks(
            names=tuple(block.name for block in blocks),
            layers=tuple(block.layer for block in blocks),
            projections=tuple(block.projection for block in blocks),
            num_elements=tuple(sum(size for _, size in parts) for parts in self.layout.unit_parts()),
            num_b_elements=tuple(block.lora_b.numel() for block in blocks),
        )
        self.num_factors, self.num_adapter = self.layout.num_factors, self.layout.num_adapter
        self.data = torch.empty(self.layout.num_total, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.data)
        start = 0
        for parameter in parameters:
            start = self._adopt(parameter, start)
        self.groups = [
            LoraGroup(
                index_K=index_K,
                scale=group.scale,
                a_KRI=group.stack_a(self.data),
                b_KOR=group.stack_b(self.data),
                grad_a_KRI=group.stack_a(self.grad),
                grad_b_KOR=group.stack_b(self.grad),
            )
            for group, index_K in zip(groups, self.layout.index_K)
        ]

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
