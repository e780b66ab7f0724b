"""Optimizers over the flat buffers, with clipping, the non-finite guard and fp16 loss scaling.

All of it happens on the device: no step waits for its clip factor or its guard. A new optimizer is a subclass of
Optimizer in its own module, and one entry in config/optimizers.py, from which the tests of all optimizers take it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.optimizers import OPTIMIZERS, OptimizerConfig
from fastpeft.errors import UserError
from fastpeft.kernels import AdamWOptions, adamw_step, weighted_frobenius
from fastpeft.kernels.ops.adamw.reference import bias_correction
from fastpeft.signals import AdamMoments, Rates, Signals

FIRST_LOSS_SCALE = 2.0**16
SCALE_GROWTH_STEPS = 2000


def make_optimizer(flat: FlatParameters, config: OptimizerConfig, dtype: torch.dtype) -> Optimizer:
    """The optimizer `config.name`, before its first step.

    Args:
        flat: the trainable parameters.
        dtype: dtype of the activations. Only float16 gets a loss scale.

    Raises:
        UserError: the optimizer needs a package that is not installed.
    """
    return OPTIMIZERS.load(config.name)(flat, config, dtype)


class Optimizer(ABC):
    """Updates the flat parameters in place; `state_dict` and `load_state_dict` make a resume exact.

    Args:
        config: the section `optimizer`; `config.own` is the optimizer's own section, where its entry has a Config.
    """

    def __init__(self, flat: FlatParameters, config: OptimizerConfig, dtype: torch.dtype) -> None:
        self._flat, self._config, self.dtype = flat, config, dtype
        device = flat.data.device
        self.loss_scale = None
        """(), factor on the loss in fp16, else None. The gradients in the flat buffer are divided by it again."""
        head_decay = config.head_lr_ratio * config.head_weight_decay
        self._decay_U = np.where(flat.layout.in_head_U, head_decay, config.weight_decay)
        """(U,), weight decay of each unit, to be multiplied by Rates.lr."""
        self._good_steps = torch.zeros((), device=device)
        self.sums: frozenset[str] = frozenset()
        """The signals.BLOCK_SUMS that every update also computes, into signals.sums."""
        if dtype == torch.float16:
            self.loss_scale = torch.tensor(FIRST_LOSS_SCALE, device=device)

    def clip_guard_and_update(self, signals: Signals, rates: Rates) -> None:
        """One step, all on the device. Sets signals.skipped, and signals.grad_norm unless the adapter has measured it.

        A step whose loss or gradient is not finite changes no bit of parameters and state, and is not counted.
        """
        flat = self._flat
        if signals.grad_norm is None:
            signals.grad_norm = weighted_frobenius(flat.data, flat.grad, flat.layout).norm
        assert signals.grad_norm is not None
        signals.skipped = self._update(signals, signals.grad_norm, rates)
        if self.loss_scale is not None:
            self.adjust_scale(signals.skipped)

    def _on_device(self, multiplier_K: np.ndarray | None) -> torch.Tensor | None:
        if multiplier_K is None:
            return None
        host_K = torch.as_tensor(multiplier_K, dtype=torch.float32)
        device = self._flat.data.device
        return host_K.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host_K

    def shrink(self, rates: Rates) -> np.ndarray:
        """(U,), the factor of decoupled weight decay on each unit's parameters: 1 - rate * decay."""
        rate_U = rates.lr * self._decay_U
        if rates.multiplier_K is not None:
            rate_U[: self._flat.layout.num_blocks] *= rates.multiplier_K
        return 1 - rate_U

    def clip_divisor(self, norm: torch.Tensor) -> torch.Tensor:
        """(), the divisor that clips a gradient of this norm: max(1, norm / max_grad_norm)."""
        most = self._config.max_grad_norm
        return (norm / most).clamp_min(1.0) if most else torch.ones_like(norm)

    def second_moment(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(running mean of g^2 over the flat buffer, which must not be changed; its bias correction, (), a divisor).

        Before the first step the divisor is 0.

        Raises:
            ValueError: the optimizer has no second moment.
        """
        raise ValueError(f"optimizer {self._config.name} has no second moment to measure curvature with: use adamw")

    def adjust_scale(self, skipped: torch.Tensor) -> None:
        """fp16: halve the loss scale if `skipped` is 1 (an overflow), double it after 2,000 steps in a row with 0."""
        assert self.loss_scale is not None
        self._good_steps.add_(1).mul_(1 - skipped)
        grow = (self._good_steps >= SCALE_GROWTH_STEPS).float()
        self._good_steps *= 1 - grow
        self.loss_scale.mul_(1 + grow).mul_(1 - 0.5 * skipped).clamp_(1.0, 2.0**24)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a resume needs besides the parameters, by name. The tensors may be the optimizer's own buffers."""
        state = self._state()
        if self.loss_scale is not None:
            state["loss_scale"], state["good_steps"] = self.loss_scale, self._good_steps
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._load_state(state)
        if self.loss_scale is not None:
            self.loss_scale.copy_(state["loss_scale"])
            self._good_steps.copy_(state["good_steps"])

    def host_work(self) -> str | None:
        """Work of an update on the host, which prevents graph capture, as Adapter.host_work; None if there is none."""
        return "it is not known to leave the host alone"

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the flat parameters are the weights to evaluate and save. Afterwards they are restored bit for bit.
        Do not nest, and take no step inside."""
        yield

    @abstractmethod
    def _update(self, signals: Signals, norm: torch.Tensor, rates: Rates) -> torch.Tensor:
        """Clip by `norm`, guard and update. The clipped gradient stays in the flat buffer. Returns `skipped`, (): 1.0
        if nothing was changed."""

    @abstractmethod
    def _state(self) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def _load_state(self, state: dict[str, torch.Tensor]) -> None: ...


def adam_moments(config: OptimizerConfig) -> AdamMoments:
    """The settings of the moments, for schedules that read them."""
    return AdamMoments(beta1=config.beta1, beta2=config.beta2, max_norm=config.max_grad_norm)


def adamw_options(config: OptimizerConfig) -> AdamWOptions:
    return AdamWOptions(
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        max_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        head_weight_decay=config.head_weight_decay,
        head_ratio=config.head_lr_ratio,
    )


class FlatAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) on the adapter's and the head's parameters, in one launch."""

    def __init__(self, flat: FlatParameters, config: OptimizerConfig, dtype: torch.dtype) -> None:
        super().__init__(flat, config, dtype)
        self._options = adamw_options(config)
        self._exp_avg, self._exp_avg_sq = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        self._step = torch.zeros((), device=flat.data.device)

    def _update(self, signals: Signals, norm: torch.Tensor, rates: Rates) -> torch.Tensor:
        flat = self._flat
        found = adamw_step(
            flat.data,
            flat.grad,
            self._exp_avg,
            self._exp_avg_sq,
            self._step,
            flat.layout,
            lr=rates.applied,
            norm=norm,
            loss=signals.loss,
            multiplier_K=self._on_device(rates.multiplier_K),
            options=self._options,
            reduces=self.sums,
        )
        signals.sums = found.sums
        return found.skipped

    def host_work(self) -> str | None:
        return None

    def second_moment(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._exp_avg_sq, bias_correction(self._step, self._options.beta2)

    def _state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "step": self._step}

    def _load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._exp_avg.copy_(state["exp_avg"])
        self._exp_avg_sq.copy_(state["exp_avg_sq"])
        self._step.copy_(state["step"])


_COUNTERS = ("k", "weight_sum", "lr_max")


class ScheduleFreeAdamW(Optimizer):
    """Schedule-free AdamW (Defazio et al., arXiv:2405.15682) on the adapter's and the head's parameters.

    The package schedulefree computes it, with Adam's bias correction in the denominator. The flat buffer holds
    y = (1 - beta1) z + beta1 x, at which the gradient g is taken:

        z <- z - lr (g / (sqrt(v_hat) + eps) + decay y)
        x <- (1 - c) x + c z,  c = m^2 / (sum of m^2 over the steps),  m: the highest lr so far

    The schedule does the warm-up, whose small learning rates weigh little in x. `averaged` puts x in place of y.

    A step is about forty operations, where adamw has one launch. The guard holds copies of y, z and v during the
    update: three times the parameters' memory. The package counts steps on the host. The skip flag of step t is read in
    step t + 1, after that step's passes are queued, so the host never stalls.
    """

    def __init__(self, flat: FlatParameters, config: OptimizerConfig, dtype: torch.dtype) -> None:
        super().__init__(flat, config, dtype)
        data, cut = flat.data, flat.num_adapter
        self._z, self._exp_avg_sq = torch.zeros_like(data), torch.zeros_like(data)
        parts = (
            (slice(0, cut), config.weight_decay, 1.0),
            (slice(cut, len(data)), config.head_weight_decay, config.head_lr_ratio),
        )
        self._parts = [(part, ratio) for part, _, ratio in parts if part.start < part.stop]
        groups = [{"params": [data[part]], "weight_decay": d} for part, d, _ in parts if part.start < part.stop]
        betas = config.beta1, config.beta2
        self._inner = _package().AdamWScheduleFree(groups, betas=betas, eps=config.eps, weight_lr_power=2.0)
        self._inner.train()
        for (part, _), group in zip(self._parts, self._inner.param_groups):
            self._inner.state[group["params"][0]] |= {"z": self._z[part], "exp_avg_sq": self._exp_avg_sq[part]}
        on_gpu = data.device.type == "cuda"
        self._was_skipped = torch.zeros((), pin_memory=on_gpu)
        self._fetched = torch.cuda.Event() if on_gpu else None
        self._before: list[tuple] | None = None
        """Counters before the last step, kept until its skip flag is known."""

    def _update(self, signals: Signals, norm: torch.Tensor, rates: Rates) -> torch.Tensor:
        if rates.multiplier_K is not None or self.sums:
            raise ValueError("optimizer schedule_free takes no rates per matrix: use schedule.name constant, or adamw")
        flat = self._flat
        if self._num_steps() == 0:
            self._z.copy_(flat.data)
        good = norm.isfinite() & signals.loss.isfinite()
        if self._config.max_grad_norm:
            flat.grad.div_(self.clip_divisor(norm))
        grad = flat.grad.clone()  # the package overwrites it, and adapters read theirs after the step
        for (part, ratio), group in zip(self._parts, self._inner.param_groups):
            group["lr"] = rates.lr * ratio
            group["params"][0].grad = grad[part]
        buffers = flat.data, self._z, self._exp_avg_sq
        kept = [buffer.clone() for buffer in buffers]
        self._before = self._counters()
        self._inner.step()
        self._inner.zero_grad()
        for buffer, old in zip(buffers, kept):
            torch.where(good, buffer, old, out=buffer)
        skipped = (~good).to(flat.data.dtype)
        self._was_skipped.copy_(skipped, non_blocking=True)
        if self._fetched is not None:
            self._fetched.record()
        return skipped

    def host_work(self) -> str | None:
        return "its package counts steps on the host"

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self._num_steps() == 0:
            yield
            return
        kept = self._flat.data.clone()  # the package would interpolate back from x to y, which rounds
        self._inner.eval()
        try:
            yield
        finally:
            self._inner.train()
            self._flat.data.copy_(kept)

    def _counters(self) -> list[tuple]:
        return [tuple(group[name] for name in _COUNTERS) for group in self._inner.param_groups]

    def _set_counters(self, counters: list[tuple]) -> None:
        for group, values in zip(self._inner.param_groups, counters):
            group.update(zip(_COUNTERS, values))

    def _num_steps(self) -> int:
        """Number of steps taken. If the last step was skipped, first restores the counters from before it."""
        if self._before is not None:
            if self._fetched is not None:
                self._fetched.synchronize()
            if self._was_skipped:
                self._set_counters(self._before)
            self._before = None
        return self._inner.param_groups[0]["k"]

    def _state(self) -> dict[str, torch.Tensor]:
        z = self._z if self._num_steps() else self._flat.data
        counters = torch.tensor(self._counters(), dtype=torch.float64)
        return {"z": z, "exp_avg_sq": self._exp_avg_sq, "counters": counters}

    def _load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._before = None
        self._z.copy_(state["z"])
        self._exp_avg_sq.copy_(state["exp_avg_sq"])
        self._set_counters([(int(k), *sums) for k, *sums in state["counters"].tolist()])


def _package():
    try:
        import schedulefree
    except ImportError:
        raise UserError(
            "optimizer.name: schedule_free needs the package schedulefree, which is not installed: "
            "pip install schedulefree"
        ) from None
    return schedulefree
