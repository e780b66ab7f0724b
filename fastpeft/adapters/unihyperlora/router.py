"""Selection of the atoms of a token: logit_j = slope_j <z, v_j> + E(task) . R_j, with z the token in canonical space.

It does not depend on the host's width, so that it transfers between hosts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.quantise import straight_through

EMBEDDING = 16


class Router(nn.Module):
    """Slopes (M), keys R (M x EMBEDDING, 8 bits) and task embeddings E (tasks x EMBEDDING)."""

    def __init__(self, num_atoms: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(num_atoms))
        self.keys = nn.Parameter(torch.randn(num_atoms, EMBEDDING) * EMBEDDING**-0.5)
        self.embedding = nn.Parameter(torch.randn(len(tasks), EMBEDDING) * 0.1)

    def bias(self, task: int | None) -> torch.Tensor:
        """E(task) . R_j, (M,). None, for a task without embedding, uses the mean of all embeddings."""
        embedding = self.embedding.mean(0) if task is None else self.embedding[task]
        return straight_through(self.keys, 8) @ embedding
