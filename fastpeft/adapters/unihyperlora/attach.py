"""Computations for attaching a dictionary to a host: fixed projections, FLOPs overhead, facts of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastpeft.adapters.unihyperlora import probe
from fastpeft.adapters.unihyperlora.cost import extra_flops, host_flops
from fastpeft.adapters.unihyperlora.dictionary import Shape
from fastpeft.adapters.unihyperlora.probe import Codes
from fastpeft.adapters.unihyperlora.projectors import Fixed, spectral
from fastpeft.adapters.unihyperlora.sites import Site
from fastpeft.errors import UserError
from fastpeft.kernels.ops.lora_linear.quantised import dequantised, is_quantised

COUNTED_TOKENS = 128
"""Sequence length for which FLOPs are counted. The share of attention grows with it."""


def projections(
    model: nn.Module, tokenizer: Any, sites: Sequence[Site], shape: Shape, codes: Codes | None
) -> dict[str, Fixed]:
    """Fixed projections by site name; empty for the coordinate projector, which is trained.

    Raises:
        UserError: the projector cannot be computed for this host.
    """
    if shape.projector == "coordinate":
        return {}
    if shape.projector == "probe":
        assert codes is not None
        return probe.fit(model, tokenizer, sites, codes)
    narrow = [site.name for site in sites if min(site.num_in, site.num_out) < shape.width]
    if narrow:
        raise UserError(f"projector spectral: {narrow[0]} has fewer than {shape.width} singular vectors")
    return {site.name: spectral(_weight(model.get_submodule(site.name)), shape.width) for site in sites}


def _weight(linear: nn.Module) -> torch.Tensor:
    weight = linear.get_parameter("weight")
    return dequantised(weight, torch.float32) if is_quantised(weight) else weight


def overhead(model: nn.Module, sites: Sequence[Site], shape: Shape) -> float:
    """Extra FLOPs as a fraction of the host's own."""
    return extra_flops(sites, shape) / host_flops(model, COUNTED_TOKENS)


def host_facts(model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
    """Description of the source host for the file's header."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "")),
        "architecture": type(model).__name__,
        "roles": sorted({site.role for site in sites}),
        "layers": len({site.layer for site in sites}),
        "width": max(site.num_in for site in sites if site.role != "down") if sites else 0,
    }
