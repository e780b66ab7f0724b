"""What a schedule needs of a step: measured on the way, sent to the host in one transfer, and read a step later.

    before_passes  passes [before_pass, after_pass]...  after_passes  measured  before_update  after_step

`measured` is what the step before has measured. It comes after the passes, so that the device has their work while the
host waits for a transfer that was asked for before them.

Shape suffixes: K adapted matrices, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpeft.adapters import Adapter
from fastpeft.data.batches import Batch
from fastpeft.models.lens import FirstLayer
from fastpeft.signals import BlockSums, Measured, Need, Rates, Secants, Signals
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.probes.answer_gradient import AnswerGradient
from fastpeft.trainer.probes.curvature import PlainSecant, Product, Secant

SAMPLE_EVERY = 16
"""Steps from one look at prompt tokens to the next, and from one measuring of the labelled tokens' gradient: the one
takes part of them through the head, the other as many products more as B's gradients."""
_SAMPLED = frozenset({Need.PROMPT, Need.ANSWER_GRADIENT})
_CURVATURE = frozenset({Need.SECANT, Need.PLAIN_SECANT, Need.PRODUCT})
_STATISTICS = ("answer_fisher", "prompt_fisher", "entropy", "lens_entropy")


class Probes:
    """The hooks of one run's steps. Where nothing is needed they do nothing, and launch nothing."""

    def __init__(
        self, needs: Collection[Need] = (), adapter: Adapter | None = None, optimizer: Optimizer | None = None
    ) -> None:
        """
        Args:
            needs: the schedule's; with none the others may be left out.

        Raises:
            ValueError: an optimizer that cannot measure it; two kinds of curvature at once.
            UserError: a model that cannot.
        """
        self._wanted = frozenset(needs)
        self._step = 0
        self._pending: _Pending | None = None
        self._answers = self._secant = self._product = None
        if not self._wanted:
            return
        assert adapter is not None
        assert optimizer is not None
        if len(self._wanted & _CURVATURE) > 1:
            raise ValueError(f"a schedule takes one kind of curvature, not {', '.join(self._wanted & _CURVATURE)}")
        if Need.LENS in self._wanted:
            FirstLayer(adapter.model)  # refuses what it cannot read
        flat = adapter.flat
        self._optimizer = optimizer
        if Need.ANSWER_GRADIENT in self._wanted:
            self._answers = AnswerGradient(adapter)
        if Need.SECANT in self._wanted:
            self._secant = Secant(flat, optimizer)
        if Need.PLAIN_SECANT in self._wanted:
            self._secant = PlainSecant(flat, optimizer)
        if Need.PRODUCT in self._wanted:
            self._product = Product(flat, optimizer)
        self._reader = _Reader(np.ones(flat.layout.num_units))
        self._found: dict[str, torch.Tensor] = {}

    # ---- the step's hooks ------------------------------------------------------------------

    def begin(self, step: int, progress: float, elapsed_s: float) -> None:
        """Step number `step`, from 1, is going to be taken. It may begin more than once."""
        self._step, self._progress, self._elapsed_s = step, progress, elapsed_s

    @property
    def needs(self) -> frozenset[Need]:
        """What this step measures."""
        return self._wanted if self._step % SAMPLE_EVERY == 1 else self._wanted - _SAMPLED

    @property
    def reduces(self) -> bool:
        """The optimizer has to sum over blocks."""
        return Need.BLOCKS in self._wanted

    def before_passes(self, gradient: Callable[[], object]) -> None:
        """`gradient` takes the passes over this step's batch."""
        if not self._wanted:
            return
        self._found = {}
        if self._product is not None:
            self._found |= self._product.before_passes(self._step, gradient)
        if self._answers is not None:
            self._answers.start()

    def before_pass(self, batch: Batch) -> None:
        if self._answers is not None and Need.ANSWER_GRADIENT in self.needs:
            self._answers.before_pass(batch)

    def after_pass(self) -> None:
        if self._answers is not None:
            self._answers.after_pass()

    def after_passes(self, loss_scale: torch.Tensor | None) -> None:
        """The gradient of the loss, and of nothing else, is in the flat buffer."""
        if self._answers is not None and Need.ANSWER_GRADIENT in self.needs:
            self._found["answer_grad_sq"] = self._answers.squares(loss_scale)

    def measured(self) -> Measured | None:
        """What the step before measured; waits for it. None at a run's first step, and where nothing is needed."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return self._reader.read(pending, pending.transfer.wait())

    def before_update(self) -> None:
        """The whole gradient is in the flat buffer, and nothing has moved since the step before."""
        if self._secant is not None:
            self._found |= self._secant.before_update()
        if self._product is not None:
            self._product.before_update(self._step)

    def after_step(self, signals: Signals, rates: Rates) -> None:
        """Everything has moved, and the gradient is still there, clipped. Sends what was found to the host."""
        if not self._wanted:
            return
        assert signals.grad_norm is not None
        assert signals.skipped is not None
        if self._secant is not None:
            self._found |= self._secant.after_step(signals.grad_norm)
        if self._product is not None:
            self._product.after_step(self._step)
        found = {"loss": signals.loss, "grad_norm": signals.grad_norm, "skipped": signals.skipped}
        found |= signals.statistics | self._found
        if signals.sums is not None:
            found["sums"] = signals.sums
        launched = {"step": self._step, "progress": self._progress, "elapsed_s": self._elapsed_s, "lr": rates.lr}
        launched["num_tokens"] = signals.num_tokens
        self._pending = _Pending(launched, self._optimizer.shrink(rates), Transfer.launch(found))
        self._found = {}

    # ---- checkpoints -----------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Between two steps: tensors, and JSON values. Waits for the device."""
        if not self._wanted:
            return {}, {}
        values: dict[str, Any] = {"in_a_row": self._reader.in_a_row}
        tensors = {"reader.shrink": torch.as_tensor(self._reader.shrink_U)}
        if self._reader.along_U is not None:
            tensors["reader.along"] = torch.as_tensor(self._reader.along_U)
        if self._pending is not None:
            values["launched"] = self._pending.launched
            tensors["shrink"] = torch.as_tensor(self._pending.shrink_U)
            tensors |= {f"found.{k}": torch.as_tensor(v) for k, v in self._pending.transfer.wait().items()}
        if self._secant is not None:
            tensors |= _prefixed("secant.", self._secant.state())
        if self._product is not None:
            tensors |= _prefixed("product.", self._product.state(values["launched"]["step"] if self._pending else 0))
        return tensors, values

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        if not self._wanted:
            return
        along = tensors.get("reader.along")
        self._reader = _Reader(
            tensors["reader.shrink"].numpy(), None if along is None else along.numpy(), values["in_a_row"]
        )
        if "launched" in values:
            found = {k: v.numpy() for k, v in _unprefixed("found.", tensors).items()}
            self._pending = _Pending(values["launched"], tensors["shrink"].numpy(), Transfer(found))
        if self._secant is not None:
            self._secant.load_state(_unprefixed("secant.", tensors))
        if self._product is not None:
            self._product.load_state(_unprefixed("product.", tensors))


