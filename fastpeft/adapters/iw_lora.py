"""IW-LoRA: LoRA with a Frobenius penalty whose strength differs per matrix.

    L = L_task + alpha * sum_k (1 - w_k)^beta * ||Delta_k||_F^2,    Delta_k = s B_k A_k

w_k is the normalised sensitivity s_k = E ||dL/dW_k||_F of the frozen weight, measured over a few
batches before training or, inline, over the first steps. More sensitive matrices are penalised less.

Shape suffixes: K adapted matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.adapters.adapter import Importance, to_json
from fastpeft.adapters.lora import Lora
from fastpeft.config.methods import AdapterConfig, RegulariserConfig
from fastpeft.errors import UserError
from fastpeft.kernels import FrobeniusResult, gradient_norm, sketch_norm, weighted_frobenius
from fastpeft.kernels.ops.lora_linear.quantised import dequantised, is_quantised
from fastpeft.kernels.ops.sensitivity.op import weight_gradient
from fastpeft.models.backbone import Backbone
from fastpeft.models.inject import LowRankBlock
from fastpeft.ranks import current
from fastpeft.runs.store import write_json
from fastpeft.signals import Rates, Signals

MIN_INLINE_STEPS = 8
INLINE_PROGRESS = 0.06
"""Share of the budget by which learning rate warmup, and with it inline calibration, has ended."""
HELD_BYTES = 64 * 2**20
"""Memory that the (X, G) of one matrix may take during calibration. If they exceed it and the size of G^T X, they are
reduced to G^T X at once. For 64 texts of 512 tokens all (X, G) of a model of 0.6B parameters take 36 GB, all G^T X
2 GB."""


def importance_weights(sensitivity_K: torch.Tensor, normalise: str) -> torch.Tensor:
    """w_k = s_k / sum_j s_j, or s_k / max_j s_j (section 2)."""
    total = sensitivity_K.sum() if normalise == "sum" else sensitivity_K.max()
    return sensitivity_K / total


class IwLora(Lora):
    def __init__(self, config: AdapterConfig, own: RegulariserConfig, backbone: Backbone) -> None:
        super().__init__(config, own, backbone)
        self.config = own
        device = self.flat.data.device
        self._sums_K = torch.zeros(len(self.blocks), dtype=torch.float64, device=device)
        self._num_batches = 0
        self._sensitivity_K: torch.Tensor | None = None
        self._coefficient_K = torch.zeros(len(self.blocks), device=device)
        """Written in place, because a captured step reads it by address. 0 until the sensitivities are known."""
        self._shrinkage = torch.empty_like(self.flat.data[: self.flat.num_factors]) if own.decoupled else None
        """Gradient of the penalty; None unless it is decoupled."""
        self._before_step: torch.Tensor | None = None
        self._inline = self.config.calibration == "inline"
        self.calibration_batches = 0 if self._inline else self.config.warmup_steps

    # ---- calibration (section 1) -----------------------------------------------------------

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Context in which s_k is measured at B = 0. On exit every parameter has its former value."""
        self._sums_K.zero_()
        self._num_batches = 0
        initial = self.flat.data.clone()
        dropouts = [m for block in self.matrices for m in block.module.lora_dropout.values()]
        modes = [dropout.training for dropout in dropouts]
        for dropout in dropouts:
            dropout.eval()
        if self.config.estimator == "exact":
            for block in self.matrices:
                block.module.probe = _GradientProbe(block)
        try:
            yield
        finally:
            for block in self.matrices:
                block.module.probe = None
            for dropout, mode in zip(dropouts, modes):
                dropout.train(mode)
            self.flat.data.copy_(initial)
            self.flat.grad.zero_()

    def finish_calibration(self) -> None:
        self._set_sensitivity(self._mean_sensitivity())

    def discard_pass(self) -> None:
        for block in self.matrices:
            if block.module.probe is not None:
                block.module.probe.discard()

    def before_calibration_batch(self) -> None:
        """Draw a new A, because the variance of the sketch comes from the draw of A rather than from the batches."""
        if self.config.estimator == "sketch":
            for block in self.matrices:
                nn.init.kaiming_uniform_(block.lora_a.data, a=math.sqrt(5))

    def after_calibration_batch(self, loss_scale: float) -> bool:
        estimator = self.config.estimator
        if estimator == "exact":
            norms = [block.module.probe.take() for block in self.matrices]
            measured_K = torch.stack(norms) / loss_scale
        elif estimator == "sketch":
            measured_K = self._sketch(self._frobenius(None, measure=True))
        else:
            measured_K = torch.stack([_grad(block.lora_a).square().sum() for block in self.matrices])
            self.flat.adapter.sub_(self.flat.adapter_grad, alpha=self.config.warmup_learning_rate)
        if loss_scale > 1 and not bool(measured_K.isfinite().all()):
            return False
        self._sums_K += measured_K
        self._num_batches += 1
        return True

    def _frobenius(self, coefficient_K: torch.Tensor | None, measure: bool) -> FrobeniusResult:
        flat, into = self.flat, None if coefficient_K is None else self._shrinkage
        return weighted_frobenius(
            flat.data, flat.grad, flat.layout, coefficient_K, penalty=self.config.penalty, into=into, measure=measure
        )

    def _sketch(self, measured: FrobeniusResult) -> torch.Tensor:
        """||dL/dW_k||_F from dL/dB_k, with the mean square of the actual A, ||A||^2 / (R I), as its variance."""
        assert measured.square_grad_b_K is not None
        assert measured.square_a_K is not None
        layout = self.flat.layout
        per_unit_K = layout.scale_K * (measured.square_a_K / layout.num_in_K).sqrt()
        return sketch_norm(measured.square_grad_b_K.sqrt(), 1.0, variance=1.0, rank=1).div_(per_unit_K).double()

    def _mean_sensitivity(self) -> torch.Tensor:
        mean_K = self._sums_K / max(1, self._num_batches)
        total = float(mean_K.sum())
        if not math.isfinite(total) or total <= 0:
            worst = [b.name for b, s in zip(self.matrices, mean_K.tolist()) if not math.isfinite(s)]
            cause = f"the gradient is not finite at {', '.join(worst[:3])}" if worst else "every gradient is zero"
            raise UserError(
                f"IW-LoRA: the importances cannot be normalised after {self._num_batches} calibration "
                f"batches, their total is {total}: {cause}. Check the data and training.precision"
            )
        return mean_K

    def _set_sensitivity(self, sensitivity_K: torch.Tensor) -> None:
        """Keep s_k and derive the coefficients alpha (1 - w_k)^beta (section 3)."""
        self.importance_version += 1
        self._sensitivity_K = sensitivity_K
        weights_K = importance_weights(sensitivity_K, self.config.normalise)
        strength = self.config.decoupled_alpha if self.config.decoupled else self.config.alpha
        self._coefficient_K.copy_(strength * (1 - weights_K).clamp_min(0) ** self.config.beta)

    # ---- the step (section 3) --------------------------------------------------------------

    def after_backward(self, signals: Signals, progress: float) -> None:
        if self._sensitivity_K is None and self._inline:
            measured = self._frobenius(None, measure=True)
            signals.grad_norm = measured.norm
            self._calibrate_inline(self._sketch(measured), progress)
        if self._sensitivity_K is None and (self._inline or self.config.online):
            signals.penalty = signals.penalty_share = torch.zeros_like(signals.loss)
            return
        if self.config.decoupled:
            self._before_step = self.flat.adapter.clone()
        result = self._frobenius(self._coefficient_K, measure=self.config.online)
        signals.penalty, signals.grad_norm = result.penalty, result.norm
        if self.config.decoupled:
            self._shrinkage_norm = result.penalty_norm
        else:
            signals.penalty_share = result.share
        if self.config.online:
            self._reweight(self._sketch(result))

    def host_work(self) -> str | None:
        if self.config.online:
            return "regulariser.online weighs the matrices anew in each step"
        if self._inline:
            return "regulariser.calibration inline counts the steps that it measures"
        return None

    def after_step(self, signals: Signals, rates: Rates, progress: float) -> None:
        """Decoupled: shrink A and B by the penalty's gradient, as AdamW decays weights."""
        if self._before_step is None:
            return
        assert signals.skipped is not None
        assert self._shrinkage is not None
        step = (1 - signals.skipped).mul_(rates.applied)
        factors = self.flat.data[: self.flat.num_factors]
        factors.addcmul_(self._shrinkage, step, value=-1)
        moved = (self.flat.adapter - self._before_step).norm()
        signals.penalty_share = self._shrinkage_norm * step / moved.clamp_min(1e-30)
        self._before_step = None

    def _calibrate_inline(self, measured_K: torch.Tensor, progress: float) -> None:
        """Average the sketches of the first training gradients, until learning rate warmup has ended."""
        self._sums_K += torch.where(measured_K.isfinite(), measured_K, 0)
        self._num_batches += 1
        enough = self._num_batches >= self.config.warmup_steps or progress >= INLINE_PROGRESS
        if self._num_batches >= MIN_INLINE_STEPS and enough:
            self._set_sensitivity(self._mean_sensitivity())

    def _reweight(self, measured_K: torch.Tensor) -> None:
        """`online`: the sketch of this step's gradient sets the coefficients of the next step."""
        assert self._sensitivity_K is not None
        old_K, decay = self._sensitivity_K, self.config.online_decay
        new_K = torch.where(measured_K.isfinite(), measured_K, old_K)
        self._set_sensitivity(decay * old_K + (1 - decay) * new_K)

    # ---- results ---------------------------------------------------------------------------

    def importance(self) -> Importance | None:
        if self._sensitivity_K is None:
            return None
        return Importance(
            names=[block.name for block in self.matrices],
            layer=[block.layer for block in self.matrices],
            projection=[block.projection for block in self.matrices],
            sensitivity=self._sensitivity_K.tolist(),
            weights=importance_weights(self._sensitivity_K, self.config.normalise).tolist(),
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"sums": self._sums_K, "num_batches": self._num_batches}
        if self._sensitivity_K is not None:
            state["sensitivity"] = self._sensitivity_K
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums_K.copy_(state["sums"])
        self._num_batches = state["num_batches"]
        if "sensitivity" in state:
            self._set_sensitivity(state["sensitivity"].to(self._sums_K.device))
        self.calibration_batches = 0 if self._sensitivity_K is not None else self.calibration_batches

    def save(self, folder: Path) -> None:
        """Write a plain PEFT LoRA adapter, and the importances in importance.json."""
        super().save(folder)
        importance = self.importance()
        if importance is not None:
            settings = {"normalise": self.config.normalise, "estimator": self.config.estimator}
            write_json(folder / "importance.json", to_json(importance, **settings))


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "FlatParameters has given it one"
    return parameter.grad


