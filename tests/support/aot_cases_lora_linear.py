"""The kernels of lora_linear for tests/support/aot.py."""

from __future__ import annotations

import torch

from fastpeft.kernels.ops.lora_linear import configs
from fastpeft.kernels.ops.lora_linear.fused import BLOCK_REDUCED, MOST_SPLITS, skinny_tiles
from fastpeft.kernels.ops.lora_linear.kernel import (
    factors_kernel,
    keep_mask_kernel,
    lora_matmul_kernel,
    reduce_factors_kernel,
    skinny_kernel,
)
from tests.support.aot import Case

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SIZES = ("K", "N", "num_in", "num_out", "num_columns", "stride_x", "stride_w", "stride_dy", "stride_s", "stride_ds")
WIDE = {"x_ptr", "w_ptr", "bias_ptr", "l1_ptr", "l2_ptr", "s_ptr", "out_ptr", "ds_ptr", "dy_ptr"}
FLOATS = {"scale", "keep_factor"}
BYTES = {"row_mask_ptr": "*i8", "seed_ptr": "*i64"}


def case(kernel, dtype, constants, config, tensor_cores=True, aligned=SIZES, architectures=(80, 90, 100), **types):
    """Types follow from the names of the arguments: tensors in `dtype` are named above, other pointers are fp32."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr"):
            signature[name] = f"*{TYPES[dtype]}" if name in WIDE else "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    signature |= {name: kind for name, kind in BYTES.items() if name in signature} | types
    aligned = tuple(name for name in aligned if name in signature)
    return Case(kernel, signature, constants, config.num_warps, config.num_stages, aligned, tensor_cores, architectures)


def matmul(config, dtype, rank, architecture, *, forward=True, form="fused", dropout=False, gram=False, even=True):
    inline = configs.inline(form, rank, dropout, dtype)
    block_r = configs.padded_rank(rank) if inline else configs.rank_step(rank, dtype)
    config = configs.fitting_matmul(config, dtype, block_r, architecture // 10, inline=inline, dropout=dropout)
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    constants = {
        "R": rank, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": block_r,
        "GROUP_M": 8, "FORWARD": forward, "W_K_INNER": forward, "INLINE": inline, "HAS_BIAS": forward,
        "DROPOUT": dropout, "EVEN_K": even, "EVEN_N": even, "PRECISION": precision, "GRAM": gram,
        "GRAM_SIDE": configs.gram_side(rank), "GRAM_PRECISION": "tf32x3",
    }  # fmt: skip
    return case(lora_matmul_kernel, dtype, constants, config, architectures=(architecture,))


def factors(config, dtype, rank, *, dropout=False, masked=False):
    block_r = configs.rank_step(rank, dtype)
    config = configs.fitting_factors(config, dtype, block_r)
    constants = {
        "R": rank, "BLOCK_F": config.block_m, "BLOCK_T": config.block_k, "BLOCK_R": block_r, "DROPOUT": dropout,
        "HAS_MASK": masked, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return case(factors_kernel, dtype, constants, config)


def skinny(dtype, rank, num_rows, *, forward, dropout):
    config = skinny_tiles(num_rows, dtype)
    constants = {
        "R": rank, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_R": min(configs.padded_rank(rank), 64),
        "FORWARD": forward, "DROPOUT": dropout, "EVEN_K": True,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return case(skinny_kernel, dtype, constants, config)


def reduction(rank, measured, masked):
    constants = {
        "R": rank, "SPLITS": MOST_SPLITS, "BLOCK": BLOCK_REDUCED, "MEASURE": measured, "HAS_MASK": masked,
    }  # fmt: skip
    plain = configs.default_config("fused_factors", False)
    return case(reduce_factors_kernel, torch.float32, constants, plain, tensor_cores=False, aligned=("num_in",))


def mask(stored="i8"):
    plain = configs.default_config("fused", False)
    constants = {"BLOCK_M": 32, "BLOCK_N": 128}
    return case(keep_mask_kernel, torch.float32, constants, plain, tensor_cores=False, out_ptr=f"*{stored}")


def cases(every: bool) -> list[Case]:
    found = [
        factors(configs.default_config("fused_factors", False), torch.bfloat16, 8, masked=True),
        skinny(torch.bfloat16, 8, 8192, forward=True, dropout=True),
        reduction(8, measured=True, masked=True),
        mask(),
    ]
    for architecture in (80, 90, 100):
        found += matmuls(architecture, every)
    for dtype in TYPES if every else ():
        for config in configs.CONFIGS["fused_factors"]:
            for rank in (8, 64):
                found += [factors(config, dtype, rank), factors(config, dtype, rank, dropout=True, masked=True)]
        for rank in (8, 64, 256):
            for num_rows in (1000, 8192):
                found += [skinny(dtype, rank, num_rows, forward=forward, dropout=forward) for forward in (True, False)]
    if every:
        found += [mask(stored) for stored in TYPES.values()]
        found += [reduction(rank, measured, False) for rank in (1, 256) for measured in (False, True)]
    return list({str(one): one for one in found}.values())  # configs that are made to fit may be the same then


def matmuls(architecture: int, every: bool) -> list[Case]:
    first, two = configs.default_config("fused", False), configs.default_config("fused_two", False)
    found = [
        matmul(first, torch.bfloat16, 8, architecture, gram=True),
        matmul(first, torch.bfloat16, 8, architecture, forward=False),
        matmul(two, torch.bfloat16, 64, architecture, forward=False, form="fused_two", dropout=True),
    ]
    for dtype in TYPES if every else ():
        for config in configs.CONFIGS["fused"]:
            for rank in (8, 64):
                found += [matmul(config, dtype, rank, architecture, gram=True)]
                found += [matmul(config, dtype, rank, architecture, forward=False)]
            found += [matmul(config, dtype, 17, architecture, even=False)]
        for config in configs.CONFIGS["fused_two"]:
            for rank in (8, 256):
                found += [matmul(config, dtype, rank, architecture, form="fused_two", gram=True)]
                found += [matmul(config, dtype, rank, architecture, forward=False, form="fused_two", dropout=True)]
    return found
