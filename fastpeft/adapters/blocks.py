"""What everything else knows of an adapter: named blocks of trainable parameters.

The flat buffers, the schedules' learning rates, the log and the cards speak of blocks. A block may hold any parameters
(ParameterBlock). The kernels know the form of one kind, a low-rank update of a matrix (LowRankBlock), which the LoRA
family provides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

from torch import nn

from fastpeft.models.inject import LowRankBlock


class Block(Protocol):
    """A named group of trainable parameters, to which a schedule may give a learning rate of its own."""

    @property
    def name(self) -> str:
        """Unique in the adapter: the path of what it adapts in the bare model."""
        ...

    @property
    def layer(self) -> int:
        """Index of the transformer layer; 0 for what is in none."""
        ...

    @property
    def projection(self) -> str:
        """What tells the blocks of one layer apart."""
        ...

    @property
    def kind(self) -> str: ...

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """In the order in which they lie in the flat buffers; each in one block only."""
        ...


@dataclass(frozen=True, eq=False)
class ParameterBlock:
    """A block of any parameters; `kind` is the method's own word for it."""

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
