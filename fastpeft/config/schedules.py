"""The family of schedules and the section `schedule`: what all share, and a section for each with its own settings."""

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
    """Forecast-On-Trajectory. training.learning_rate is where the rate begins; the rate stays within 1/100 and 30
    times it. The defaults are the paper's."""

    __pydantic_config__ = STRICT_KEYS

    window: Annotated[int, Range(ge=1, lt=2**31)] | Literal["auto"] = 32
    """Steps of a block: its mean loss is a point of the fit, its end a refit. auto: a 64th of the run, 4 to 32."""
    floor: bool = False
    """Fit an irreducible loss as well."""
    gate: bool = True
    """Scale the rate by what the answers' tokens still have to learn against the prompts'; not where there is no
    prompt."""
    block_scaling: bool = True
    """A rate for each adapted matrix, by the gradient that comes from the answers' tokens."""
    calibrate: bool = False
    """Ours: divide the bound by how far the predicted descent is from the measured one."""
    alignment: bool = False
    """Ours: raise the rate while the last steps' directions still descend, lower it when they do not, and leave the
    bound alone."""
    overshoot: NonNegativeFloat = 0.0
    """Ours, with alignment: let a step go past the lowest point of its direction, by the share x / (x + 2) of the way
    there. 0 is the greedy step, which is too short for a rate that is annealed later where there is little noise."""
    confidence: NonNegativeFloat = 0.0
    """Ours, with alignment: change the rate only once the measured descent is so many standard errors away from where
    it is to be, and then in either direction by one factor. Gradients are mostly noise: without it, so is the rate."""
    anneal: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Ours: the share of the budget, at its end, over which the rate falls linearly to 0."""

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
    """GRAFF: the rate of every block from a small recurrent graph network that learns beside the model."""

    __pydantic_config__ = STRICT_KEYS

    outer_learning_rate: PositiveFloat = 1e-3
    """Adam's rate for the planner's weights."""
    outer_max_norm: PositiveFloat = 1.0
    """Clip the planner's gradient to this norm."""
    layers: Annotated[int, Range(ge=1, le=4)] = 1
    """Rounds of messages between the blocks, a step."""
    trace_decay: Fraction = 0.0
    """Weight of a step's effect on the loss two steps later; 0, the paper's, sees the next step's loss alone."""
    anneal: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Multiply the rate by a linear decay to zero over this last fraction of the budget."""
    guard: Annotated[Literal["lagged", "paper", "off"], OrOff()] = "lagged"
    """Keep rate x curvature under 1.9. paper: the curvature shares its noise with the step; lagged: it does not."""
    curvature: Literal["secant", "hvp"] = "secant"
    """hvp: from an exact Hessian-vector product on some steps, another forward and backward pass each time."""
    curvature_decay: Fraction = 0.95
    """Of the running secants. Closer to 1 the guard meets less noise, and sees a change later."""
    multipliers: Literal["free", "centred"] = "free"
    """centred: their geometric mean is 1, so that what all blocks share is the rate's alone."""
    regret: Literal["elapsed", "step"] = "elapsed"
    """What the planner lowers: elapsed, the next loss over the seconds so far; step, the next loss."""
    caution: NonNegativeFloat = 1.0
    """Weight of steps whose effect asks for a lower rate. The next loss alone asks for too low a one, which less than
    1 makes up for; 1 is the paper's."""
    graph: bool = True
    """off: no messages between blocks."""
    budget_feature: bool = True
    """off: the planner does not see the budget that is left."""
    online: bool = True
    """off: the planner does not learn during the run."""
    warm_start: str | None = None
    """A planner's weights, safetensors; `shipped`: those of the package. Without one it begins as a constant rate."""

    def problems(self, beside: Beside) -> Iterator[str]:
        if self.guard == "paper" and self.curvature == "hvp":
            yield "schedule.graff.curvature: hvp takes the secant's place, but guard: paper asks for the plain secant"
        if self.trace_decay and (self.guard == "paper" or self.curvature == "hvp"):
            yield "schedule.graff.trace_decay: needs the lagged secant; set guard: lagged or off, and curvature: secant"


@dataclass(frozen=True, kw_only=True)
class SalelrConfig:
    """SALeLR: a rate for each adapted matrix by its gradient's running norm, over the linear schedule."""

    __pydantic_config__ = STRICT_KEYS

    exponent: Annotated[float, Range(ge=0, le=1)] = 0.5
    """Of a matrix's norm over the mean of all: its factor on the rate."""
    most: AtLeastOne = 4.0
    """The factor stays within 1/most and most."""
    decay: Fraction = 0.95
    """Of the running norms, a step."""


@dataclass(frozen=True, kw_only=True)
class BatsConfig:
    """BATS: the linear schedule, scaled by the Fisher information of the last batch's labelled tokens."""

    __pydantic_config__ = STRICT_KEYS

    exponent: Annotated[float, Range(ge=0, le=1)] = 0.5
    """Of the last batch's information over the running mean: the factor on the rate."""
    most: AtLeastOne = 2.0
    """The factor stays within 1/most and most."""
    decay: Fraction = 0.95
    """Of the running mean, a step."""


@dataclass(frozen=True, kw_only=True)
class ReactorConfig:
    """REACTOR: a policy that changes the rate every few steps, and learns from the loss by REINFORCE."""

    __pydantic_config__ = STRICT_KEYS

    window: Annotated[int, Range(ge=2, lt=2**31)] = 8
    """Steps from one change of the rate to the next."""
    sigma: PositiveFloat = 0.05
    """Standard deviation of a change of the rate's logarithm: how far the policy tries."""
    policy_learning_rate: PositiveFloat = 0.03
    """Of the policy's weights, for a reward one standard deviation over the baseline."""
    baseline_decay: Fraction = 0.8
    """Of the rewards' running mean and variance, and of the state's, a window."""
    most: AtLeastOne = 10.0
    """The rate stays within 1/most and most times training.learning_rate."""


@dataclass(frozen=True, kw_only=True)
class SnacConfig:
    """SNAC: the rate times the share of the gradient's square that is signal and not noise."""

    __pydantic_config__ = STRICT_KEYS

    floor: Annotated[float, Range(gt=0, le=1)] = 0.01
    """The share is never taken for less."""
    decay: Fraction = 0.95
    """Of the running means that the share is the ratio of, a step."""


@dataclass(frozen=True, kw_only=True)
class BaconConfig(SnacConfig):
    """BACON: SNAC's share, times what the curvature and the budget leave, and a rate for each adapted matrix."""

    curvature_decay: Fraction = 0.95
    """Of the running curvatures, a step."""
    most: AtLeastOne = 4.0
    """A matrix's factor on the rate stays within 1/most and most."""


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry(Entry):
    reads_mean: bool = False
    """It tells signal from noise by Adam's running mean of the gradient, so that there has to be one."""
    holds_peak: bool = False
    """After the warm-up the learning rate stays at its peak."""


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
    """The rate at the end, as a share of the peak (linear, cosine, wsd, salelr, bats)."""
    decay_fraction: Annotated[float, Range(gt=0, le=1)] = 0.2
    """wsd: the share of the budget over which the rate decays."""

    @property
    def own(self) -> Any:
        """The chosen schedule's own section; None for one that has none."""
        return SCHEDULES[self.name].section_of(self)
