"""Sums over units of what curvature is read from: changes of the parameters, gradients, and Adam's second moment.

A step t changes the parameters by d_t, after the adapter has had its say, and g_t is its gradient, unclipped, penalty
included. No gradient is kept: <g_t, d> of the same d at two steps gives what its change along d is.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpeft.adapters.flat import FlatParameters
from fastpeft.kernels import secant_sums
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.rng import generator_states, set_generator_states

PRODUCT_EVERY = 16
"""Steps from one exact product to the next."""


class Secant:
    """Sums for Need.SECANT, along the change before the last: one pass over two buffers of the parameters' size."""

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        optimizer.second_moment()  # refuses
        self._flat, self._optimizer = flat, optimizer
        self._previous = flat.data.clone()
        """The parameters as they were before the last update."""
        self._older = torch.zeros_like(flat.data)
        """d_{t-2} as step t begins."""

    def before_update(self) -> dict[str, torch.Tensor]:
        """g_t lies in the buffer, v_{t-1} in the optimizer, and theta has not moved since d_{t-1}."""
        flat = self._flat
        found = secant_sums(
            flat.data, flat.grad, self._previous, self._older, *self._optimizer.second_moment(), flat.layout
        )
        return {"along": found.along_U, "along_before": found.along_before_U, "square": found.square_U}

    def after_step(self, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """The next step's pass takes d_t from the parameters."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        return {"previous": self._previous, "older": self._older}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._previous.copy_(state["previous"])
        self._older.copy_(state["older"])


class PlainSecant:
    """Sums for Need.PLAIN_SECANT, along the last change. It keeps one buffer of the parameters' size."""

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        optimizer.second_moment()  # refuses
        self._flat, self._optimizer = flat, optimizer
        self._last = torch.zeros_like(flat.data)
        """d_{t-1} as step t begins; while it is updated the parameters before, then d_t."""

    def before_update(self) -> dict[str, torch.Tensor]:
        """As Secant.before_update."""
        along = self._flat.layout.unit_sums(self._flat.grad * self._last)
        square = weighted_sums(self._flat, self._optimizer, self._last, self._last)
        self._last.copy_(self._flat.data)
        return {"along": along, "square": square}

    def after_step(self, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """theta has moved by d_t; the gradient is clipped."""
        torch.sub(self._flat.data, self._last, out=self._last)
        clipped = self._flat.layout.unit_sums(self._flat.grad * self._last)
        return {"along_after": clipped * self._optimizer.clip_divisor(grad_norm)}

    def state(self) -> dict[str, torch.Tensor]:
        return {"last": self._last}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._last.copy_(state["last"])


class Product:
    """Sums for Need.PRODUCT: d^T H d from a central difference, d the last change, and d sqrt(v) d.

    lora_linear has no second derivative. So the gradients at theta + e d and theta - e d, of the same batch with the
    same dropout, are taken along d, and their difference over 2 e is d^T H d up to a term in e^2 and up to the
    gradients' rounding over e. ||e d|| is a share of ||theta||, chosen on the stand-ins: twice and half of it moved the
    sum over all units by 0.5 % at most in fp32, where tests hold every unit to a thousandth of autograd's product; in
    bf16 the sum was within 5 % of fp32's. H is that of the task loss, without the adapter's penalty.

    It takes two more forward and backward passes every PRODUCT_EVERY steps, and two buffers of the parameters' size.
    """

    SHIFT_FP32, SHIFT_16_BITS = 2e-3, 5e-3

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        optimizer.second_moment()  # refuses
        self._flat, self._optimizer = flat, optimizer
        self._shift = self.SHIFT_FP32 if optimizer.dtype.itemsize >= 4 else self.SHIFT_16_BITS
        self._change = torch.zeros_like(flat.data)
        """The last change as a product is due; in the step before it, the parameters before its update."""

    @staticmethod
    def due(step: int) -> bool:
        """At step number `step`, from 1: the first to have had PRODUCT_EVERY steps before it, and so on."""
        return step > 1 and step % PRODUCT_EVERY == 1

    def before_passes(self, step: int, gradient: Callable[[], object]) -> dict[str, torch.Tensor]:
        """`gradient` fills the gradient buffer for the batch of this step. Parameters and random numbers are left as
        they were; the gradient buffer is not."""
        if not self.due(step):
            return {}
        flat, change = self._flat, self._change
        kept, device = flat.data.clone(), flat.data.device
        factor = self._shift * kept.norm() / change.norm().clamp_min(1e-12)
        generators = generator_states(device)
        sums = []
        try:
            for shift in (factor, -factor):
                torch.addcmul(kept, change, shift, out=flat.data)
                gradient()
                sums.append(flat.layout.unit_sums(flat.grad * change))
                set_generator_states(device, generators)
        finally:
            flat.data.copy_(kept)
        square = weighted_sums(flat, self._optimizer, change, change)
        return {"product": (sums[0] - sums[1]) / (2 * factor), "square": square}

    def before_update(self, step: int) -> None:
        if self.due(step + 1):
            self._change.copy_(self._flat.data)

    def after_step(self, step: int) -> None:
        if self.due(step + 1):
            torch.sub(self._flat.data, self._change, out=self._change)

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """After step number `step`."""
        return {"change": self._change} if self.due(step + 1) else {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if "change" in state:
            self._change.copy_(state["change"])


def weighted_sums(flat: FlatParameters, optimizer: Optimizer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(U,) sums of a sqrt(v) b, v the bias-corrected second moment."""
    second, divisor = optimizer.second_moment()
    return flat.layout.unit_sums(second.sqrt().mul_(a).mul_(b)) / divisor.sqrt().to(a.dtype)
