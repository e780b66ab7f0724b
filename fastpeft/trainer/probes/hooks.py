"""A step's measurements for a schedule: taken during the step, sent to the host in one transfer, read a step later.

    before_passes  around_pass...  after_passes  take_measured  around_update

`take_measured` returns the measurements of the previous step. It comes after the passes, so that the device has work
while the host waits for the transfer, which was queued before them.

Shape suffixes: K blocks, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpeft.adapters import Adapter
from fastpeft.data.batches import Batch
from fastpeft.models.lens import FirstLayer
from fastpeft.ranks import ALONE, Ranks
from fastpeft.signals import BLOCK_SUMS, STATISTICS, BlockSums, Measured, Need, Rates, Signals
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.probes.answer_gradient import AnswerGradient
from fastpeft.trainer.probes.curvature import Curvature, PlainSecant, Product, Secant
from fastpeft.trainer.probes.transfer import Transfer

SAMPLE_EVERY = 16
"""Sampling period, in steps. Prompt statistics cost an LM-head pass over up to 1,024 tokens; the labelled-token
gradient costs one extra GEMM per adapted matrix."""
_SAMPLED = frozenset({Need.PROMPT, Need.ANSWER_GRADIENT})
_CURVATURE: dict[Need, type[Curvature]] = {
    Need.SECANT: Secant,
    Need.PLAIN_SECANT: PlainSecant,
    Need.PRODUCT: Product,
}


class NoProbes:
    """The hooks of a schedule that needs no measurement. They launch nothing."""

    needs: frozenset[Need] = frozenset()

    def begin(self, step: int, progress: float, elapsed_s: float) -> None: ...

    def before_passes(self, gradient: Callable[[], object]) -> None: ...

    def around_pass(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def after_passes(self, loss_scale: torch.Tensor | None) -> None: ...

    def take_measured(self) -> None:
        return None

    def around_update(self, signals: Signals, rates: Rates) -> AbstractContextManager[None]:
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


NO_PROBES = NoProbes()


def make_probes(
    needs: Collection[Need], adapter: Adapter, optimizer: Optimizer, ranks: Ranks = ALONE
) -> Probes | NoProbes:
    """The probes for a schedule's needs. Raises what Probes raises."""
    return Probes(needs, adapter, optimizer, ranks) if needs else NO_PROBES


class Probes:
    """The hooks of one run's steps."""

    def __init__(self, needs: Collection[Need], adapter: Adapter, optimizer: Optimizer, ranks: Ranks = ALONE) -> None:
        """
        Args:
            needs: the schedule's needs.
            ranks: the run's ranks, which all have the same hooks.

        Raises:
            ValueError: the optimizer cannot measure a need; two kinds of curvature at once.
            UserError: the model cannot measure a need.
        """
        self._wanted = frozenset(needs)
        curvature = self._wanted & _CURVATURE.keys()
        if len(curvature) > 1:
            raise ValueError(f"a schedule takes one kind of curvature, not {', '.join(sorted(curvature))}")
        if Need.LENS in self._wanted:
            FirstLayer(adapter.model)  # raises for a model that it cannot read
        self._optimizer = optimizer
        optimizer.sums = self._wanted & BLOCK_SUMS
        self._answers = AnswerGradient(adapter, ranks) if Need.ANSWER_GRADIENT in self._wanted else None
        self._curvature = next((_CURVATURE[need](adapter.flat, optimizer) for need in curvature), None)
        self._reader = _Reader(np.ones(adapter.flat.layout.num_units), self._curvature)
        self._step = 0
        self._found: dict[str, torch.Tensor] = {}
        self._pending: _Pending | None = None

    # ---- the step's hooks ------------------------------------------------------------------

    def begin(self, step: int, progress: float, elapsed_s: float) -> None:
        """Called before step number `step`, from 1."""
        self._step, self._progress, self._elapsed_s = step, progress, elapsed_s

    @property
    def needs(self) -> frozenset[Need]:
        """The needs that this step measures."""
        return self._wanted if self._step % SAMPLE_EVERY == 1 else self._wanted - _SAMPLED

    def before_passes(self, gradient: Callable[[], object]) -> None:
        """`gradient` runs the passes over this step's batch. A step may call this again if its passes are repeated."""
        self._found = {}
        if self._curvature is not None:
            self._found |= self._curvature.before_passes(self._step, gradient)
        if self._answers is not None:
            self._answers.start()

    @contextmanager
    def around_pass(self, batch: Batch) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch."""
        if self._answers is None or Need.ANSWER_GRADIENT not in self.needs:
            yield
            return
        self._answers.before_pass(batch)
        yield
        self._answers.after_pass()

    def after_passes(self, loss_scale: torch.Tensor | None) -> None:
        """Called when the flat buffer holds the gradient of the loss alone."""
        if self._answers is not None and Need.ANSWER_GRADIENT in self.needs:
            self._found["answer_grad_sq"] = self._answers.squares(loss_scale)

    def take_measured(self) -> Measured | None:
        """The previous step's measurements, handed out once. Waits for their transfer. None at a run's first step."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return self._reader.read(pending, pending.transfer.wait())

    @contextmanager
    def around_update(self, signals: Signals, rates: Rates) -> Iterator[None]:
        """Around the optimizer's update and the adapter's work after it."""
        self.before_update()
        yield
        self.after_update(signals, rates)

    def before_update(self) -> None:
        """The flat buffer holds the whole gradient, and no parameter has changed since the previous step."""
        if self._curvature is not None:
            self._found |= self._curvature.before_update(self._step)

    def after_update(self, signals: Signals, rates: Rates) -> None:
        """All parameters have changed; the buffer holds the clipped gradient. Starts the transfer to the host."""
        assert signals.grad_norm is not None
        assert signals.skipped is not None
        if self._curvature is not None:
            self._found |= self._curvature.after_update(self._step, signals.grad_norm)
        found = {"loss": signals.loss, "grad_norm": signals.grad_norm, "skipped": signals.skipped}
        found |= signals.statistics | self._found
        if signals.sums is not None:
            found["sums"] = signals.sums
        launched = {"step": self._step, "progress": self._progress, "elapsed_s": self._elapsed_s, "lr": rates.lr}
        launched["num_tokens"] = signals.num_tokens
        self._pending = _Pending(launched, self._optimizer.shrink(rates), Transfer.launch(found))
        self._found = {}

    # ---- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """To be called between two steps. Waits for the device."""
        state: dict[str, Any] = {"reader": self._reader.state_dict()}
        if self._pending is not None:
            state["pending"] = self._pending.state_dict()
        if self._curvature is not None:
            state["curvature"] = self._curvature.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reader.load_state_dict(state["reader"])
        self._pending = _Pending.of(state["pending"]) if "pending" in state else None
        if self._curvature is not None:
            self._curvature.load_state_dict(state["curvature"])


