"""Frozen weights in bitsandbytes' 4-bit format."""

from __future__ import annotations

import torch


def weight_shape(weight: torch.Tensor) -> torch.Size:
    """(O, I), the shape of a weight, for a 4-bit parameter that of its dequantised weight."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else state.shape


def is_quantised(weight: torch.Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def dequantised(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(O, I) in `dtype`; `weight` itself if it is not quantised.

    Raises:
        ImportError: the weight is quantised and bitsandbytes cannot be imported.
    """
    if not is_quantised(weight):
        return weight
    try:
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports] (extra `gpu`)
    except ImportError as error:
        raise ImportError(
            f"lora_linear: weight is a 4-bit bitsandbytes parameter, and bitsandbytes cannot be imported ({error}); "
            "install it: pip install bitsandbytes"
        ) from error
    return dequantize_4bit(weight.data, getattr(weight, "quant_state")).to(dtype)  # noqa: B009 (no field of a Tensor)
