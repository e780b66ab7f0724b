"""The family of optimizers and the section `optimizer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from fastpeft.config.fields import STRICT_KEYS, Fraction, NonNegativeFloat, OneOf, PositiveFloat
from fastpeft.config.registry import Entry, Registry, with_sections


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry(Entry):
    averages: bool = False
    """It evaluates and saves an average of the training iterates, which replaces learning-rate decay."""
    min_beta1: float = 0.0
    """Smallest optimizer.beta1."""
    max_setting: float = math.inf
    """Largest learning rate, eps and weight decay."""


OPTIMIZERS: Registry[OptimizerEntry] = Registry(
    "optimizer",
    "optimizer.name",
    [
        OptimizerEntry(name="adamw", target="fastpeft.trainer.optim:FlatAdamW"),
        OptimizerEntry(
            name="schedule_free",
            target="fastpeft.trainer.optim:ScheduleFreeAdamW",
            averages=True,
            min_beta1=0.1,
            max_setting=1e30,  # products of these settings stay finite in fp32
        ),
    ],
)


@dataclass(frozen=True, kw_only=True)
@with_sections(OPTIMIZERS)
class OptimizerConfig:
    __pydantic_config__ = STRICT_KEYS

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """adamw, or schedule_free (arXiv:2405.15682): AdamW with gradients at y, between the iterate z and its running
    average x. It evaluates, saves and exports x. It needs no learning-rate decay, so schedule.name must be constant."""
    beta1: Fraction = 0.9
    """Decay per step of the gradient's running mean; for schedule_free the share of x in y, 0.1 or more."""
    beta2: Fraction = 0.999
    """Decay per step of the squared gradient's running mean."""
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of the adapter."""
    head_weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of the task head."""
    head_lr_ratio: PositiveFloat = 1.0
    """The head's learning rate, as a multiple of the adapter's."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient of all trainable parameters to this norm; 0 switches clipping off."""

    @property
    def own(self) -> Any:
        """The chosen optimizer's own section; None for one that has none."""
        return OPTIMIZERS[self.name].section_of(self)
