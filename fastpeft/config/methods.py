"""The family of fine-tuning methods: their shared section `adapter`, and each method's own section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastpeft.config.fields import STRICT_KEYS, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range
from fastpeft.config.registry import Beside, Entry, Registry


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    __pydantic_config__ = STRICT_KEYS

    rank: Annotated[int, Range(ge=1, le=256)] = 8
    """Rank r of every update B A."""
    alpha: PositiveFloat = 16.0
    """lora_alpha: the update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "attention"
    """Linear layers to adapt: `qv`, `attention` or `all-linear`; a regular expression that matches whole module names;
    or a list of name suffixes such as [query_proj, value_proj]."""


@dataclass(frozen=True, kw_only=True)
class RegulariserConfig:
    """The importance-weighted penalty of IW-LoRA."""

    __pydantic_config__ = STRICT_KEYS

    alpha: NonNegativeFloat = 1e-4
    """Strength of the penalty, added to the loss. 0 is plain LoRA."""
    beta: NonNegativeFloat = 1.0
    """Exponent on (1 - w_k)."""
    penalty: Literal["product", "factors"] = "product"
    """product: ||s B A||_F^2. factors: ||A||_F^2 + ||B||_F^2."""
    normalise: Literal["sum", "max"] = "sum"
    """Divide the sensitivities by their sum (as in the paper) or by their maximum."""
    estimator: Literal["exact", "sketch", "lora_a"] = "exact"
    """How the sensitivity ||dL/dW||_F is measured. lora_a needs warmup_learning_rate > 0."""
    calibration: Literal["separate", "inline"] = "separate"
    """separate: extra batches before training. inline: the sketch, measured free of cost during the learning-rate
    warm-up."""
    warmup_steps: PositiveInt = 150
    """Calibration batches; capped at 2 % of the budget, but at least 8."""
    warmup_learning_rate: NonNegativeFloat = 0.0
    """Learning rate of the adapter while lora_a calibrates. Its weights are restored afterwards."""
    decoupled: bool = False
    """Shrink A and B directly, as AdamW does with weight decay, instead of adding a gradient."""
    decoupled_alpha: NonNegativeFloat = 1.0
    """Strength of the penalty when decoupled; `alpha` is then not used."""
    online: bool = False
    """Keep measuring the sketch during training, and update the weights w_k."""
    online_decay: Annotated[float, Range(gt=0, lt=1)] = 0.99
    """Decay per step of the running mean of `online`."""

    TRIAL: ClassVar[dict[str, Any]] = {"warmup_steps": 2}

    def problems(self, beside: Beside) -> Iterator[str]:
        if self.estimator == "lora_a":
            if self.warmup_learning_rate <= 0:
                yield (
                    "regulariser.estimator: lora_a needs regulariser.warmup_learning_rate > 0: while B is "
                    "zero the gradient of A is identically zero, so every importance would be 0 / 0"
                )
            if self.calibration == "inline":
                yield "regulariser.calibration: inline takes the sketch; it does not go with estimator lora_a"
        if self.calibration == "inline" and beside.warmup_steps == 0:
            yield "regulariser.calibration: inline measures during the rate's warm-up, but schedule.warmup_steps is 0"
        if self.decoupled and beside.averages:
            yield (
                "regulariser.decoupled: it shrinks the weights at which the run trains, behind the average of "
                f"optimizer.name {beside.optimizer}; set regulariser.decoupled=false, or optimizer.name=adamw"
            )


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """Ranks that are pruned during training (method adalora, arXiv:2303.10512). adapter.rank is then not used."""

    __pydantic_config__ = STRICT_KEYS

    initial_rank: Annotated[int, Range(ge=1, le=256)] = 12
    """Rank of every matrix before pruning."""
    target_rank: Annotated[int, Range(ge=1, le=256)] = 8
    """Mean rank after pruning."""
    initial_fraction: Fraction = 0.1
    """Share of the budget before pruning begins."""
    final_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.5
    """Share of the budget after pruning has ended."""
    virtual_steps: PositiveInt = 1000
    """Virtual steps that the budget is divided into for pruning, independent of the number of optimizer steps."""
    prune_every: PositiveInt = 5
    """Virtual steps from one pruning to the next."""
    beta1: Annotated[float, Range(gt=0, lt=1)] = 0.85
    """Decay per step of the running mean of the sensitivity."""
    beta2: Annotated[float, Range(gt=0, lt=1)] = 0.85
    """Decay per step of the running mean of the sensitivity's deviation."""
    orthogonality: NonNegativeFloat = 0.5
    """Weight of the penalty that keeps A's rows and B's columns orthonormal."""

    def problems(self, beside: Beside) -> Iterator[str]:
        if self.initial_rank <= self.target_rank:
            yield (
                f"adalora.initial_rank: {self.initial_rank} leaves nothing to prune; it has to be over "
                f"adalora.target_rank, {self.target_rank}"
            )
        total = self.virtual_steps
        if round(self.final_fraction * total) == 0:
            yield "adalora.final_fraction: it is under one virtual step, so that the last pruning could come too late"
        if round(self.initial_fraction * total) >= total - round(self.final_fraction * total):
            yield "adalora.initial_fraction and .final_fraction: no virtual step is left between them to prune at"


