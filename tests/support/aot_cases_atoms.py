"""What route_atoms and gather_atoms launch, to be compiled ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.atoms import op
from fastpeft.kernels.ops.atoms.kernel import gather_kernel, route_kernel
from tests.support.aot import Case

ROUTE = dict.fromkeys(("z_ptr", "v_ptr", "slope_ptr", "bias_ptr", "s_ptr", "logit_ptr"), "*fp32")
GATHER = dict.fromkeys(("c_ptr", "u_ptr", "y_ptr"), "*fp32")


def of_sizes(block_m: int, block_q: int, top_k: int) -> list[Case]:
    """Products in full fp32 use no tensor cores."""
    route = ROUTE | {"index_ptr": "*i64"} | dict.fromkeys(("num_tokens", "num_atoms", "width"), "i32")
    gather = GATHER | {"index_ptr": "*i64"} | dict.fromkeys(("num_tokens", "width"), "i32")
    sizes = {"TOP_K": top_k, "BLOCK_Q": block_q}
    launch = {"num_warps": op.NUM_WARPS, "num_stages": op.NUM_STAGES, "tensor_cores": False}
    return [
        Case(route_kernel, route, sizes | {"BLOCK_T": op.BLOCK_T, "BLOCK_M": block_m}, **launch),
        Case(gather_kernel, gather, sizes | {"BLOCK_T": op.GATHER_BLOCK_T}, **launch),
    ]


def cases(every: bool) -> list[Case]:
    if not every:
        return of_sizes(128, 16, 2)
    sizes = ((16, 16, 1), (128, 16, 1), (128, 16, 2), (op.LARGEST_M, op.LARGEST_Q, op.LARGEST_K))
    return [case for size in sizes for case in of_sizes(*size)]
