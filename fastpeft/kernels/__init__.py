"""Kernels: the plain PyTorch specification of each operation, and its fast form.

Import as `fastpeft.kernels`. Public names are resolved on first use, so that importing this package imports neither
torch nor Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpeft.kernels.dropout import dropout_mask
    from fastpeft.kernels.flat_layout import FlatLayout, MatrixGroup
    from fastpeft.kernels.ops.adamw.op import adamw_step
    from fastpeft.kernels.ops.adamw.reference import AdamWOptions
    from fastpeft.kernels.ops.atoms.op import RouterCount, gather_atoms, route_atoms
    from fastpeft.kernels.ops.disentangled_attention.distances import Distances
    from fastpeft.kernels.ops.disentangled_attention.op import disentangled_attention
    from fastpeft.kernels.ops.frobenius.op import FrobeniusResult, weighted_frobenius
    from fastpeft.kernels.ops.linear_cross_entropy.op import linear_cross_entropy, logits_cross_entropy
    from fastpeft.kernels.ops.lora_linear.compute import LoraMeasures
    from fastpeft.kernels.ops.lora_linear.op import lora_linear, lora_linear_grouped
    from fastpeft.kernels.ops.secant.op import SecantSums, secant_sums
    from fastpeft.kernels.ops.sensitivity.op import gradient_norm, sketch_norm

_PUBLIC = {
    "AdamWOptions": "ops.adamw.reference",
    "Distances": "ops.disentangled_attention.distances",
    "FlatLayout": "flat_layout",
    "FrobeniusResult": "ops.frobenius.op",
    "LoraMeasures": "ops.lora_linear.compute",
    "MatrixGroup": "flat_layout",
    "RouterCount": "ops.atoms.op",
    "SecantSums": "ops.secant.op",
    "adamw_step": "ops.adamw.op",
    "disentangled_attention": "ops.disentangled_attention.op",
    "dropout_mask": "dropout",
    "gather_atoms": "ops.atoms.op",
    "gradient_norm": "ops.sensitivity.op",
    "linear_cross_entropy": "ops.linear_cross_entropy.op",
    "logits_cross_entropy": "ops.linear_cross_entropy.op",
    "lora_linear": "ops.lora_linear.op",
    "lora_linear_grouped": "ops.lora_linear.op",
    "route_atoms": "ops.atoms.op",
    "secant_sums": "ops.secant.op",
    "sketch_norm": "ops.sensitivity.op",
    "weighted_frobenius": "ops.frobenius.op",
}

__all__ = [
    "AdamWOptions",
    "Distances",
    "FlatLayout",
    "FrobeniusResult",
    "LoraMeasures",
    "MatrixGroup",
    "RouterCount",
    "SecantSums",
    "adamw_step",
    "disentangled_attention",
    "dropout_mask",
    "gather_atoms",
    "gradient_norm",
    "linear_cross_entropy",
    "logits_cross_entropy",
    "lora_linear",
    "lora_linear_grouped",
    "route_atoms",
    "secant_sums",
    "sketch_norm",
    "weighted_frobenius",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
