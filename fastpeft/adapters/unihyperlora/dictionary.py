"""All parameters of an adapter, and the tensors computed from them for one forward pass of a host.

Shape suffixes: M atoms, Q canonical width, S sites, C conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.atoms import Atoms
from fastpeft.adapters.unihyperlora.mixer import Mixer
from fastpeft.adapters.unihyperlora.projectors import Coordinate
from fastpeft.adapters.unihyperlora.router import Router

PROJECTORS = ("coordinate", "spectral", "probe")


@dataclass(frozen=True)
class Shape:
    """Settings that determine the shapes of a dictionary's tensors."""

    num_atoms: int = 128
    atom_width: int = 256
    width: int = 16
    """Q."""
    top_k: int = 2
    projector: str = "coordinate"
    alpha: float = 16.0
    tasks: tuple[str, ...] = ("source",)


@dataclass(frozen=True)
class Folded:
    """The dictionary for one forward pass, with all atoms in the canonical width."""

    v_MQ: torch.Tensor
    slope_M: torch.Tensor
    bias_M: torch.Tensor
    gain_u: Sequence[torch.Tensor]
    """alpha g_s U Psi^T of each site: (M, Q)."""
    phi: dict[int, torch.Tensor]
    """Projections of the coordinate projector: host width d -> (d, Q)."""


class Dictionary(nn.Module):
    """Atoms, mixer, router and, for the coordinate projector, its network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.atoms = Atoms(shape.num_atoms, shape.atom_width, shape.width)
        self.mixer = Mixer(shape.num_atoms)
        self.router = Router(shape.num_atoms, shape.tasks)
        self.projector = Coordinate(shape.width) if shape.projector == "coordinate" else None

    def fold(self, conditions_SC: torch.Tensor, task: int | None, host_widths: Iterable[int]) -> Folded:
        """Differentiable in every parameter. O(M D Q + S M Q) multiplications, independent of the number of tokens."""
        u_MQ, v_MQ = self.atoms.fold()
        gains_SM = self.mixer(conditions_SC) * self.shape.alpha
        gain_u = (gains_SM[:, :, None] * u_MQ).unbind(0)
        phi = {} if self.projector is None else {d: self.projector(d) for d in dict.fromkeys(host_widths)}
        return Folded(v_MQ, self.router.slope, self.router.bias(task), gain_u, phi)

    def parts(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """Parameters by the part that they belong to, in their order in the flat buffers."""
        found = {"atoms": tuple(self.atoms.parameters()), "router": tuple(self.router.parameters())}
        if self.projector is not None:
            found["projector"] = tuple(self.projector.parameters())
        return found | {"mixer": (self.mixer.first, self.mixer.second), "delta": (self.mixer.delta,)}
