"""gated's kernels, ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.gated.kernel import gated_backward_kernel, gated_kernel
from fastpeft.kernels.ops.gated.op import BLOCK, NUM_WARPS
from fastpeft.kernels.ops.gated.reference import ACTIVATIONS
from tests.support.aot import Case


def cases(every: bool) -> list[Case]:
    return [
        Case(
            kernel,
            {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | {"num": "i32"},
            {"ACTIVATION": activation, "BLOCK": BLOCK},
            num_warps=NUM_WARPS,
            tensor_cores=False,
        )
        for kernel in (gated_kernel, gated_backward_kernel)
        for activation in ACTIVATIONS
        for dtype in (("*bf16", "*fp32") if every else ("*bf16",))
    ]
