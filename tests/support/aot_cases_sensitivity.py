"""What gradient_norm launches, to be compiled ahead of time."""

from __future__ import annotations

import torch

from fastpeft.kernels.ops.sensitivity import op
from fastpeft.kernels.ops.sensitivity.kernel import gradient_norm_direct, gradient_norm_gram
from tests.support.aot import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = dict.fromkeys(("num_rows", "num_rows2", "num_in", "num_out"), "i32")


def of_dtype(dtype: str, width: int) -> list[Case]:
    signature = {**dict.fromkeys(("x_ptr", "g_ptr", "x2_ptr", "g2_ptr"), f"*{dtype}"), "partial_ptr": "*fp32", **SHAPES}
    aligned = ("num_in", "num_out") if width % 16 == 0 else ()
    precision = {"PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
    found = []
    for c in op.DIRECT_FP32 if dtype == "fp32" else op.DIRECT:
        tiles = {"BLOCK_O": c.block_m, "BLOCK_I": c.block_n, "BLOCK_T": c.block_k}
        constants = {"EVEN": width % c.block_m == width % c.block_n == 0, **precision, **tiles}
        found.append(Case(gradient_norm_direct, signature, constants, c.num_warps, c.num_stages, aligned))
    c = op.gram_config(DTYPES[dtype], (500, 0, width, width))
    constants = {"EVEN": width % c.block_k == 0, **precision, "BLOCK": c.block_m, "BLOCK_K": c.block_k}
    return [*found, Case(gradient_norm_gram, signature, constants, c.num_warps, c.num_stages, aligned)]


def cases(every: bool) -> list[Case]:
    """Widths that fill whole tiles; that do not but are multiples of 16; neither."""
    if not every:
        return of_dtype("bf16", 768)[::2]
    return [case for dtype in DTYPES for width in (768, 1008, 1001) for case in of_dtype(dtype, width)]