# ---- from the device to the schedule -----------------------------------------------------------


@dataclass(frozen=True)
class _Pending:
    """A step whose measurements may still be in transfer."""

    launched: dict[str, Any]
    """Facts that the host knew when it launched the step, by their names in Measured."""
    shrink_U: np.ndarray
    """As Optimizer.shrink."""
    transfer: Transfer

    def state_dict(self) -> dict[str, Any]:
        found = {name: torch.as_tensor(values) for name, values in self.transfer.wait().items()}
        return {"launched": self.launched, "shrink": torch.as_tensor(self.shrink_U), "found": found}

    @classmethod
    def of(cls, state: dict[str, Any]) -> _Pending:
        found = {name: tensor.numpy() for name, tensor in state["found"].items()}
        return cls(state["launched"], state["shrink"].numpy(), Transfer(found))


@dataclass
class _Reader:
    """Builds Measured from the tensors of consecutive steps."""

    shrink_U: np.ndarray
    """Optimizer.shrink of the last step that was not skipped."""
    curvature: Curvature | None
    in_a_row: int = 0
    """Steps taken since the last skipped one."""

    def read(self, pending: _Pending, found: dict[str, np.ndarray]) -> Measured:
        facts: dict[str, Any] = pending.launched | {
            "loss": float(found["loss"]),
            "grad_norm": float(found["grad_norm"]),
        }
        if found["skipped"]:
            self.in_a_row = 0
            return Measured(skipped=True, **facts)
        self.in_a_row += 1
        statistics: dict[str, Any] = {name: float(found[name]) for name in STATISTICS if name in found}
        blocks = self._blocks(found["sums"]) if "sums" in found else None
        self.shrink_U = pending.shrink_U
        secant = None if self.curvature is None else self.curvature.read(facts["step"], found, self.in_a_row)
        answer_grad_sq_K = found.get("answer_grad_sq")
        return Measured(blocks=blocks, secant=secant, answer_grad_sq_K=answer_grad_sq_K, **facts, **statistics)

    def _blocks(self, sums_U4: np.ndarray) -> BlockSums:
        grad_sq_U, mean_sq_U, second_U, dots_U = sums_U4.T
        return BlockSums(grad_sq_U, mean_sq_U, second_U, dots_U / self.shrink_U)

    def state_dict(self) -> dict[str, Any]:
        return {"shrink": torch.as_tensor(self.shrink_U), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shrink_U, self.in_a_row = state["shrink"].numpy(), state["in_a_row"]
