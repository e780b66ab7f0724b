"""residual_norm's kernels, ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.residual_norm.kernel import residual_norm_backward_kernel, residual_norm_kernel
from fastpeft.kernels.row_tiles import row_tiles
from tests.support.aot import Case

WIDTHS = (384, 1024, 8192)
SCALARS = {"num_rows": "i32", "D": "i32", "eps": "fp32", "drop_below": "i32", "keep_factor": "fp32"}
FIXED = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "seed_ptr": "*i64"}


def cases(every: bool) -> list[Case]:
    found = []
    for kernel in (residual_norm_kernel, residual_norm_backward_kernel):
        for dtype in ("*bf16", "*fp32") if every else ("*bf16",):
            for width in WIDTHS:
                m, d, warps = row_tiles(width)
                pointers = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | FIXED
                signature = pointers | {name: of for name, of in SCALARS.items() if name in kernel.arg_names}
                constants = {"BLOCK_M": m, "BLOCK_D": d, "DROPOUT": True, "HAS_BIAS": True}
                constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                signature = {name: of for name, of in signature.items() if name in kernel.arg_names}
                found.append(Case(kernel, signature, constants, num_warps=warps, tensor_cores=False))
    return found
