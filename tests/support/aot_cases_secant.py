"""The secants' kernel, ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.secant.kernel import secant_kernel
from fastpeft.kernels.ops.secant.op import BLOCK, BLOCK_ROWS, NUM_WARPS
from tests.support.aot import Case

SIGNATURE = {name: "*fp32" for name in secant_kernel.arg_names if name.endswith("_ptr")}
SIGNATURE |= {"divisor_ptr": "*fp64", "slices_ptr": "*i64", "units_ptr": "*i64", "tickets_ptr": "*i32"}


def cases(every: bool) -> list[Case]:
    return [
        Case(
            kernel=secant_kernel,
            signature=SIGNATURE,
            constants={"ALIGNED": aligned, "BLOCK": BLOCK, "BLOCK_ROWS": BLOCK_ROWS},
            num_warps=NUM_WARPS,
            tensor_cores=False,
        )
        for aligned in (True, False)
    ]
