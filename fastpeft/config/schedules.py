"""The family of schedules and the section `schedule`: shared settings, and a subsection for each with its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastpeft.config.fields import (
    STRICT_KEYS,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    OrOff,
    PositiveFloat,
    Range,
)
from fastpeft.config.registry import Beside, Entry, Registry, with_sections

AtLeastOne = Annotated[float, Range(ge=1, le=100)]


@dataclass(frozen=True, kw_only=True)
class FotConfig:
    """Forecast-On-Trajectory. The learning rate begins at training.learning_rate, and stays within 1/100 and 30 times
    it. The defaults are the paper's."""

    __pydantic_config__ = STRICT_KEYS

    window: Annotated[int, Range(ge=1, lt=2**31)] | Literal["auto"] = 32
    """Steps of a block. Its mean loss is a point of the fit, which is refitted at its end. auto: a 64th of the run,
    4 to 32 steps."""
    floor: bool = False
    """Fit an irreducible loss as well."""
    gate: bool = True
    """Scale the learning rate by 1.5, 1 or 0.7, by the ratio of the answer tokens' Fisher information to the prompt
    tokens'; without prompts by 1."""
    block_scaling: bool = True
    """Give each adapted matrix its own learning rate, by the gradient of the answer tokens."""
    calibrate: bool = False
    """Ours: compute the learning rate's bound from the measured descent instead of the predicted one."""
    alignment: bool = False
    """Ours: raise the learning rate while the last steps' directions still descend, lower it otherwise, and ignore the
    bound."""
    overshoot: NonNegativeFloat = 0.0
    """Ours, with alignment: a value of x lets a step pass the minimum along its direction by the share x / (x + 2) of
    the way there. 0 is the greedy step, which is too short if noise is low and the learning rate is annealed later."""
    confidence: NonNegativeFloat = 0.0
    """Ours, with alignment: change the learning rate only when the measured descent is this many standard errors from
    its target, then by the same factor up or down. Gradients are mostly noise, and without this the rate follows it."""
    anneal: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Ours: last share of the budget, over which the learning rate falls linearly to 0."""

    def problems(self, beside: Beside) -> Iterator[str]:
        if self.calibrate and self.alignment:
            yield (
                "schedule.fot.calibrate: it corrects the bound, which schedule.fot.alignment does without; switch one "
                "off"
            )
        for key, on in (("confidence", self.confidence), ("overshoot", self.overshoot)):
            if on and not self.alignment:
                yield f"schedule.fot.{key}: it refines schedule.fot.alignment, which is off"


@dataclass(frozen=True, kw_only=True)
class GraffConfig:
    """GRAFF: a small recurrent graph network, trained along with the model, sets the learning rate of every block."""

    __pydantic_config__ = STRICT_KEYS

    outer_learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate for the planner's weights."""
    outer_max_norm: PositiveFloat = 1.0
    """Clip the planner's gradient to this norm."""
    layers: Annotated[int, Range(ge=1, le=4)] = 1
    """Rounds of message passing between the blocks per step."""
    trace_decay: Fraction = 0.0
    """Weight of a step's effect on the loss two steps later. 0, as in the paper, uses the next step's loss alone."""
    anneal: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Multiply the learning rate by a linear decay to zero over this last fraction of the budget."""
    guard: Annotated[Literal["lagged", "paper", "off"], OrOff()] = "lagged"
    """Keep learning rate x curvature under 1.9. paper: the curvature's noise is correlated with the step; lagged: it is
    independent."""
    curvature: Literal["secant", "hvp"] = "secant"
    """hvp: from a Hessian-vector product every 16 steps, which takes two more forward and backward passes."""
    curvature_decay: Fraction = 0.95
    """Decay per step of the running secants. Closer to 1, the guard has less noise and a longer delay."""
    multipliers: Literal["free", "centred"] = "free"
    """centred: the multipliers' geometric mean is 1, so that only the learning rate moves all blocks together."""
    regret: Literal["elapsed", "step"] = "elapsed"
    """Objective of the planner. elapsed: the next loss over the seconds so far. step: the next loss."""
    caution: NonNegativeFloat = 1.0
    """Weight on hypergradients that lower the learning rate. One-step lookahead is biased towards small rates; below 1
    corrects it. 1 is the paper's."""
    graph: bool = True
    """off: no messages between blocks."""
    budget_feature: bool = True
    """off: the planner does not see the remaining budget."""
    online: bool = True
    """off: the planner does not learn during the run."""
    warm_start: str | None = None
    """File of a planner's weights, safetensors; `shipped`: the package's. When absent, it starts at a constant rate."""

    def problems(self, beside: Beside) -> Iterator[str]:
        if self.guard == "paper" and self.curvature == "hvp":
            yield "schedule.graff.curvature: hvp takes the secant's place, but guard: paper asks for the plain secant"
        if self.trace_decay and (self.guard == "paper" or self.curvature == "hvp"):
            yield "schedule.graff.trace_decay: needs the lagged secant; set guard: lagged or off, and curvature: secant"


