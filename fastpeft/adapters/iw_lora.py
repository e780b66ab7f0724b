"""IW-LoRA: LoRA with a Frobenius penalty whose strength differs per matrix.

    L = L_task + alpha * sum_k (1 - w_k)^beta * ||Delta_k||_F^2,    Delta_k = s B_k A_k

w_k is the normalised sensitivity s_k = E ||dL/dW_k||_F of the frozen weight, measured over a few
batches before training. Matrices that matter are penalised less.

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

from fastpeft.adapters.base import Importance, register, to_json
from fastpeft.adapters.lora import Lora
from fastpeft.config import RunConfig
from fastpeft.errors import UserError
from fastpeft.kernels import factor_penalty, gradient_norm, product_penalty, sketch_norm
from fastpeft.models.backbone import Backbone
from fastpeft.runs.store import write_json
from fastpeft.signals import Rates, Signals

MIN_INLINE_STEPS = 8
INLINE_PROGRESS = 0.06
"""The rate's warm-up is over by this share of the budget, and so is inline calibration."""


def importance_weights(sensitivity_K: torch.Tensor, normalise: str) -> torch.Tensor:
    """w_k = s_k / sum_j s_j, or s_k / max_j s_j (section 2)."""
    total = sensitivity_K.sum() if normalise == "sum" else sensitivity_K.max()
    return sensitivity_K / total


