"""What the optimizer's section cannot see by itself."""

from __future__ import annotations

from collections.abc import Iterator

from fastpeft.config.schema import RunConfig

MIN_BETA1 = 0.1
MAX_FP32 = 1e30
"""What is surely fp32, however the package multiplies it."""


def optimizer_contradictions(run: RunConfig) -> Iterator[str]:
    """Settings that do not go with optimizer.name schedule_free."""
    if run.optimizer.name != "schedule_free":
        return
    if run.schedule.name != "constant":
        yield (
            f"schedule.name: {run.schedule.name} does not go with optimizer.name schedule_free, whose average takes "
            "the place of a decay; set schedule.name=constant (schedule.warmup_steps stays), or optimizer.name=adamw"
        )
    if run.optimizer.beta1 < MIN_BETA1:
        yield (
            f"optimizer.beta1: schedule_free finds its averaged weights by dividing by it; expected {MIN_BETA1} or "
            f"more, got {run.optimizer.beta1}"
        )
    settings = run.optimizer
    multiplied = {
        "training.learning_rate": run.training.learning_rate * max(1.0, settings.head_lr_ratio),
        "optimizer.eps": settings.eps,
        "optimizer.weight_decay": settings.weight_decay,
        "optimizer.head_weight_decay": settings.head_weight_decay,
    }
    for key, value in multiplied.items():
        if value > MAX_FP32:
            yield f"{key}: schedule_free computes in fp32; expected {MAX_FP32:g} or less, the head's rate too"
    if run.method == "adalora":
        yield (
            "method: adalora prunes the weights at which it trains, and optimizer.name schedule_free would bring the "
            "pruned ranks back by its average; set optimizer.name=adamw"
        )
    if run.method == "iw_lora" and run.regulariser.decoupled:
        yield (
            "regulariser.decoupled: it shrinks the weights at which the run trains, behind the average of "
            "optimizer.name schedule_free; set regulariser.decoupled=false, or optimizer.name=adamw"
        )
