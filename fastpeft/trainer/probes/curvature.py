"""Curvature from sums over units of parameter changes, gradients, and Adam's second moment.

Step t changes the parameters by d_t, which includes the adapter's own changes. Its gradient g_t is unclipped, penalty
included. No gradient is stored: the inner products <g_t, d> at two steps give the gradient's change along the same d.

Shape suffixes: U units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastpeft.adapters.flat import FlatParameters
from fastpeft.kernels import secant_sums
from fastpeft.signals import Secants
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.rng import generator_states, set_generator_states

PRODUCT_EVERY = 16
"""Sampling period of Hessian-vector products, in steps."""
Found = dict[str, torch.Tensor]
"""Tensors that a hook passes to `read`, by names that each class chooses."""


class Curvature(ABC):
    """One kind of curvature: a step's hooks, called by those of Probes, and `read` on the host one step later."""

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        optimizer.second_moment()  # raises if there is none
        self._flat, self._optimizer = flat, optimizer

    def before_passes(self, step: int, gradient: Callable[[], object]) -> Found:
        """`gradient` fills the gradient buffer for the batch of step number `step`. Parameters and random state are
        left as they were; the gradient buffer is not."""
        return {}

    def before_update(self, step: int) -> Found:
        """The buffer holds g_t, the optimizer v_{t-1}, and theta has not changed since d_{t-1}."""
        return {}

    def after_update(self, step: int, grad_norm: torch.Tensor) -> Found:
        """theta has changed by d_t; the gradient is clipped."""
        return {}

    @abstractmethod
    def read(self, step: int, found: dict[str, np.ndarray], num_taken: int) -> Secants | None:
        """The curvature of a step that was not skipped, from its hooks' tensors. None if the step measured none, or if
        it would involve a skipped step.

        Args:
            num_taken: length of the run of unskipped steps that ends with this one.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Difference(Curvature):
    """The gradient's change along one direction between two steps: <g_t, d> - <g_{t-1}, d>."""

    _along_U: np.ndarray | None = None
    """<g, d> at the step read last, for the d of the next step's difference."""

    def _change(self, along_U: np.ndarray, next_U: np.ndarray) -> np.ndarray:
        """`along_U`, <g_t, d>, minus its value at the previous step; `next_U` is kept for the next step."""
        before, self._along_U = self._along_U, next_U
        return along_U - (0 if before is None else before)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._along_U is None else {"along": torch.as_tensor(self._along_U)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._along_U = state["along"].numpy() if "along" in state else None


class Secant(_Difference):
    """Sums for Need.SECANT, along the change before last: one pass over two buffers of the parameters' size."""

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        super().__init__(flat, optimizer)
        self._previous = flat.data.clone()
        """The parameters before the last update."""
        self._older = torch.zeros_like(flat.data)
        """d_{t-2} when step t begins."""

    def before_update(self, step: int) -> Found:
        """One pass computes the sums; the next step's pass derives d_t from the parameters."""
        flat = self._flat
        found = secant_sums(
            flat.data, flat.grad, self._previous, self._older, *self._optimizer.second_moment(), flat.layout
        )
        return {"along": found.along_U, "along_before": found.along_before_U, "square": found.square_U}

    def read(self, step: int, found: dict[str, np.ndarray], num_taken: int) -> Secants | None:
        change_U = self._change(found["along_before"], next_U=found["along"])
        return Secants(change_U, found["square"]) if num_taken >= 3 else None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous": self._previous, "older": self._older}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._previous.copy_(state["previous"])
        self._older.copy_(state["older"])


class PlainSecant(_Difference):
    """Sums for Need.PLAIN_SECANT, along the last change. It keeps one buffer of the parameters' size."""

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        super().__init__(flat, optimizer)
        self._last = torch.zeros_like(flat.data)
        """d_{t-1} when step t begins; during the update the parameters before it, then d_t."""

    def before_update(self, step: int) -> Found:
        along = self._flat.layout.unit_sums(self._flat.grad * self._last)
        square = weighted_sums(self._flat, self._optimizer, self._last, self._last)
        self._last.copy_(self._flat.data)
        return {"along": along, "square": square}

    def after_update(self, step: int, grad_norm: torch.Tensor) -> Found:
        torch.sub(self._flat.data, self._last, out=self._last)
        clipped = self._flat.layout.unit_sums(self._flat.grad * self._last)
        return {"along_after": clipped * self._optimizer.clip_divisor(grad_norm)}

    def read(self, step: int, found: dict[str, np.ndarray], num_taken: int) -> Secants | None:
        change_U = self._change(found["along"], next_U=found["along_after"])
        return Secants(change_U, found["square"]) if num_taken >= 2 else None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last.copy_(state["last"])


class Product(Curvature):
    """Sums for Need.PRODUCT: d^T H d from a central difference along the last change d, and d sqrt(v) d.

    lora_linear has no second derivative. So the gradients at theta + e d and theta - e d, on the same batch with the
    same dropout, are projected on d. Their difference over 2 e is d^T H d, with an error of order e^2 and the
    gradients' rounding error over e. ||e d|| is a share of ||theta||, chosen on the stand-ins. Doubling or halving it
    changed the sum over all units by at most 0.5 % in fp32, where tests hold every unit to within a thousandth of
    autograd's product. In bf16 the sum was within 5 % of fp32's. H is the Hessian of the task loss, without the
    adapter's penalty.

    It takes two more forward and backward passes every PRODUCT_EVERY steps, and two buffers of the parameters' size.
    """

    SHIFT_FP32, SHIFT_16_BITS = 2e-3, 5e-3

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        super().__init__(flat, optimizer)
        self._shift = self.SHIFT_FP32 if optimizer.dtype.itemsize >= 4 else self.SHIFT_16_BITS
        self._change = torch.zeros_like(flat.data)
        """The last change when a product is due; during the step before, the parameters before its update."""
        self._holds_change = False

    @staticmethod
    def due(step: int) -> bool:
        """Whether step number `step`, from 1, takes a product: PRODUCT_EVERY + 1, 2 PRODUCT_EVERY + 1, and so on."""
        return step > 1 and step % PRODUCT_EVERY == 1

    def before_passes(self, step: int, gradient: Callable[[], object]) -> Found:
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

    def before_update(self, step: int) -> Found:
        if self.due(step + 1):
            self._change.copy_(self._flat.data)
        return {}

    def after_update(self, step: int, grad_norm: torch.Tensor) -> Found:
        self._holds_change = self.due(step + 1)
        if self._holds_change:
            torch.sub(self._flat.data, self._change, out=self._change)
        return {}

    def read(self, step: int, found: dict[str, np.ndarray], num_taken: int) -> Secants | None:
        if not self.due(step) or num_taken < 2:
            return None
        return Secants(found["product"], found["square"])

    def state_dict(self) -> dict[str, Any]:
        return {"change": self._change} if self._holds_change else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._holds_change = "change" in state
        if self._holds_change:
            self._change.copy_(state["change"])


def weighted_sums(flat: FlatParameters, optimizer: Optimizer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(U,), sums of a sqrt(v) b, where v is the bias-corrected second moment."""
    second, divisor = optimizer.second_moment()
    return flat.layout.unit_sums(second.sqrt().mul_(a).mul_(b)) / divisor.sqrt().to(a.dtype)
