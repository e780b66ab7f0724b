"""A base model in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from fastpeft.errors import UserError


def nf4_arguments(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained for NF4 with double quantisation, computed in `dtype`. UserError without
    bitsandbytes."""
    import transformers

    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantisation nf4: needs the package bitsandbytes: pip install 'fastpeft[gpu]'")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def never_repack(model: nn.Module) -> None:
    """Disable the repacking of 4-bit weights at the first evaluation on some CPUs: repacked weights compute in bf16 and
    pass no gradient."""
    for module in cast("Iterator[Any]", model.modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
