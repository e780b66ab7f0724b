"""What one training step measures, on the device and then on the host, and the learning rates a schedule returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch


class Need(StrEnum):
    """What a schedule can ask a step to measure. Nothing else is computed."""

    LOSS = "loss"
    """Loss and gradient norm. Every step has them; asking transfers them to the host."""
    GRAD_SQ = "grad_sq"
    """BlockSums.grad_sq_U. This and the next three come from the optimizer's kernel, in Measured.blocks."""
    MEAN_SQ = "mean_sq"
    """BlockSums.mean_sq_U."""
    SECOND = "second"
    """BlockSums.second_U."""
    DESCENT = "descent"
    """BlockSums.descent_U."""
    SECANT = "secant"
    """Measured.secant, curvature along the update before last, so that noise in the direction and noise in the gradient
    difference are independent (lagged secant). It costs two buffers of the adapter's size and one pass over them. A
    schedule asks for at most one of SECANT, PLAIN_SECANT and PRODUCT."""
    PLAIN_SECANT = "plain_secant"
    """The same along the last update. It costs one buffer."""
    PRODUCT = "product"
    """Measured.secant from a Hessian-vector product along the last update, every PRODUCT_EVERY steps
    (trainer/probes/curvature.py): two more forward and backward passes each time, and two buffers."""
    TOKENS = "tokens"
    """Fisher information and entropy of the labelled tokens, from the pass that computes the loss."""
    PROMPT = "prompt"
    """Fisher information of a sample of prompt tokens, every SAMPLE_EVERY steps (trainer/probes/hooks.py)."""
    LENS = "lens"
    """Entropy of the predictions for a sample of the labelled tokens, read out after the first adapted layer."""
    ANSWER_GRADIENT = "answer_gradient"
    """Gradients restricted to the labelled tokens, every SAMPLE_EVERY steps: Measured.answer_grad_sq_K."""


STATISTICS = ("answer_fisher", "prompt_fisher", "entropy", "lens_entropy")
"""Statistics that the loss may return with its value, by their names in Measured."""
BLOCK_SUMS = frozenset({Need.GRAD_SQ, Need.MEAN_SQ, Need.SECOND, Need.DESCENT})


@dataclass
class Signals:
    """Measurements of the current step. Tensors stay on the device, and reading one synchronizes with it."""

    loss: torch.Tensor
    """(), mean task loss of the batch, without the penalty."""
    num_tokens: int
    """Tokens of the batch, padding not counted."""
    penalty: torch.Tensor | None = None
    """(), the adapter's penalty as it enters the objective."""
    penalty_share: torch.Tensor | None = None
    """(), norm of the penalty's gradient over the norm of the whole gradient; when the penalty is decoupled, the same
    ratio of updates."""
    grad_norm: torch.Tensor | None = None
    """(), norm of the gradient of all trainable parameters, penalty included, before clipping."""
    skipped: torch.Tensor | None = None
    """(), 1.0 if the step was not taken because its loss or gradient is not finite, else 0.0."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars that the loss returned with its value, by their names in Measured."""
    sums: torch.Tensor | None = None
    """(U, 4), sums from the optimizer's update where a schedule asked for them: as kernels' AdamWResult.sums."""


@dataclass(frozen=True)
class Blocks:
    """The trainable parameters as a schedule sees them: the adapter's named blocks, then the other parameters.

    A schedule may give each block its own learning rate. For LoRA a block is one adapted matrix, A and B together.
    Another method may have blocks of any parameters; those of low rank come first.
    """

    names: tuple[str, ...]
    """Names of the K blocks."""
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    """Names that distinguish the blocks of one layer, such as `q_proj` or `query`."""
    num_elements: tuple[int, ...]
    """Trained elements of each of the U units: the K blocks, then each other parameter."""
    num_b_elements: tuple[int, ...] = ()
    """Elements that Measured.answer_grad_sq_K sums over in each of the K blocks: those of B, or all of them where the
    block is not of low rank."""
    rate_ratios: tuple[float, ...] = ()
    """Learning rate of each unit over `Rates.lr`, before multipliers; empty: 1 everywhere."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class AdamMoments:
    """Settings of the optimizer's moments, for schedules that read them."""

    beta1: float = 0.9
    beta2: float = 0.999
    max_norm: float = 0.0
    """The gradient is clipped to this norm before it enters the moments; 0: never."""