class _GradientProbe:
    """Replaces one LoRA layer at B = 0, and keeps (X, G) of every use, or the sum of G^T X, until `take`."""

    def __init__(self, block: LowRankBlock) -> None:
        self._like, self._shape = block.lora_a, (len(block.lora_b), block.lora_a.shape[1])
        self._uses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sum_OI: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The first layer's x requires no gradient. The anchor makes its output part of the autograd graph.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        dtype = x.dtype if is_quantised(weight) else weight.dtype
        return _ProbedLinear.apply(x.to(dtype), anchor, (weight, bias, self.keep))

    def keep(self, x: torch.Tensor, g: torch.Tensor) -> None:
        self._uses.append((x, g))
        if sum(tensor.nbytes for use in self._uses for tensor in use) > max(HELD_BYTES, 4 * x.shape[-1] * g.shape[-1]):
            self._add_up()

    def _add_up(self) -> None:
        for x, g in self._uses:
            gradient_OI = weight_gradient(x, g)
            self._sum_OI = gradient_OI if self._sum_OI is None else self._sum_OI.add_(gradient_OI)
        self._uses.clear()

    def _add_up_ranks(self) -> None:
        """Sum G^T X over the ranks before the norm; a rank without a row contributes zeros."""
        self._add_up()
        if self._sum_OI is None:
            self._sum_OI = self._like.new_zeros(self._shape)
        current().add_up(self._sum_OI)

    def discard(self) -> None:
        self._uses.clear()
        self._sum_OI = None

    def take(self) -> torch.Tensor:
        """||G^T X||_F of the sum over all uses since the last call, the two uses of a shared weight included."""
        if current().size > 1:
            self._add_up_ranks()
        if self._sum_OI is not None:
            self._add_up()
            norm = torch.linalg.vector_norm(self._sum_OI, dtype=torch.float64)
        elif self._uses:
            norm = gradient_norm([x for x, _ in self._uses], [g for _, g in self._uses])
        else:
            raise RuntimeError("a calibrated layer took no part in the forward pass")
        self.discard()
        return norm.double()


class _ProbedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, frozen: tuple) -> torch.Tensor:
        ctx.weight, bias, ctx.keep = frozen
        ctx.save_for_backward(x)
        return torch.nn.functional.linear(x, dequantised(ctx.weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (x,) = grad_outputs, ctx.saved_tensors
        ctx.keep(x.detach(), dy)
        return (dy @ dequantised(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None), None, None
