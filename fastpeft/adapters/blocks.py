"""Named blocks of trainable parameters, through which the rest of the code sees an adapter.

The flat buffers, the schedules' learning rates, the log and the model cards refer to blocks. A block may hold any
parameters (ParameterBlock). The kernels have special code for one kind, a low-rank update of a matrix (LowRankBlock),
which the LoRA family provides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

from torch import nn

from fastpeft.models.inject import LowRankBlock


class Block(Protocol):
    """A named group of trainable parameters, to which a schedule may give a separate learning rate."""

    @property
    def name(self) -> str:
        """Unique in the adapter: the path of the adapted module in the model without adapter."""
        ...

    @property
    def layer(self) -> int:
        """Index of the transformer layer; 0 for a block outside of the layers."""
        ...

    @property
    def projection(self) -> str:
        """Name of the block within its layer, such as the projection that it adapts."""
        ...

    @property
    def kind(self) -> str: ...

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """In their order in the flat buffers. A parameter belongs to at most one block."""
        ...


@dataclass(frozen=True, eq=False)
class ParameterBlock:
    """A block of arbitrary parameters; `kind` is the method's name for it."""

    name: str
    layer: int
    projection: str
    parameters: tuple[nn.Parameter, ...]
    kind: str = "parameters"


def is_low_rank(block: Block) -> TypeGuard[LowRankBlock]:
    return block.kind == LowRankBlock.kind


def low_rank_first(blocks: Sequence[Block]) -> tuple[list[LowRankBlock], list[Block]]:
    """The low-rank blocks, and the others."""
    return [b for b in blocks if is_low_rank(b)], [b for b in blocks if not is_low_rank(b)]
