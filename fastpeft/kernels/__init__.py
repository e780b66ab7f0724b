"""Kernels: the plain PyTorch specification of each operation, and its fast form.

Import as `fastpeft.kernels`. Public functions resolve on first use, so that importing this package
is free and cannot fail.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AdamWOptions": "ops.adamw.reference",
    "FlatLayout": "flat_layout",
    "FrobeniusResult": "ops.frobenius.op",
    "LoraMeasures": "ops.lora_linear.compute",
    "MatrixGroup": "flat_layout",
    "SecantSums": "ops.secant.op",
    "adamw_step": "ops.adamw.op",
    "dropout_mask": "ops.lora_linear.dropout",
    "gradient_norm": "ops.sensitivity.op",
    "linear_cross_entropy": "ops.linear_cross_entropy.op",
    "logits_cross_entropy": "ops.linear_cross_entropy.op",
    "lora_linear": "ops.lora_linear.op",
    "lora_linear_grouped": "ops.lora_linear.op",
    "secant_sums": "ops.secant.op",
    "sketch_norm": "ops.sensitivity.op",
    "weighted_frobenius": "ops.frobenius.op",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
