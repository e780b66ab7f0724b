"""Optimizers over the flat buffers, with clipping, the non-finite guard and fp16 loss scaling.

All of it happens on the device: no step waits for its clip factor or its guard. A new optimizer is a subclass of
Optimizer in a module of its own, and one entry in config/optimizers.py: the tests that hold for all take it from there.
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
    """The optimizer that `config.name` names, at its first step.

    Args:
        flat: what is trained.
        dtype: of the activations; only float16 is given a loss scale.

    Raises:
        UserError: it needs a package that is not installed.
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
        """fp16: what the loss is multiplied by; the gradients in the flat buffer are divided by it again."""
        head_decay = config.head_lr_ratio * config.head_weight_decay
        self._decay_U = np.where(flat.layout.in_head_U, head_decay, config.weight_decay)
        """Of each unit, in units of Rates.lr."""
        self._good_steps = torch.zeros((), device=device)
        self.sums: frozenset[str] = frozenset()
        """Of signals.BLOCK_SUMS, what every update also leaves in signals.sums."""
        if dtype == torch.float16:
            self.loss_scale = torch.tensor(FIRST_LOSS_SCALE, device=device)

    def clip_guard_and_update(self, signals: Signals, rates: Rates) -> None:
        """One step, all on the device. Sets signals.skipped, and signals.grad_norm unless the adapter has measured it.

        A step whose loss or gradient is not finite changes no bit of parameters and state, and counts as none.
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
        """(U,): what a step multiplies each unit's parameters by before it moves them, 1 - rate decay."""
        rate_U = rates.lr * self._decay_U
        if rates.multiplier_K is not None:
            rate_U[: self._flat.layout.num_blocks] *= rates.multiplier_K
        return 1 - rate_U

    def clip_divisor(self, norm: torch.Tensor) -> torch.Tensor:
        """What a step divides a gradient of this norm by."""
        most = self._config.max_grad_norm
        return (norm / most).clamp_min(1.0) if most else torch.ones_like(norm)

    def second_moment(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The running mean of g^2 over the flat buffer, not to be changed, and (), what to divide it by.

        None may have been taken yet: the divisor is 0 then.
        """
        raise ValueError(f"optimizer {self._config.name} has no second moment to measure curvature with: use adamw")

    def adjust_scale(self, skipped: torch.Tensor) -> None:
        """fp16: halve the scale where `skipped` is 1 (an overflow), double it after 2,000 steps of 0."""
        assert self.loss_scale is not None
        self._good_steps.add_(1).mul_(1 - skipped)
        grow = (self._good_steps >= SCALE_GROWTH_STEPS).float()
        self._good_steps *= 1 - grow
        self.loss_scale.mul_(1 + grow).mul_(1 - 0.5 * skipped).clamp_(1.0, 2.0**24)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a resume needs besides the parameters, by name. What it holds may be the optimizer's own buffers."""
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
        """What an update leaves to the host, as Adapter.host_work."""
        return "it is not known to leave the host alone"

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the flat parameters are those to evaluate and to keep; afterwards they are what they were, bit for
        bit. Not to be nested, and no step inside."""
        yield

    @abstractmethod
    def _update(self, signals: Signals, norm: torch.Tensor, rates: Rates) -> torch.Tensor:
        """Clip by `norm`, guard, update, and leave the clipped gradient in the flat buffer. Returns `skipped`: (),
        1.0 where nothing was changed."""

    @abstractmethod
    def _state(self) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def _load_state(self, state: dict[str, torch.Tensor]) -> None: ...


def adam_moments(config: OptimizerConfig) -> AdamMoments:
    """What schedules that read the moments have to know of them."""
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

    The package schedulefree computes it, with Adam's bias correction in the denominator. With the gradient g at
    y = (1 - beta1) z + beta1 x, which is what the flat buffer holds:

        z <- z - lr (g / (sqrt(v_hat) + eps) + decay y)
        x <- (1 - c) x + c z,  c = m^2 / (sum of m^2 over the steps),  m: the highest lr so far

    The warm-up is the schedule's: its small rates weigh little in x. `averaged` puts x in place of y.

    A step is some forty operations, where adamw has one launch. The guard keeps copies of y, z and v while the package
    works: three times the parameters' memory for that while. The package counts steps on the host: the skip flag of
    step t is read in step t + 1, after that step's passes are queued, so the host never stalls.
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
        """Counters before the last step, until it is known whether that was skipped."""

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
        kept = self._flat.data.clone()  # the way back by interpolation would round
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
        """Steps that were taken; takes the last one back from the counters if it was skipped."""
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
