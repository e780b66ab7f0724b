"""The dictionary of rank-one atoms, and the map from the atoms' width to the canonical width.

Shape suffixes: M atoms, D width of the atoms (d0), Q canonical width.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.quantise import straight_through


class Atoms(nn.Module):
    """U and V (M x D) and Psi (Q x D), trained in fp32 and used in their 8-bit values.

    Tokens only meet U Psi^T and V Psi^T (M x Q), so that the cost per token does not depend on D.
    """

    def __init__(self, num_atoms: int, atom_width: int, width: int) -> None:
        """Entries have variance 1 / D in U and V, because atoms of variance 1 do not train, and 1 / Q in Psi. Logits of
        a token of unit variance are then of order 1, where the gate's sigmoid is not saturated."""
        super().__init__()
        self.u = nn.Parameter(torch.randn(num_atoms, atom_width) * atom_width**-0.5)
        self.v = nn.Parameter(torch.randn(num_atoms, atom_width) * atom_width**-0.5)
        self.psi = nn.Parameter(torch.randn(width, atom_width) * width**-0.5)

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U Psi^T and V Psi^T, (M, Q) each."""
        psi_QD = straight_through(self.psi, 8)
        return straight_through(self.u, 8) @ psi_QD.t(), straight_through(self.v, 8) @ psi_QD.t()
