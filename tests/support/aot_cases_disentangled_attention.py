"""disentangled_attention's kernels, ahead of time."""

from __future__ import annotations

import torch

from fastpeft.kernels.ops.disentangled_attention.kernel import (
    attend_kernel,
    key_gradients_kernel,
    position_gradients_kernel,
    query_gradients_kernel,
    sum_positions_kernel,
)
from fastpeft.kernels.ops.disentangled_attention.launches import BAND_BLOCK, MOST_SPLITS, NUM_WARPS, block
from tests.support.aot import Case

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FIXED = dict.fromkeys(("rows_ptr", "cu_queries_ptr", "cu_keys_ptr", "starts_ptr"), "*i32")
FIXED |= {"mask_ptr": "*i8", "seed_ptr": "*i64"}
FIXED |= dict.fromkeys(("logsum_ptr", "delta_ptr", "part_ptr"), "*fp32")
FLOATS = {"scale", "keep_factor"}
STRIDES = ("stride_q", "stride_k", "stride_v", "stride")
ATTENTION = attend_kernel, query_gradients_kernel, key_gradients_kernel, position_gradients_kernel


def case(kernel, dtype: torch.dtype, length: int = 128, width: int = 64, **choices: bool) -> Case:
    tile = BAND_BLOCK if kernel in (position_gradients_kernel, sum_positions_kernel) else block(length, dtype)
    constants = {"C2P": True, "P2C": True, "HAS_MASK": True, "DROPOUT": True} | choices
    constants |= {"BLOCK": tile, "D": width, "BLOCK_D": max(16, width), "SPLITS": MOST_SPLITS}
    constants["PRECISION"] = "tf32x3" if dtype == torch.float32 else "tf32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: FIXED.get(name, DTYPES[dtype]) if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    aligned = tuple(name for name in STRIDES if name in signature)
    return Case(kernel, signature, constants, NUM_WARPS, 1, aligned, tensor_cores=kernel in ATTENTION)


def cases(every: bool) -> list[Case]:
    """All choices on, which takes the most registers; all combinations only where `every` one is wanted."""
    kernels = *ATTENTION, sum_positions_kernel
    found = [case(kernel, torch.bfloat16) for kernel in kernels]
    if every:
        found += [case(kernel, dtype, length) for dtype in DTYPES for length in (16, 128) for kernel in kernels]
        found += [case(kernel, torch.bfloat16, width=32) for kernel in kernels]
        off = {"C2P": False}, {"P2C": False}, {"HAS_MASK": False, "DROPOUT": False}
        found += [case(kernel, torch.bfloat16, **each) for each in off for kernel in ATTENTION]
        plain = {"C2P": False, "P2C": False, "HAS_MASK": False}  # as varlen_attention has it
        found += [case(kernel, dtype, **plain) for dtype in DTYPES for kernel in ATTENTION[:3]]
    return found
