"""The dictionary of rank-one atoms, and the map from its own width into the narrow space that hosts are read in.

Shape suffixes: M atoms, D their own width (d0), Q the canonical width.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.quantise import straight_through


class Atoms(nn.Module):
    """U and V (M x D), trained in fp32 and seen in 8 bits, and Psi (Q x D) likewise.

    They are used through U Psi^T and V Psi^T (M x Q) alone, so that D costs nothing a token.
    """

    def __init__(self, num_atoms: int, atom_width: int, width: int) -> None:
        """Entries of variance 1 / D for U and V, as atoms of variance 1 do not train, and 1 / Q for Psi: a token of
        unit variance then has logits of order 1, where the gate's sigmoid still has a slope."""
        super().__init__()
        self.u = nn.Parameter(torch.randn(num_atoms, atom_width) * atom_width**-0.5)
        self.v = nn.Parameter(torch.randn(num_atoms, atom_width) * atom_width**-0.5)
        self.psi = nn.Parameter(torch.randn(width, atom_width) * width**-0.5)

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U Psi^T and V Psi^T, (M, Q) each."""
        psi_QD = straight_through(self.psi, 8)
        return straight_through(self.u, 8) @ psi_QD.t(), straight_through(self.v, 8) @ psi_QD.t()
