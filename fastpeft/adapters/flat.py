"""All trainable parameters in one buffer and their gradients in another; modules hold views.

Clipping, penalty, optimizer state and checkpoints then work on a few tensors. Low-rank blocks of one shape
are adjacent, so that a whole group is one stacked view without a copy.

Shape suffixes: K matrices of a group, I in, O out, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.adapters.blocks import Block, low_rank_first
from fastpeft.kernels import FlatLayout, MatrixGroup
from fastpeft.models.inject import LowRankBlock
from fastpeft.signals import STATISTICS, Blocks


@dataclass(frozen=True)
class LoraGroup:
    """The low-rank blocks of one shape. All tensors are views of the flat buffers."""

    index_K: torch.Tensor
    """Index of each block of the group in the list of low-rank blocks."""
    scale: float
    a_KRI: torch.Tensor
    b_KOR: torch.Tensor
    grad_a_KRI: torch.Tensor
    grad_b_KOR: torch.Tensor


class FlatParameters:
    """fp32 buffers `data` and `grad`: first the adapter's parameters, then the head's.

    The adapter's part holds, in this order: A and B of the low-rank blocks, grouped by shape; the other blocks; the
    parameters of low-rank blocks besides A and B; and `extra`, parameters in no block.
    """

    def __init__(
        self, blocks: Sequence[Block], head: Iterable[nn.Parameter], extra: Iterable[nn.Parameter] = ()
    ) -> None:
        low_rank, others = low_rank_first(blocks)
        groups, parameters = _grouped(low_rank)
        extra = [p for block in low_rank for p in block.parameters[2:]] + list(extra)
        head = list(head)
        parameters += [p for block in others for p in block.parameters] + extra + head
        device = parameters[0].device
        sizes = [sum(p.numel() for p in block.parameters) for block in others]
        self.layout = FlatLayout(
            groups, sizes + [p.numel() for p in extra], [p.numel() for p in head], device, num_named=len(others)
        )
        """Offsets of all parameters, for the kernels."""
        named = [*low_rank, *others]
        self.blocks = Blocks(
            names=tuple(block.name for block in named),
            layers=tuple(block.layer for block in named),
            projections=tuple(block.projection for block in named),
            num_elements=tuple(sum(size for _, size in parts) for parts in self.layout.unit_parts()),
            num_b_elements=(*(block.lora_b.numel() for block in low_rank), *sizes),
        )
        self.num_factors, self.num_adapter = self.layout.num_factors, self.layout.num_adapter
        self.data = torch.empty(self.layout.num_total, dtype=torch.float32, device=device)
        self.summed = torch.zeros(self.layout.num_total + 1 + len(STATISTICS), dtype=torch.float32, device=device)
        """`grad`, followed by the values that one all-reduce sums with it: the loss and measurements of the step."""
        self.grad = self.summed[: self.layout.num_total]
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

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.copy_(state["data"])

    @property
    def adapter(self) -> torch.Tensor:
        return self.data[: self.num_adapter]

    @property
    def adapter_grad(self) -> torch.Tensor:
        return self.grad[: self.num_adapter]

    def _adopt(self, parameter: nn.Parameter, start: int) -> int:
        """Move one parameter into the buffers; returns the offset of the next one."""
        end = start + parameter.numel()
        view = self.data[start:end].view(parameter.shape)
        view.copy_(parameter.data)
        parameter.data = view
        parameter.grad = self.grad[start:end].view(parameter.shape)
        parameter.requires_grad_(True)
        return end


def _grouped(blocks: list[LowRankBlock]) -> tuple[list[MatrixGroup], list[nn.Parameter]]:
    """Groups of blocks of one shape and scale; all A and B in their order in the buffers."""
    shapes: dict[tuple, list[int]] = defaultdict(list)
    for i, block in enumerate(blocks):
        shapes[(*block.lora_a.shape, block.lora_b.shape[0], block.scale)].append(i)
    parameters: list[nn.Parameter] = []
    groups, place = [], 0
    for (rank, num_in, num_out, scale), indices in shapes.items():
        parameters += [blocks[i].lora_a for i in indices] + [blocks[i].lora_b for i in indices]
        groups.append(MatrixGroup(tuple(indices), rank, num_in, num_out, scale, place))
        place = groups[-1].end
    return groups, parameters