IDLE = Probes()
"""Of schedules that need nothing."""


# ---- from the device to the schedule -----------------------------------------------------------


class Transfer:
    """Figures on their way to the host: from a GPU all in one copy, which nothing waits for until `wait`."""

    def __init__(self, values: dict[str, np.ndarray] | None = None) -> None:
        """`values`: what has arrived already."""
        self._values = values

    @classmethod
    def launch(cls, tensors: dict[str, torch.Tensor]) -> Transfer:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if not next(iter(tensors.values())).is_cuda:
            return cls({name: tensor.to(torch.float64, copy=True).numpy() for name, tensor in tensors.items()})
        self = cls()
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        self._sizes = {name: tensor.shape for name, tensor in tensors.items()}
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._host.copy_(packed, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        return self

    def wait(self) -> dict[str, np.ndarray]:
        """By their names, in float64."""
        if self._values is None:
            self._arrived.synchronize()
            parts = self._host.double().split([size.numel() for size in self._sizes.values()])
            self._values = {name: part.view(size).numpy() for (name, size), part in zip(self._sizes.items(), parts)}
        return self._values


@dataclass(frozen=True)
class _Pending:
    """A step whose figures may still be on their way."""

    launched: dict[str, Any]
    """What the host knew as it launched the step, by the names in Measured."""
    shrink_U: np.ndarray
    """As Optimizer.shrink."""
    transfer: Transfer


@dataclass
class _Reader:
    """Makes Measured of what steps have found, in their order."""

    shrink_U: np.ndarray
    """Of the last step that was taken."""
    along_U: np.ndarray | None = None
    """<g, d> of the step before, for the d that the next step sees g change along."""
    in_a_row: int = 0
    """Steps that were taken since the last that was skipped."""

    def read(self, pending: _Pending, found: dict[str, np.ndarray]) -> Measured:
        facts = pending.launched | {"loss": float(found["loss"]), "grad_norm": float(found["grad_norm"])}
        if found["skipped"]:
            self.in_a_row = 0
            return Measured(skipped=True, **facts)
        self.in_a_row += 1
        statistics = {name: float(found[name]) for name in _STATISTICS if name in found}
        blocks = self._blocks(found["sums"]) if "sums" in found else None
        self.shrink_U = pending.shrink_U
        return Measured(
            blocks=blocks,
            secant=self._secant(found),
            answer_grad_sq_K=found.get("answer_grad_sq"),
            **facts,
            **statistics,
        )

    def _blocks(self, sums_U4: np.ndarray) -> BlockSums:
        grad_sq_U, mean_sq_U, second_U, dots_U = sums_U4.T
        return BlockSums(grad_sq_U, mean_sq_U, second_U, dots_U / self.shrink_U)

    def _secant(self, found: dict[str, np.ndarray]) -> Secants | None:
        """None where a step that was not taken has a part in it."""
        before = self.along_U
        if "product" in found:
            change_U, num_steps = found["product"], 2
        elif "along_before" in found:
            change_U, num_steps = found["along_before"] - (0 if before is None else before), 3
            self.along_U = found["along"]
        elif "along_after" in found:
            change_U, num_steps = found["along"] - (0 if before is None else before), 2
            self.along_U = found["along_after"]
        else:
            return None
        return Secants(change_U, found["square"]) if self.in_a_row >= num_steps else None


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _unprefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
