"""AdamW's kernel, ahead of time: the plain step, and everything that can be asked of it."""

from __future__ import annotations

from itertools import product

from fastpeft.kernels.ops.adamw.kernel import adamw_kernel
from fastpeft.kernels.ops.adamw.op import BLOCK, BLOCK_ROWS, NUM_WARPS
from tests.support.aot import Case

SIGNATURE = {name: "*fp32" for name in adamw_kernel.arg_names if name.endswith("_ptr")}
SIGNATURE |= {"rate_ptr": "*fp64", "slices_ptr": "*i64", "units_ptr": "*i64", "tickets_ptr": "*i32"}
SIGNATURE |= {"num_slices": "i32", "num_blocks": "i32"}
FLOATS = (
    "rate", "beta1", "rest1", "log_beta1", "beta2", "rest2", "log_beta2", "eps", "max_norm",
    "decay_adapter", "decay_head", "head_ratio",
)  # fmt: skip
SIGNATURE |= dict.fromkeys(FLOATS, "fp32")
FLAGS = ("HAS_LOSS", "READS_RATE", "CLIPS", "MULTIPLIES", "REDUCES", "ALIGNED")


def case(*on: str) -> Case:
    constants = {flag: flag in on for flag in FLAGS}
    return Case(
        kernel=adamw_kernel,
        signature=SIGNATURE,
        constants=constants | {"BLOCK": BLOCK, "BLOCK_ROWS": BLOCK_ROWS},
        num_warps=NUM_WARPS,
        tensor_cores=False,
    )


def cases(every: bool) -> list[Case]:
    if not every:
        return [case("HAS_LOSS", "CLIPS", "ALIGNED"), case(*FLAGS)]
    return [case(*(f for f, on in zip(FLAGS, (True, *chosen)) if on)) for chosen in product((False, True), repeat=5)]
