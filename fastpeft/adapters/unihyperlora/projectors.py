"""Projections between a host's width and the canonical width Q: Phi_in (d x Q) and Phi_out (d x Q).

coordinate: a sine network of a unit's relative index i / d and log10 d. It uses nothing else of the host: a new width
    needs no new parameter, but nothing else aligns the canonical spaces of two hosts.
spectral: the leading singular vectors of each frozen weight.
probe: the host reads fixed words once. Phi_in maps its activations to codes stored with the adapter, by ridge
    regression. Phi_out is the correlation of its outputs with codes.

The last two are computed when an adapter is attached, and are not trained.

Shape suffixes: d a host's width, Q the canonical width, W probe words, I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

HIDDEN = 32
_HIGHEST = 64.0
"""Largest initial frequency, in radians over the width of a host."""
RIDGE = 1e-2
"""Ridge, as a fraction of the mean eigenvalue of the activations' covariance."""


@dataclass(frozen=True)
class Fixed:
    """Projections of one site, not trained."""

    phi_in: torch.Tensor
    """(I, Q)."""
    phi_out: torch.Tensor
    """(O, Q)."""
    offset: torch.Tensor | None = None
    """(Q,): z = Phi_in^T x + offset; None means 0."""


class Coordinate(nn.Module):
    """Row i of Phi(d) is a sine network of (i / d, log10 d). The columns of Phi(d) are normalised to length 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = torch.empty(HIDDEN, 3).uniform_(-1, 1)
        first[:, 0] *= _HIGHEST
        first[:, 2] *= torch.pi  # the last column is the bias
        self.first = nn.Parameter(first)
        self.second = nn.Parameter(torch.randn(width, HIDDEN) * HIDDEN**-0.5)

    def forward(self, host_width: int) -> torch.Tensor:
        """Phi(d): (d, Q)."""
        place_d = (torch.arange(host_width, device=self.first.device, dtype=self.first.dtype) + 0.5) / host_width
        size = torch.log10(place_d.new_tensor(float(host_width)))
        inputs_d3 = torch.stack([place_d, size.expand_as(place_d), torch.ones_like(place_d)], dim=1)
        phi_dQ = torch.sin(inputs_d3 @ self.first.t()) @ self.second.t()
        return unit_columns(phi_dQ)


def unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / torch.linalg.vector_norm(matrix, dim=0).clamp_min(1e-12)


@torch.no_grad()
def spectral(weight: torch.Tensor, width: int) -> Fixed:
    """The leading right and left singular vectors of a weight (O x I), from the eigenvectors of its smaller Gram matrix
    in fp64. The sign of each pair makes the largest entry of the right vector positive.

    Raises:
        ValueError: the weight is narrower than `width`.
    """
    w_OI = weight.detach().double()
    if min(w_OI.shape) < width:
        raise ValueError(f"a weight of {tuple(w_OI.shape)} has no {width} singular vectors")
    is_wide = w_OI.shape[0] < w_OI.shape[1]
    gram = w_OI @ w_OI.t() if is_wide else w_OI.t() @ w_OI
    _, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, -width:].flip(1)
    other = unit_columns((w_OI.t() if is_wide else w_OI) @ leading)
    right, left = (other, leading) if is_wide else (leading, other)
    sign = torch.sign(right.gather(0, right.abs().argmax(0, keepdim=True)))
    return Fixed((right * sign).float().contiguous(), (left * sign).float().contiguous())


@torch.no_grad()
def codes_of(activations_Wd: torch.Tensor, width: int) -> torch.Tensor:
    """Codes of probe words (W x Q, of unit variance): the leading left singular vectors of a host's activations.

    Raises:
        ValueError: the number of words, or the host's width, is below `width`.
    """
    centred = activations_Wd.double() - activations_Wd.double().mean(0)
    if min(centred.shape) < width:
        raise ValueError(f"activations of {tuple(centred.shape)} have no {width} singular vectors")
    left, _, _ = torch.linalg.svd(centred, full_matrices=False)
    left = left[:, :width]
    sign = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    return (left * sign * len(left) ** 0.5).float()


@torch.no_grad()
def read_codes(inputs_WI: torch.Tensor, codes_WQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi_in (I x Q) and offset (Q): ridge regression of codes on a host's inputs to a site."""
    x, codes = inputs_WI.double(), codes_WQ.double()
    mean = x.mean(0)
    x = x - mean
    gram = x.t() @ x
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    phi = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.t() @ codes)
    return phi.float().contiguous(), -(mean @ phi).float()


@torch.no_grad()
def write_codes(outputs_WO: torch.Tensor, codes_WQ: torch.Tensor) -> torch.Tensor:
    """Phi_out (O x Q): correlation of a site's outputs with codes, in columns of length 1."""
    y, codes = outputs_WO.double(), codes_WQ.double()
    return unit_columns((y - y.mean(0)).t() @ codes / len(codes)).float().contiguous()
