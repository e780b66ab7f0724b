"""What one training step measures, on the device and then on the host, and what a schedule answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch


class Need(StrEnum):
    """What a schedule can ask a step to measure. What nobody asks for is not computed."""

    LOSS = "loss"
    """Loss and gradient norm, which every step has; asking brings them to the host."""
    GRAD_SQ = "grad_sq"
    """BlockSums.grad_sq_U. This and the next three come from the optimizer's own launch, in Measured.blocks."""
    MEAN_SQ = "mean_sq"
    """BlockSums.mean_sq_U."""
    SECOND = "second"
    """BlockSums.second_U."""
    DESCENT = "descent"
    """BlockSums.descent_U."""
    SECANT = "secant"
    """Measured.secant, curvature along the update before last, so that noise in the direction and noise in the gradient
    difference are independent (lagged secant). It costs one buffer and one pass over the adapter. A schedule asks for
    at most one of the three kinds."""
    PLAIN_SECANT = "plain_secant"
    """The same along the last step's direction."""
    PRODUCT = "product"
    """Measured.secant from a Hessian-vector product along the last step's direction, on some steps: two more forward
    and backward passes each time, and two buffers."""
    TOKENS = "tokens"
    """Fisher information and entropy of the labelled tokens, from the pass that computes the loss."""
    PROMPT = "prompt"
    """Fisher information of a sample of prompt tokens, on some steps."""
    LENS = "lens"
    """Entropy of a sample of the labelled tokens as read out behind the first adapted layer."""
    ANSWER_GRADIENT = "answer_gradient"
    """Gradients restricted to the labelled tokens, on some steps: Measured.answer_grad_sq_K."""


STATISTICS = ("answer_fisher", "prompt_fisher", "entropy", "lens_entropy")
"""What the loss may measure on the way, by the names in Measured."""
BLOCK_SUMS = frozenset({Need.GRAD_SQ, Need.MEAN_SQ, Need.SECOND, Need.DESCENT})


@dataclass
class Signals:
    """Of the step that is being taken. Tensors stay on the device: reading one waits for it."""

    loss: torch.Tensor
    """Mean task loss of the batch, a scalar; the penalty is not in it."""
    num_tokens: int
    """Tokens of the batch, padding not counted."""
    penalty: torch.Tensor | None = None
    """Value of the adapter's penalty, as it enters the objective."""
    penalty_share: torch.Tensor | None = None
    """Norm of the penalty's part over the norm of the whole: of the gradient, or of the update
    when the penalty is decoupled."""
    grad_norm: torch.Tensor | None = None
    """Norm of the gradient of all trainable parameters, penalty included, before clipping."""
    skipped: torch.Tensor | None = None
    """1.0 if the step was not taken because its loss or gradient is not finite, else 0.0."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars that the loss measured on the way, by their names in Measured."""
    sums: torch.Tensor | None = None
    """(U, 4), of the optimizer's update where they were asked for: as kernels' AdamWResult.sums."""


@dataclass(frozen=True)
class Blocks:
    """What a schedule knows of what is trained: the adapter's named blocks, and behind them the other parameters.

    A block is what a schedule may give a learning rate of its own. For LoRA it is one adapted matrix, A and B together.
    Another method may have blocks of any parameters; those of low rank come first.
    """

    names: tuple[str, ...]
    """Of the K blocks."""
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    """`q_proj`, `query`: what tells the blocks of a layer apart."""
    num_elements: tuple[int, ...]
    """Trained elements of each of the U units: the K blocks, then each other parameter."""
    num_b_elements: tuple[int, ...] = ()
    """Elements that Measured.answer_grad_sq_K sums over in each of the K blocks: those of B, or all of a block that is
    not of low rank."""
    rate_ratios: tuple[float, ...] = ()
    """Learning rate of each unit over `Rates.lr`, multipliers apart; empty: 1 everywhere."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class AdamMoments:
    """How the optimizer's moments are made, for schedules that read them."""

    beta1: float = 0.9
    beta2: float = 0.999
    max_norm: float = 0.0
    """The gradient is clipped to this norm before; 0: never."""


@dataclass(frozen=True)
class BlockSums:
    """Sums over the elements of each of the U units, float64; NaN where nobody asked. `g` is the gradient before
    clipping, penalty included."""

    grad_sq_U: np.ndarray
    """g^2."""
    mean_sq_U: np.ndarray
    """Square of Adam's bias-corrected first moment."""
    second_U: np.ndarray
    """Adam's bias-corrected second moment, itself a mean of clipped g^2."""
    descent_U: np.ndarray
    """g u: u is the direction of the step before this one, theta <- theta - rate u, weight decay included. A step of
    that size in u lowers this batch's loss by about rate times this."""


@dataclass(frozen=True)
class Secants:
    """Curvature over the elements of each of the U units. d is the last change of the parameters, the step before this
    one's; d' is d too, but for Need.SECANT it is the change before."""

    change_U: np.ndarray
    """d' (g(theta) - g(theta - d)), that is d'^T H d where the batches are alike; for Need.PRODUCT d^T H d of this
    step's batch."""
    square_U: np.ndarray
    """d' sqrt(v) d, v Adam's bias-corrected second moment as it was when d was taken. Over several steps the mean
    change over the mean of this is the curvature that Adam's step meets."""


@dataclass(frozen=True)
class Measured:
    """What a step measured, on the host. A schedule sees that of step t when it sets the rate of step t + 1: reading
    it any sooner would wait for the device."""

    step: int
    """Number of the step, from 1."""
    progress: float
    """Share of the budget that was spent before it."""
    elapsed_s: float
    """On the budget's clock, when it was launched."""
    lr: float
    """Rate that it was taken with."""
    num_tokens: int
    loss: float
    grad_norm: float
    skipped: bool = False
    """It changed nothing, because its loss or gradient was not finite: the other figures mean nothing then."""
    blocks: BlockSums | None = None
    secant: Secants | None = None
    answer_fisher: float | None = None
    """Mean of ||softmax(z) - onehot(y)||^2 over the labelled tokens (rows, for a classifier)."""
    prompt_fisher: float | None = None
    """The same over sampled prompt tokens; None on steps that sampled none, and where there is no prompt."""
    entropy: float | None = None
    """Mean entropy in nats of the predictions for the labelled tokens."""
    lens_entropy: float | None = None
    """The same read out behind the first adapted layer."""
    answer_grad_sq_K: np.ndarray | None = None
    """||dL/dB_k||^2 of the part of the gradient that comes from labelled tokens' rows, without the penalty; None on
    steps that did not measure it. For a classifier that is the whole gradient. Of a batch of several micro-batches it
    is an estimate: see trainer/probes/answer_gradient.py. Of a block that is not of low rank it is the square of its
    whole gradient, and where tokens are labelled nobody can tell it: the run is refused."""


@dataclass(frozen=True)
class Rates:
    """What a schedule emits for one step."""

    lr: float
    """Learning rate of every parameter."""
    multiplier_K: np.ndarray | None = None
    """A factor on `lr` of each of the K blocks, on the host; None: 1 everywhere."""
    lr_on_device: torch.Tensor | None = None
    """(), fp64: where a step is captured once and replayed, the rate of each replay. `lr` is not read then."""

    @property
    def applied(self) -> float | torch.Tensor:
        """What an update multiplies by."""
        return self.lr if self.lr_on_device is None else self.lr_on_device
