"""What no single field of a configuration can see: settings that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

from fastpeft.config.schedules import FotConfig, GraffConfig, ScheduleConfig
from fastpeft.config.schema import AdaLoraConfig, DatasetConfig, RegulariserConfig, RunConfig

HUB_KEYS = ("config", "revision", "train_split", "validation_split")
"""Of the section dataset: what only a dataset of the hub has."""
MIN_BETA1 = 0.1
READS_MEAN = ("snac", "bacon")
"""Schedules that tell signal from noise by Adam's running mean of the gradient."""
MAX_FP32 = 1e30
"""What is surely fp32, however schedule-free AdamW multiplies it."""


def contradictions(run: RunConfig) -> Iterator[str]:
    """What no single field can see, one sentence a problem."""
    if run.method == "iw_lora":
        yield from _iw_lora(run.regulariser, run.schedule)
    if run.method == "adalora":
        yield from _adalora(run.adalora)
    if run.method == "full" and run.model.quantisation != "none":
        yield (
            f"model.quantisation: {run.model.quantisation} freezes the weights that method full trains; leave it out, "
            "or take a method with an adapter"
        )
    if run.schedule.name == "fot":
        yield from _fot(run.schedule.fot)
    if run.schedule.name == "graff":
        yield from _graff(run.schedule.graff)
    if run.dataset.labels is not None and len(set(run.dataset.labels)) < max(2, len(run.dataset.labels)):
        yield f"dataset.labels: expected two or more different names, got {run.dataset.labels}"
    yield from _hub(run.dataset)
    if run.schedule.name in READS_MEAN and run.optimizer.beta1 == 0:
        yield (
            f"optimizer.beta1: schedule {run.schedule.name} tells signal from noise by the running mean of the "
            "gradient, and with 0 there is none; expected more than 0"
        )
    yield from _schedule_free(run)


def _iw_lora(regulariser: RegulariserConfig, schedule: ScheduleConfig) -> Iterator[str]:
    if regulariser.estimator == "lora_a":
        if regulariser.warmup_learning_rate <= 0:
            yield (
                "regulariser.estimator: lora_a needs regulariser.warmup_learning_rate > 0: while B is "
                "zero the gradient of A is identically zero, so every importance would be 0 / 0"
            )
        if regulariser.calibration == "inline":
            yield "regulariser.calibration: inline takes the sketch; it does not go with estimator lora_a"
    if regulariser.calibration == "inline" and schedule.warmup_steps == 0:
        yield "regulariser.calibration: inline measures during the rate's warm-up, but schedule.warmup_steps is 0"


def _adalora(adalora: AdaLoraConfig) -> Iterator[str]:
    if adalora.initial_rank <= adalora.target_rank:
        yield (
            f"adalora.initial_rank: {adalora.initial_rank} leaves nothing to prune; it has to be over "
            f"adalora.target_rank, {adalora.target_rank}"
        )
    total = adalora.virtual_steps
    if round(adalora.final_fraction * total) == 0:
        yield "adalora.final_fraction: it is under one virtual step, so that the last pruning could come too late"
    if round(adalora.initial_fraction * total) >= total - round(adalora.final_fraction * total):
        yield "adalora.initial_fraction and .final_fraction: no virtual step is left between them to prune at"


def _fot(fot: FotConfig) -> Iterator[str]:
    if fot.calibrate and fot.alignment:
        yield "schedule.fot.calibrate: it corrects the bound, which schedule.fot.alignment does without; switch one off"
    for key, on in (("confidence", fot.confidence), ("overshoot", fot.overshoot)):
        if on and not fot.alignment:
            yield f"schedule.fot.{key}: it refines schedule.fot.alignment, which is off"


def _graff(graff: GraffConfig) -> Iterator[str]:
    if graff.guard == "paper" and graff.curvature == "hvp":
        yield "schedule.graff.curvature: hvp takes the secant's place, but guard: paper asks for the plain secant"
    if graff.trace_decay and (graff.guard == "paper" or graff.curvature == "hvp"):
        yield "schedule.graff.trace_decay: needs the lagged secant; set guard: lagged or off, and curvature: secant"


def _schedule_free(run: RunConfig) -> Iterator[str]:
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


def _hub(dataset: DatasetConfig) -> Iterator[str]:
    """Keys of hub datasets, on what is none."""
    unset = DatasetConfig()
    given = [key for key in HUB_KEYS if getattr(dataset, key) != getattr(unset, key)]
    if given and dataset.path is not None:
        yield f"dataset.{given[0]}: is for datasets of the hub, but dataset.path is set"
    if dataset.validation_split is not None and dataset.validation_split == (dataset.train_split or "train"):
        yield f"dataset.validation_split: {dataset.validation_split!r} is the split that is trained on"
