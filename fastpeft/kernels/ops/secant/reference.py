"""The specification of secant_sums, from which schedules compute curvature."""

from __future__ import annotations

import torch

from fastpeft.kernels.flat_layout import FlatLayout


def secant_sums(
    data: torch.Tensor,
    grad: torch.Tensor,
    previous: torch.Tensor,
    older: torch.Tensor,
    second: torch.Tensor,
    divisor: torch.Tensor,
    layout: FlatLayout,
) -> list[torch.Tensor]:
    """(U,) each: <g, d>, <g, d'> and <d sqrt(v), d'>, d = data - previous, d' = older, v = second / divisor."""
    last = data - previous
    products = grad * last, grad * older, last * (second / divisor).sqrt() * older
    return [
        torch.stack([torch.cat([product[at : at + size] for at, size in parts]).sum() for parts in layout.unit_parts()])
        for product in products
    ]
