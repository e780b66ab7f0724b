"""Gains of the atoms in each adapted matrix, as a function of its depth and type.

Shape suffixes: S sites, M atoms, C conditions (depth, and one for each type).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.quantise import straight_through
from fastpeft.adapters.unihyperlora.sites import TYPES, Site

HIDDEN = 13
NUM_CONDITIONS = 1 + len(TYPES)


class Mixer(nn.Module):
    """g(c) = W2 sin(W1 c + b1) + b2 + delta c, quantised; a bias is the last column of its matrix.

    A transfer trains only `delta` (M x C).
    """

    def __init__(self, num_atoms: int, bits: int = 4) -> None:
        """Initially g is 0, so that the host is unchanged."""
        super().__init__()
        self._bits = bits
        self.first = nn.Parameter(torch.randn(HIDDEN, NUM_CONDITIONS + 1) * 2)
        self.second = nn.Parameter(torch.zeros(num_atoms, HIDDEN + 1))
        self.delta = nn.Parameter(torch.zeros(num_atoms, NUM_CONDITIONS))

    def forward(self, conditions_SC: torch.Tensor) -> torch.Tensor:
        """Gains, (S, M)."""
        hidden_SH = torch.sin(_with_bias(conditions_SC) @ straight_through(self.first, self._bits).t())
        gains_SM = _with_bias(hidden_SH) @ straight_through(self.second, self._bits).t()
        return gains_SM + conditions_SC @ straight_through(self.delta, self._bits).t()


def _with_bias(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def conditions(sites: Sequence[Site], device: torch.device) -> torch.Tensor:
    """(S, C), fp32: depth and one-hot type."""
    rows = [[site.depth, *(float(site.type == i) for i in range(len(TYPES)))] for site in sites]
    return torch.tensor(rows, dtype=torch.float32, device=device)
