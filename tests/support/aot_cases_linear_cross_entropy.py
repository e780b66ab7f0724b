"""What the cross entropies launch, to be compiled ahead of time."""

from __future__ import annotations

from fastpeft.kernels.ops.linear_cross_entropy.kernel import cross_entropy_row
from fastpeft.kernels.ops.linear_cross_entropy.per_row import CONFIGS, config_for
from tests.support.aot import Case

NUMBERS = dict.fromkeys(("num_labelled", "vocab", "width", "logits_stride", "gradient_stride", "ignore_index"), "i32")


def of_dtype(dtype: str, config, everything: bool, aligned: tuple[str, ...]) -> Case:
    signature = {
        **dict.fromkeys(("logits_ptr", "gradient_ptr"), f"*{dtype}"),
        "label_ptr": "*i64",
        **dict.fromkeys(("weight_ptr", "loss_ptr", "fisher_ptr", "entropy_ptr"), "*fp32"),
        **NUMBERS,
        "smoothing": "fp32",
    }
    flags = {"HAS_WEIGHT": everything, "STATISTICS": everything, "SMOOTHING": everything, "GRADIENT": True}
    constants = {**flags, "BLOCK_V": config.block_n}
    return Case(cross_entropy_row, signature, constants, config.num_warps, 1, aligned, tensor_cores=False)


def cases(every: bool) -> list[Case]:
    """Of a padded buffer, of rows that begin anywhere; all statistics and none."""
    padded = ("width", "logits_stride", "gradient_stride")
    if not every:
        return [of_dtype("bf16", config_for(128100), True, padded)]
    configs = dict.fromkeys([*CONFIGS, *map(config_for, (3, 1000))])
    return [
        of_dtype(dtype, config, everything, aligned)
        for config in configs
        for dtype in ("bf16", "fp16", "fp32")
        for everything in (False, True)
        for aligned in (padded, ())
    ]