@dataclass(frozen=True, kw_only=True)
class SalelrConfig:
    """SALeLR: the linear schedule times a factor for each adapted matrix, by its gradient's running norm."""

    __pydantic_config__ = STRICT_KEYS

    exponent: Annotated[float, Range(ge=0, le=1)] = 0.5
    """Exponent on a matrix's norm over the mean norm, which gives its factor."""
    most: AtLeastOne = 4.0
    """The factor stays within 1/most and most."""
    decay: Fraction = 0.95
    """Decay per step of the running norms."""


@dataclass(frozen=True, kw_only=True)
class BatsConfig:
    """BATS: the linear schedule, scaled by the Fisher information of the last batch's labelled tokens."""

    __pydantic_config__ = STRICT_KEYS

    exponent: Annotated[float, Range(ge=0, le=1)] = 0.5
    """Exponent on the last batch's Fisher information over its running mean, which gives the factor."""
    most: AtLeastOne = 2.0
    """The factor stays within 1/most and most."""
    decay: Fraction = 0.95
    """Decay per step of the running mean."""


@dataclass(frozen=True, kw_only=True)
class ReactorConfig:
    """REACTOR: a policy that changes the learning rate every few steps, trained on the loss by REINFORCE."""

    __pydantic_config__ = STRICT_KEYS

    window: Annotated[int, Range(ge=2, lt=2**31)] = 8
    """Steps between two changes of the learning rate."""
    sigma: PositiveFloat = 0.05
    """Standard deviation of the policy's change to the logarithm of the learning rate."""
    policy_learning_rate: PositiveFloat = 0.03
    """Learning rate of the policy's weights, for a reward one standard deviation above the baseline."""
    baseline_decay: Fraction = 0.8
    """Decay per window of the running mean and variance of rewards and states."""
    most: AtLeastOne = 10.0
    """The learning rate stays within 1/most and most times training.learning_rate."""


@dataclass(frozen=True, kw_only=True)
class SnacConfig:
    """SNAC: the learning rate times the signal's share of the squared gradient, |E g|^2 / (|E g|^2 + Var g)."""

    __pydantic_config__ = STRICT_KEYS

    floor: Annotated[float, Range(gt=0, le=1)] = 0.01
    """Lower bound of the share."""
    decay: Fraction = 0.95
    """Decay per step of the running means whose ratio is the share."""


@dataclass(frozen=True, kw_only=True)
class BaconConfig(SnacConfig):
    """BACON: SNAC's share, times what the curvature and the budget leave, and a rate for each adapted matrix."""

    curvature_decay: Fraction = 0.95
    """Decay per step of the running curvatures."""
    most: AtLeastOne = 4.0
    """A matrix's factor on the learning rate stays within 1/most and most."""


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry(Entry):
    reads_mean: bool = False
    """It separates signal from noise by Adam's running mean of the gradient, so optimizer.beta1 must not be 0."""
    holds_peak: bool = False
    """After the warm-up, the learning rate stays at its peak."""


def _at(module: str, name: str) -> str:
    return f"fastpeft.schedules.{module}:{name}"


SCHEDULES: Registry[ScheduleEntry] = Registry(
    "schedule",
    "schedule.name",
    [
        ScheduleEntry(name="constant", target=_at("classic", "Constant"), holds_peak=True),
        ScheduleEntry(name="linear", target=_at("classic", "Linear")),
        ScheduleEntry(name="cosine", target=_at("classic", "Cosine")),
        ScheduleEntry(name="wsd", target=_at("classic", "WarmupStableDecay")),
        ScheduleEntry(name="rex", target=_at("classic", "Rex")),
        ScheduleEntry(name="salelr", target=_at("salelr", "Salelr"), config=SalelrConfig),
        ScheduleEntry(name="bats", target=_at("bats", "Bats"), config=BatsConfig),
        ScheduleEntry(name="reactor", target=_at("reactor", "Reactor"), config=ReactorConfig),
        ScheduleEntry(name="snac", target=_at("snac", "Snac"), config=SnacConfig, reads_mean=True),
        ScheduleEntry(name="bacon", target=_at("bacon", "Bacon"), config=BaconConfig, reads_mean=True),
        ScheduleEntry(name="fot", target=_at("fot", "Fot"), config=FotConfig),
        ScheduleEntry(name="graff", target=_at("graff", "Graff"), config=GraffConfig),
    ],
)


@dataclass(frozen=True, kw_only=True)
@with_sections(SCHEDULES)
class ScheduleConfig:
    __pydantic_config__ = STRICT_KEYS

    name: Annotated[str, OneOf(SCHEDULES)] = "linear"
    """Shape of the learning rate after the warm-up, over the share of the budget spent."""
    warmup_steps: NonNegativeInt = 500
    """Linear warm-up; capped at 6 % of the budget."""
    final_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of the peak (linear, cosine, wsd, salelr, bats)."""
    decay_fraction: Annotated[float, Range(gt=0, le=1)] = 0.2
    """wsd: last share of the budget, over which the learning rate decays."""

    @property
    def own(self) -> Any:
        """The chosen schedule's own section; None for one that has none."""
        return SCHEDULES[self.name].section_of(self)
