"""rotary's kernel, ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.rotary.kernel import rotary_kernel
from fastpeft.kernels.ops.rotary.op import ELEMENTS
from fastpeft.kernels.row_tiles import row_tiles
from tests.support.aot import Case


def cases(every: bool) -> list[Case]:
    found = []
    for width in (64, 128, 256):
        m, d, warps = row_tiles(width // 2, ELEMENTS)
        for transposed in (False, True):
            for dtype in ("*bf16", "*fp32") if every else ("*bf16",):
                names = [name for name in rotary_kernel.arg_names if name.islower() or name in ("H", "L")]
                signature = {name: dtype if name.endswith("_ptr") else "i32" for name in names}
                constants = {"TRANSPOSED": transposed, "BLOCK_M": m, "BLOCK_D": d}
                found.append(Case(rotary_kernel, signature, constants, num_warps=warps, tensor_cores=False))
    return found
