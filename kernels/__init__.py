"""Kernels: the plain PyTorch specification of each operation, and its fast form.

Import as `fastpeft.kernels`. Public functions resolve on first use, so that importing this package
is free and cannot fail.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_PUBLIC = {
    "AdamWOptions": "adamw.reference",
    "FlatLayout": "flat_layout",
    "FrobeniusResult": "frobenius.op",
    "LoraMeasures": "lora_linear.compute",
    "MatrixGroup": "flat_layout",
    "SecantSums": "secant.op",
    "adamw_step": "adamw.op",
    "dropout_mask": "lora_linear.dropout",
    "gradient_norm": "sensitivity.op",
    "linear_cross_entropy": "linear_cross_entropy.op",
    "logits_cross_entropy": "linear_cross_entropy.op",
    "lora_linear": "lora_linear.op",
    "lora_linear_grouped": "lora_linear.op",
    "secant_sums": "secant.op",
    "sketch_norm": "sensitivity.op",
    "weighted_frobenius": "frobenius.op",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps a folder from hiding the function of the same name once it has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
