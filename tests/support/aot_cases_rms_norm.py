"""rms_norm's kernels, ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.rms_norm.kernel import rms_norm_backward_kernel, rms_norm_kernel
from fastpeft.kernels.row_tiles import row_tiles
from tests.support.aot import Case

WIDTHS = (640, 4096, 8192)
SCALARS = {"num_rows": "i32", "D": "i32", "eps": "fp32", "offset": "fp32"}


def cases(every: bool) -> list[Case]:
    found = []
    for kernel in (rms_norm_kernel, rms_norm_backward_kernel):
        for dtype in ("*bf16", "*fp32") if every else ("*bf16",):
            for width in WIDTHS:
                m, d, warps = row_tiles(width)
                pointers = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | {"rstd_ptr": "*fp32"}
                signature = pointers | {name: of for name, of in SCALARS.items() if name in kernel.arg_names}
                tiles = {"BLOCK_M": m, "BLOCK_D": d}
                found.append(Case(kernel, signature, tiles, num_warps=warps, tensor_cores=False))
    return found
