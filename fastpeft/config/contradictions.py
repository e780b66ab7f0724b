"""Checks across sections of a configuration: settings that exclude each other.

Checks within one component's own section are the method `problems` of its Config.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastpeft.config.methods import METHODS, MethodEntry
from fastpeft.config.optimizers import OPTIMIZERS, OptimizerEntry
from fastpeft.config.registry import Beside
from fastpeft.config.schedules import SCHEDULES, ScheduleEntry
from fastpeft.config.schema import FAMILIES, DatasetConfig, RunConfig

HUB_KEYS = ("config", "revision", "train_split", "validation_split")
"""Keys of the section `dataset` that apply to datasets of the hub only."""


def contradictions(run: RunConfig) -> Iterator[str]:
    """Yields one sentence for each problem between settings."""
    method, schedule = METHODS[run.method], SCHEDULES[run.schedule.name]
    optimizer = OPTIMIZERS[run.optimizer.name]
    yield from _of_members(run, optimizer)
    if method.trains_backbone and run.model.quantisation != "none":
        yield (
            f"model.quantisation: {run.model.quantisation} freezes the weights that method {method.name} trains; leave "
            "it out, or take a method with an adapter"
        )
    yield from _sharding(run, method)
    if run.dataset.labels is not None and len(set(run.dataset.labels)) < max(2, len(run.dataset.labels)):
        yield f"dataset.labels: expected two or more different names, got {run.dataset.labels}"
    yield from _hub(run.dataset)
    if run.dataset.packing and run.training.cache_prefix:
        yield "dataset.packing: does not go with training.cache_prefix, which keeps rows by themselves; leave one out"
    if run.training.padding == "none" and run.training.cache_prefix:
        yield "training.padding: none does not go with training.cache_prefix, which keeps padded rows; leave one out"
    if schedule.reads_mean and run.optimizer.beta1 == 0:
        yield (
            f"optimizer.beta1: schedule {schedule.name} tells signal from noise by the running mean of the gradient, "
            "and with 0 there is none; expected more than 0"
        )
    yield from _limits(run, optimizer)
    if optimizer.averages:
        yield from _averaging(method, schedule, optimizer)


def _of_members(run: RunConfig, optimizer: OptimizerEntry) -> Iterator[str]:
    """Problems that the chosen components find in their own sections."""
    beside = Beside(warmup_steps=run.schedule.warmup_steps, optimizer=optimizer.name, averages=optimizer.averages)
    for family in FAMILIES:
        own = family.own_section(run)
        if hasattr(own, "problems"):
            yield from own.problems(beside)


def _sharding(run: RunConfig, method: MethodEntry) -> Iterator[str]:
    """Problems of training.shard_base: weights that cannot be sharded over the ranks."""
    if not run.training.shard_base:
        return
    if method.trains_backbone:
        yield (
            f"training.shard_base: shares out weights that are frozen, and method {method.name} trains them; leave it "
            "out, or take a method with an adapter"
        )
    if run.model.quantisation != "none":
        yield (
            f"training.shard_base: a weight in {run.model.quantisation} is codes that mean nothing without constants "
            "kept beside them, and only weights are gathered; leave out one of it and model.quantisation"
        )


def _limits(run: RunConfig, optimizer: OptimizerEntry) -> Iterator[str]:
    """Settings that the optimizer cannot compute with."""
    settings, name = run.optimizer, optimizer.name
    if settings.beta1 < optimizer.min_beta1:
        yield (
            f"optimizer.beta1: {name} finds its averaged weights by dividing by it; expected {optimizer.min_beta1} or "
            f"more, got {settings.beta1}"
        )
    multiplied = {
        "training.learning_rate": run.training.learning_rate * max(1.0, settings.head_lr_ratio),
        "optimizer.eps": settings.eps,
        "optimizer.weight_decay": settings.weight_decay,
        "optimizer.head_weight_decay": settings.head_weight_decay,
    }
    for key, value in multiplied.items():
        if value > optimizer.max_setting:
            yield f"{key}: {name} computes in fp32; expected {optimizer.max_setting:g} or less, the head's rate too"


def _averaging(method: MethodEntry, schedule: ScheduleEntry, optimizer: OptimizerEntry) -> Iterator[str]:
    """Schedules and methods that are incompatible with an optimizer that averages the weights."""
    if not schedule.holds_peak:
        yield (
            f"schedule.name: {schedule.name} does not go with optimizer.name {optimizer.name}, whose average takes the "
            "place of a decay; set schedule.name=constant (schedule.warmup_steps stays), or optimizer.name=adamw"
        )
    if method.prunes:
        yield (
            f"method: {method.name} prunes the weights at which it trains, and optimizer.name {optimizer.name} would "
            "bring the pruned ranks back by its average; set optimizer.name=adamw"
        )


def _hub(dataset: DatasetConfig) -> Iterator[str]:
    """Keys of hub datasets that are set for a local path, or that name the training split for validation."""
    unset = DatasetConfig()
    given = [key for key in HUB_KEYS if getattr(dataset, key) != getattr(unset, key)]
    if given and dataset.path is not None:
        yield f"dataset.{given[0]}: is for datasets of the hub, but dataset.path is set"
    if dataset.validation_split is not None and dataset.validation_split == (dataset.train_split or "train"):
        yield f"dataset.validation_split: {dataset.validation_split!r} is the split that is trained on"
