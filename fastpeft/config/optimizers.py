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
    """What is evaluated and kept is an average of the weights that it trains at, which takes the place of a decay of
    the learning rate."""
    min_beta1: float = 0.0
    """Least optimizer.beta1."""
    max_setting: float = math.inf
    """Most that rates, eps and decays may be."""


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
            max_setting=1e30,  # surely fp32, however it is multiplied
        ),
    ],
)


@dataclass(frozen=True, kw_only=True)
@with_sections(OPTIMIZERS)
class OptimizerConfig:
    __pydantic_config__ = STRICT_KEYS

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """adamw, or schedule_free: AdamW that trains at y, between the iterate z and its running average x. What is
    evaluated, saved and exported is x; it needs no decay of the rate, so schedule.name has to be constant."""
    beta1: Fraction = 0.9
    """Decay of the gradient's running mean, a step; for schedule_free the share of x in y, 0.1 or more."""
    beta2: Fraction = 0.999
    """Decay of the squared gradient's running mean, a step."""
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