@dataclass(frozen=True)
class BlockSums:
    """Sums over the elements of each of the U units, each (U,) float64; NaN where no Need asked for them. `g` is the
    gradient before clipping, penalty included."""

    grad_sq_U: np.ndarray
    """g^2."""
    mean_sq_U: np.ndarray
    """Square of Adam's bias-corrected first moment."""
    second_U: np.ndarray
    """Adam's bias-corrected second moment, itself a mean of clipped g^2."""
    descent_U: np.ndarray
    """g u, where u is the direction of the previous step, theta <- theta - rate u, weight decay included. Such a step
    lowers this batch's loss by about rate times this sum."""


@dataclass(frozen=True)
class Secants:
    """Curvature summed over the elements of each of the U units, each (U,) float64. d is the parameters' last change,
    made by the previous step. d' is the change before d for Need.SECANT, and d itself for the other needs."""

    change_U: np.ndarray
    """d' (g(theta) - g(theta - d)), which estimates d'^T H d, as the two gradients come from different batches. For
    Need.PRODUCT, d^T H d on this step's batch."""
    square_U: np.ndarray
    """d' sqrt(v) d, where v is Adam's bias-corrected second moment that d was made with. The mean of change_U over the
    mean of this, over several steps, is the curvature preconditioned by Adam."""


@dataclass(frozen=True)
class Measured:
    """What a step measured, on the host. A schedule reads step t's when it sets the learning rate of step t + 1.
    Reading it sooner would stall on the device."""

    step: int
    """Number of the step, from 1."""
    progress: float
    """Share of the budget spent before the step."""
    elapsed_s: float
    """Seconds on the budget clock when the step was launched."""
    lr: float
    """`Rates.lr` of the step."""
    num_tokens: int
    loss: float
    grad_norm: float
    skipped: bool = False
    """The step changed nothing, because its loss or gradient was not finite. The other measurements are then void."""
    blocks: BlockSums | None = None
    secant: Secants | None = None
    answer_fisher: float | None = None
    """Mean of ||softmax(z) - onehot(y)||^2 over the labelled tokens (rows, for a classifier)."""
    prompt_fisher: float | None = None
    """answer_fisher over sampled prompt tokens; None on steps that sampled none, and where there is no prompt."""
    entropy: float | None = None
    """Mean entropy in nats of the predictions for the labelled tokens."""
    lens_entropy: float | None = None
    """The same entropy, read out after the first adapted layer."""
    answer_grad_sq_K: np.ndarray | None = None
    """(K,), ||dL/dB_k||^2 over the labelled tokens only, without the penalty; None on steps that did not measure it.
    For a classifier it is the whole gradient. Over several micro-batches it is an estimate: see
    trainer/probes/answer_gradient.py. For a block that is not of low rank it covers all of the block's parameters;
    where tokens are labelled this cannot be measured, and the run is refused."""


@dataclass(frozen=True)
class Rates:
    """Learning rates that a schedule returns for one step."""

    lr: float
    """Learning rate of all parameters, before `multiplier_K` and Blocks.rate_ratios."""
    multiplier_K: np.ndarray | None = None
    """(K,), factor on `lr` of each block, on the host; None: 1 everywhere."""
    lr_on_device: torch.Tensor | None = None
    """(), fp64, the learning rate inside a captured step, written before each replay. `lr` is then not read."""

    @property
    def applied(self) -> float | torch.Tensor:
        """The learning rate that the optimizer applies."""
        return self.lr if self.lr_on_device is None else self.lr_on_device