@dataclass(frozen=True, kw_only=True)
class UniHyperLoraConfig:
    """One dictionary of atoms for host models of any width and depth (method unihyperlora). adapter.alpha scales its
    update; adapter.rank and adapter.dropout are not used."""

    __pydantic_config__ = STRICT_KEYS

    num_atoms: Annotated[int, Range(ge=2, le=4096)] = 128
    """M, rank-one atoms in the dictionary."""
    atom_width: Annotated[int, Range(ge=8, le=4096)] = 256
    """d0, stored numbers for each side of an atom."""
    width: Annotated[int, Range(ge=4, le=64)] = 16
    """q, the canonical width, in which tokens meet atoms."""
    top_k: Annotated[int, Range(ge=1, le=2)] = 2
    """Most active atoms per token and matrix. The papers' budget is 1 or 2."""
    projector: Literal["coordinate", "spectral", "probe"] = "coordinate"
    """Projection between a host's width and q. coordinate: a trained network of a unit's position, which reads nothing
    of the host. spectral: leading singular vectors of each frozen weight. probe: from the host's representations of
    fixed words; the adapter file contains codes of them."""
    budget_weight: NonNegativeFloat = 0.01
    """lambda_F, weight of the mean number of active atoms in the loss."""
    delta_weight: NonNegativeFloat = 1e-5
    """lambda_Q, weight of ||delta||^2."""
    task: str = "source"
    """Task whose embedding the router reads. If a file lacks it, the mean of the file's task embeddings."""
    adapter: str | None = None
    """File of an adapter to start from. Sizes and projector are then the file's."""
    train: Literal["all", "delta", "none"] = "all"
    """delta: train only the mixer's bias of an adapter from a file. none: train only the head."""
    max_mb: PositiveFloat = 1.0
    """Largest adapter file in MB. A larger one is refused."""
    max_extra_flops: PositiveFloat = 0.1
    """Largest overhead of the adapter, as a share of the model's FLOPs. More is refused."""

    def problems(self, beside: Beside) -> Iterator[str]:
        if self.train == "delta" and self.adapter is None:
            yield (
                "unihyperlora.train: delta trains the bias of an adapter that is there; name its file in "
                "unihyperlora.adapter"
            )


@dataclass(frozen=True, kw_only=True)
class SatLoraConfig:
    """Dictionaries of atoms shared by matrices of equal shape (methods sat_lora and hf_sat_lora). adapter.rank is the
    number of atoms that a token uses; the update is scaled by adapter.alpha / adapter.rank."""

    __pydantic_config__ = STRICT_KEYS

    num_atoms: Annotated[int, Range(ge=2, le=256)] = 24
    """M, rank-one atoms in each dictionary."""
    share_across_layers: bool = True
    """One dictionary for all matrices of a shape; off: one for each matrix."""
    max_mb: PositiveFloat = 32.0
    """Largest adapter file in MB. A larger one is refused."""
    max_extra_flops: PositiveFloat = 0.1
    """Largest overhead of the adapter, as a share of the model's FLOPs. More is refused."""


@dataclass(frozen=True, kw_only=True)
class MethodEntry(Entry):
    """Facts about a method that other modules need without importing it. Its class states the same."""

    trains_backbone: bool = False
    """The model's own weights are trained."""
    saved_as: str = "adapter"
    """Folder of the weights in a run's folder."""
    prunes: bool = False
    """It sets weights to zero during training, and they have to stay zero."""
    routes: bool = False
    """Its update depends on the token, so neither a LoRA nor merged weights can represent it."""


METHODS: Registry[MethodEntry] = Registry(
    "method",
    "method",
    [
        MethodEntry(name="lora", target="fastpeft.adapters.lora:Lora"),
        MethodEntry(name="rslora", target="fastpeft.adapters.rslora:RsLora"),
        MethodEntry(
            name="iw_lora",
            target="fastpeft.adapters.iw_lora:IwLora",
            config=RegulariserConfig,
            section="regulariser",
        ),
        MethodEntry(name="adalora", target="fastpeft.adapters.adalora:AdaLora", config=AdaLoraConfig, prunes=True),
        MethodEntry(
            name="unihyperlora",
            target="fastpeft.adapters.unihyperlora.method:UniHyperLora",
            config=UniHyperLoraConfig,
            routes=True,
        ),
        MethodEntry(name="sat_lora", target="fastpeft.adapters.sat_lora:SatLora", config=SatLoraConfig, routes=True),
        MethodEntry(
            name="hf_sat_lora",
            target="fastpeft.adapters.hf_sat_lora:HfSatLora",
            config=SatLoraConfig,
            section="sat_lora",
            routes=True,
        ),
        MethodEntry(name="full", target="fastpeft.adapters.full:FullFineTune", trains_backbone=True, saved_as="model"),
    ],
)