@register("iw_lora")
class IwLora(Lora):
    def __init__(self, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(run, backbone)
        self.config = run.regulariser
        device = self.flat.data.device
        self._sums_K = torch.zeros(len(self.blocks), dtype=torch.float64, device=device)
        self._num_batches = 0
        self._sensitivity_K: torch.Tensor | None = None
        self._group_coefficients: list[torch.Tensor] = []
        self._penalty_gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before_step: torch.Tensor | None = None
        inline = self.config.calibration == "inline"
        self.calibration_batches = 0 if inline else self.config.warmup_steps

    # ---- calibration (section 1) -----------------------------------------------------------

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Measure s_k with the adapter frozen at B = 0; every parameter is restored afterwards."""
        self._sums_K.zero_()
        self._num_batches = 0
        initial = self.flat.data.clone()
        dropouts = [m for block in self.blocks for m in block.module.lora_dropout.values()]
        modes = [dropout.training for dropout in dropouts]
        for dropout in dropouts:
            dropout.eval()
        if self.config.estimator == "exact":
            for block in self.blocks:
                block.module.probe = _GradientProbe()
        try:
            yield
        finally:
            for block in self.blocks:
                block.module.probe = None
            for dropout, mode in zip(dropouts, modes):
                dropout.train(mode)
            self.flat.data.copy_(initial)
            self.flat.grad.zero_()

    def finish_calibration(self) -> None:
        self._set_sensitivity(self._mean_sensitivity())

    def discard_pass(self) -> None:
        for block in self.blocks:
            if block.module.probe is not None:
                block.module.probe.discard()

    def before_calibration_batch(self) -> None:
        """The sketch's spread comes from the draw of A, not from the batches: draw A anew."""
        if self.config.estimator == "sketch":
            for block in self.blocks:
                nn.init.kaiming_uniform_(block.lora_a.data, a=math.sqrt(5))

    def after_calibration_batch(self, loss_scale: float) -> bool:
        estimator = self.config.estimator
        if estimator == "exact":
            norms = [block.module.probe.take() for block in self.blocks]
            measured_K = torch.stack(norms) / loss_scale
        elif estimator == "sketch":
            measured_K = self._sketch()
        else:
            measured_K = torch.stack([block.lora_a.grad.square().sum() for block in self.blocks])
            self.flat.adapter.sub_(self.flat.adapter_grad, alpha=self.config.warmup_learning_rate)
        if loss_scale > 1 and not bool(measured_K.isfinite().all()):
            return False
        self._sums_K += measured_K
        self._num_batches += 1
        return True

    def _sketch(self) -> torch.Tensor:
        """||dL/dW_k||_F from dL/dB_k; v is the mean square that A really has."""
        out_K = torch.empty_like(self._sums_K)
        for group in self.flat.groups:
            norm_K = group.grad_b_KOR.flatten(1).norm(dim=1)
            mean_square_K = group.a_KRI.square().mean((1, 2))
            rank = group.a_KRI.shape[1]
            unit_K = sketch_norm(norm_K, group.scale, variance=1.0, rank=rank)
            out_K[group.index_K] = (unit_K / mean_square_K.sqrt()).double()
        return out_K

    def _mean_sensitivity(self) -> torch.Tensor:
        mean_K = self._sums_K / max(1, self._num_batches)
        total = float(mean_K.sum())
        if not math.isfinite(total) or total <= 0:
            worst = [b.name for b, s in zip(self.blocks, mean_K.tolist()) if not math.isfinite(s)]
            cause = f"the gradient is not finite at {', '.join(worst[:3])}" if worst else "every gradient is zero"
            raise UserError(
                f"IW-LoRA: the importances cannot be normalised after {self._num_batches} calibration "
                f"batches, their total is {total}: {cause}. Check the data and training.precision"
            )
        return mean_K

    def _set_sensitivity(self, sensitivity_K: torch.Tensor) -> None:
        """Keep s_k and derive each group's coefficients alpha (1 - w_k)^beta (section 3)."""
        self.importance_version += 1
        self._sensitivity_K = sensitivity_K
        weights_K = importance_weights(sensitivity_K, self.config.normalise)
        strength = self.config.decoupled_alpha if self.config.decoupled else self.config.alpha
        coefficient_K = strength * (1 - weights_K).clamp_min(0) ** self.config.beta
        self._group_coefficients = [coefficient_K[g.index_K].float() for g in self.flat.groups]

    # ---- the step (section 3) --------------------------------------------------------------

    def after_backward(self, signals: Signals, progress: float) -> None:
        self._measure_while_training(signals, progress)
        if self._sensitivity_K is None:
            signals.penalty = signals.penalty_share = torch.zeros_like(signals.loss)
            return
        penalty = product_penalty if self.config.penalty == "product" else factor_penalty
        total = torch.zeros((), device=self.flat.data.device)
        self._penalty_gradients = []
        for group, coefficient_K in zip(self.flat.groups, self._group_coefficients):
            value_K, da_KRI, db_KOR = penalty(group.a_KRI, group.b_KOR, coefficient_K, group.scale)
            total += value_K.sum()
            self._penalty_gradients.append((da_KRI, db_KOR))
        signals.penalty = total
        if self.config.decoupled:
            self._before_step = self.flat.adapter.clone()
            return
        for group, (da_KRI, db_KOR) in zip(self.flat.groups, self._penalty_gradients):
            group.grad_a_KRI.add_(da_KRI)
            group.grad_b_KOR.add_(db_KOR)
        signals.penalty_share = self._penalty_norm() / self.flat.adapter_grad.norm().clamp_min(1e-30)

    def after_step(self, signals: Signals, rates: Rates, progress: float) -> None:
        """Decoupled: shrink A and B by the penalty's gradient, as AdamW decays weights."""
        if self._before_step is None:
            return
        assert signals.skipped is not None
        step = rates.lr * (1 - signals.skipped)
        for group, (da_KRI, db_KOR) in zip(self.flat.groups, self._penalty_gradients):
            group.a_KRI.sub_(da_KRI * step)
            group.b_KOR.sub_(db_KOR * step)
        moved = (self.flat.adapter - self._before_step).norm()
        signals.penalty_share = self._penalty_norm() * step / moved.clamp_min(1e-30)
        self._before_step = None

    def _penalty_norm(self) -> torch.Tensor:
        squares = [da.square().sum() + db.square().sum() for da, db in self._penalty_gradients]
        return torch.stack(squares).sum().sqrt()

    def _measure_while_training(self, signals: Signals, progress: float) -> None:
        """The sketch from the training gradient itself: inline calibration, and `online`."""
        inline = self.config.calibration == "inline" and self._sensitivity_K is None
        if not inline and not self.config.online:
            return
        measured_K = self._sketch()
        if inline:
            self._sums_K += torch.where(measured_K.isfinite(), measured_K, 0)
            self._num_batches += 1
            enough = self._num_batches >= self.config.warmup_steps or progress >= INLINE_PROGRESS
            if self._num_batches >= MIN_INLINE_STEPS and enough:
                self._set_sensitivity(self._mean_sensitivity())
        elif self._sensitivity_K is not None:
            old_K, decay = self._sensitivity_K, self.config.online_decay
            new_K = torch.where(measured_K.isfinite(), measured_K, old_K)
            self._set_sensitivity(decay * old_K + (1 - decay) * new_K)

    # ---- results ---------------------------------------------------------------------------

    def importance(self) -> Importance | None:
        if self._sensitivity_K is None:
            return None
        return Importance(
            names=[block.name for block in self.blocks],
            layer=[block.layer for block in self.blocks],
            projection=[block.projection for block in self.blocks],
            sensitivity=self._sensitivity_K.tolist(),
            weights=importance_weights(self._sensitivity_K, self.config.normalise).tolist(),
        )

    def state(self) -> dict[str, torch.Tensor]:
        state = {"sums": self._sums_K, "num_batches": torch.tensor(self._num_batches)}
        if self._sensitivity_K is not None:
            state["sensitivity"] = self._sensitivity_K
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._sums_K.copy_(state["sums"])
        self._num_batches = int(state["num_batches"])
        if "sensitivity" in state:
            self._set_sensitivity(state["sensitivity"].to(self._sums_K.device))
        self.calibration_batches = 0 if self._sensitivity_K is not None else self.calibration_batches

    def save(self, folder: Path) -> None:
        """A plain PEFT LoRA adapter; the importances lie beside it in importance.json."""
        super().save(folder)
        importance = self.importance()
        if importance is not None:
            settings = {"normalise": self.config.normalise, "estimator": self.config.estimator}
            write_json(folder / "importance.json", to_json(importance, **settings))


class _GradientProbe:
    """Stands in for one LoRA layer at B = 0 and keeps (X, G) of every use until `take`."""

    def __init__(self) -> None:
        self._uses: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The first layer's x needs no gradient: the anchor makes its output part of the graph.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _ProbedLinear.apply(x.to(weight.dtype), anchor, (weight, bias, self._uses))

    def discard(self) -> None:
        self._uses.clear()

    def take(self) -> torch.Tensor:
        """||G^T X||_F over all uses since the last call, both uses of a shared weight added first."""
        if not self._uses:
            raise RuntimeError("a calibrated layer took no part in the forward pass")
        norm = gradient_norm([x for x, _ in self._uses], [g for _, g in self._uses])
        self._uses.clear()
        return norm.double()


class _ProbedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, frozen: tuple) -> torch.Tensor:
        weight, bias, ctx.uses = frozen
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.uses.append((x.detach(), dy))
        return (dy @ weight if ctx.needs_input_grad[0] else None), None, None
