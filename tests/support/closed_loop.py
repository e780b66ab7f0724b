"""A residual MLP of LoRA-shaped blocks, trained in a loop that measures what the trainer's step measures.

Shape suffixes: N rows, D width, R rank, K blocks, U units (blocks, then the head).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fastpeft.kernels import AdamWOptions, FlatLayout, MatrixGroup, adamw_step
from fastpeft.kernels.ops.adamw.op import SUMS
from fastpeft.schedules import Schedule
from fastpeft.signals import BLOCK_SUMS, Blocks, BlockSums, Measured, Need, Rates, Secants


def blocks_of(num_layers: int, projections: tuple[str, ...], others: int = 1) -> Blocks:
    """Blocks of a made-up model, and `others` parameters behind them."""
    names = [(layer, name) for layer in range(num_layers) for name in projections]
    return Blocks(
        names=tuple(f"layers.{layer}.{name}" for layer, name in names),
        layers=tuple(layer for layer, _ in names),
        projections=tuple(name for _, name in names),
        num_elements=(1,) * (len(names) + others),
    )


class ResidualMlp:
    """x <- x + B tanh(A x) for each block, then a linear head; its weights lie in one flat buffer."""

    def __init__(self, seed: int, width: int, rank: int, num_blocks: int, dtype: torch.dtype = torch.float32) -> None:
        self.width, self.rank, self.num_blocks = width, rank, num_blocks
        group = MatrixGroup(tuple(range(num_blocks)), rank, width, width, 1.0, 0)
        self.layout = FlatLayout([group], head=(width,))
        draw = torch.Generator().manual_seed(seed)
        self.flat = torch.randn(self.layout.num_total, generator=draw, dtype=torch.float64)
        self.flat[: group.middle] *= width**-0.5
        self.flat[group.middle :] *= 0.1 * rank**-0.5
        self.flat = self.flat.to(dtype)
        self.blocks = blocks_of(num_blocks // 2, ("q", "v"))

    def __call__(self, x_ND: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        (group,) = self.layout.groups
        for a_RD, b_DR in zip(group.stack_a(flat), group.stack_b(flat)):
            x_ND = x_ND + torch.tanh(x_ND @ a_RD.T) @ b_DR.T
        return x_ND @ flat[self.layout.num_factors :]


@dataclass
class Task:
    """Regression on a random teacher of another shape, with noise; rows are never seen twice."""

    seed: int
    width: int = 32
    num_rows: int = 32
    noise: float = 0.9
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(1000 + self.seed)
        hidden = 8
        self._in = torch.randn(hidden, self.width, generator=draw) * 2 * self.width**-0.5
        self._out = torch.randn(hidden, generator=draw) * 2 * hidden**-0.5

    def rows(self, step: int, num_rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        x_ND = torch.randn(num_rows or self.num_rows, self.width, generator=draw)
        y_N = torch.tanh(x_ND @ self._in.T) @ self._out + self.noise * torch.randn(len(x_ND), generator=draw)
        return x_ND.to(self.dtype), y_N.to(self.dtype)


@dataclass
class Loop:
    """One run. `step` is a training step; the loss and the measurements are those of the trainer."""

    model: ResidualMlp
    rows: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    options: AdamWOptions = field(default_factory=lambda: AdamWOptions(max_norm=1.0))
    needs: frozenset[Need] = BLOCK_SUMS | {Need.SECANT}
    step_s: float = 0.003
    num_taken: int = 0

    def __post_init__(self) -> None:
        flat = self.model.flat
        self.buffers = [flat.clone(), torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat)]
        self.count = torch.zeros(())
        self._changes = [torch.zeros_like(flat)] * 2
        self._grad_before: torch.Tensor | None = None
        self._shrink_U = np.ones(self.model.layout.num_units)

    def loss(self, step: int, flat: torch.Tensor) -> torch.Tensor:
        x_ND, y_N = self.rows(step)
        return (self.model(x_ND, flat) - y_N).square().mean()

    def gradient(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        flat = self.buffers[0].clone().requires_grad_()
        loss = self.loss(step, flat)
        return loss.detach(), torch.autograd.grad(loss, flat)[0]

    def step(self, schedule: Schedule, measured: Measured | None, progress: float) -> tuple[Measured, Rates]:
        self.num_taken += 1
        loss, grad = self.gradient(self.num_taken)
        rates = schedule.rates(measured, progress)
        return self.update(loss, grad, rates, progress), rates

    def update(self, loss: torch.Tensor, grad: torch.Tensor, rates: Rates, progress: float) -> Measured:
        flat, layout = self.buffers[0], self.model.layout
        before, raw = flat.clone(), grad.clone()
        multiplier_K = None
        if rates.multiplier_K is not None:
            multiplier_K = torch.as_tensor(rates.multiplier_K, dtype=flat.dtype)
        self.buffers[1].copy_(grad)
        sums = adamw_step(
            *self.buffers, self.count, layout, lr=rates.lr, norm=grad.norm(), options=self.options,
            multiplier_K=multiplier_K, reduces=SUMS,
        ).sums.double().numpy()  # fmt: skip
        secants = self._secants(raw)
        self._changes = [self._changes[1], flat - before]
        self._grad_before = raw
        blocks = BlockSums(sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3] / self._shrink_U)
        rate_U = np.full(layout.num_units, rates.lr)
        rate_U[: layout.num_matrices] *= 1.0 if rates.multiplier_K is None else rates.multiplier_K
        rate_U[layout.num_matrices :] *= self.options.head_ratio
        decay_U = np.full(layout.num_units, self.options.weight_decay)
        decay_U[layout.num_matrices :] = self.options.head_weight_decay
        self._shrink_U = 1 - rate_U * decay_U
        return Measured(
            step=self.num_taken, progress=progress, elapsed_s=self.num_taken * self.step_s, lr=rates.lr,
            num_tokens=len(raw), loss=float(loss), grad_norm=float(raw.norm()), blocks=blocks, secant=secants,
        )  # fmt: skip

    def _secants(self, raw: torch.Tensor) -> Secants | None:
        """Along the last change or the one before it, from the two last gradients."""
        if self._grad_before is None or not self.needs & {Need.SECANT, Need.PLAIN_SECANT}:
            return None
        before, last = self._changes
        along = before if Need.SECANT in self.needs else last
        root = (self.buffers[3] / -np.expm1(float(self.count) * np.log(self.options.beta2))).sqrt()
        sums = [self.model.layout.unit_sums(x) for x in ((raw - self._grad_before) * along, last * root * along)]
        return Secants(*(x.double().numpy() for x in sums))


def train(loop: Loop, schedule: Schedule, num_steps: int) -> list[Rates]:
    """A run of `num_steps`; its rates."""
    measured, taken = None, []
    loop.needs = schedule.needs
    for step in range(num_steps):
        measured, rates = loop.step(schedule, measured, step / num_steps)
        taken.append(rates)
    return taken
