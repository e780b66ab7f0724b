"""What the steps of a made-up run measured, for any schedule: all that Measured has.

Shape suffixes: K blocks, U units (the blocks, then the head's two parameters).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from fastpeft.config.schedules import ScheduleConfig
from fastpeft.schedules import Schedule, make_schedule
from fastpeft.signals import BLOCK_SUMS, Blocks, BlockSums, Measured, Need, Rates, Secants

PEAK = 1e-3
K, U = 6, 8
BLOCKS = Blocks(
    names=tuple(f"layers.{i // 2}.{'qv'[i % 2]}" for i in range(K)),
    layers=tuple(i // 2 for i in range(K)),
    projections=("q", "v") * (K // 2),
    num_elements=(64,) * K + (32, 4),
    num_b_elements=(32,) * K,
)

# The fields of Measured that a need fills; what has no need is filled always.
FIELDS = {
    Need.LOSS: ("loss", "grad_norm"),
    **dict.fromkeys(BLOCK_SUMS, ("blocks",)),
    Need.SECANT: ("secant",),
    Need.PLAIN_SECANT: ("secant",),
    Need.PRODUCT: ("secant",),
    Need.TOKENS: ("answer_fisher", "entropy"),
    Need.PROMPT: ("prompt_fisher",),
    Need.LENS: ("lens_entropy",),
    Need.ANSWER_GRADIENT: ("answer_grad_sq_K",),
}


def make(name: str, warmup_steps: int = 5, seed: int = 0) -> Schedule:
    return make_schedule(ScheduleConfig(name=name, warmup_steps=warmup_steps), PEAK, BLOCKS, seed=seed)


def run_of(num_steps: int, seed: int = 0, skips: Collection[int] = ()) -> list[Measured]:
    """A run that learns: loss, entropy and gradients fall, with noise on all of them; steps of `skips` are skipped.

    Every third step has no sample of prompt tokens, as in a run.
    """
    rng = np.random.default_rng(seed)
    spread_U = rng.lognormal(0, 1, U)
    made = []
    for step in range(1, num_steps + 1):
        q = step / num_steps
        noisy = rng.lognormal(0, 0.1, 8)
        grad_sq_U = spread_U * rng.lognormal(0, 0.3, U) * (0.3 + 0.7 * (1 - q))
        measured = Measured(
            step=step,
            progress=(step - 1) / num_steps,
            elapsed_s=0.1 * (step - 1) + 0.01 * float(noisy[0]),
            lr=PEAK,
            num_tokens=1000,
            loss=float((0.3 + 3 * step**-0.4) * noisy[1]),
            grad_norm=float(np.sqrt(grad_sq_U.sum())),
            blocks=BlockSums(
                grad_sq_U=grad_sq_U,
                mean_sq_U=grad_sq_U * rng.uniform(0.05, 0.4, U),
                second_U=grad_sq_U * rng.lognormal(0, 0.2, U),
                descent_U=rng.normal(0.3, 1, U) * np.sqrt(grad_sq_U),
            ),
            secant=Secants(change_U=spread_U * rng.normal(0.5, 0.3, U), square_U=spread_U * rng.lognormal(0, 0.2, U)),
            answer_fisher=float((0.3 + 0.4 * (1 - q)) * noisy[2]),
            prompt_fisher=float(0.6 * noisy[3]) if step % 3 else None,
            entropy=float((0.5 + (1 - q)) * noisy[4]),
            lens_entropy=float(2.5 * noisy[5]),
            answer_grad_sq_K=grad_sq_U[:K] * rng.uniform(0.2, 0.8, K),
        )
        made.append(spoilt(measured, math.nan) if step in skips else measured)
    return made


def spoilt(measured: Measured, value: float) -> Measured:
    """A step that was skipped, all its figures being `value`."""
    unit_U = np.full(U, value)
    return replace(
        measured, skipped=True, loss=value, grad_norm=value, blocks=BlockSums(unit_U, unit_U, unit_U, unit_U),
        secant=Secants(unit_U, unit_U), answer_fisher=value, prompt_fisher=value, entropy=value, lens_entropy=value,
        answer_grad_sq_K=np.full(K, value),
    )  # fmt: skip


def only(measured: Measured, needs: Collection[Need]) -> Measured:
    """Without what none of the needs asks for."""
    kept = {name for need in needs for name in FIELDS[need]}
    dropped = {name for names in FIELDS.values() for name in names} - kept
    if measured.blocks is not None:
        unasked = {f"{need}_U": np.full(U, math.nan) for need in BLOCK_SUMS - set(needs)}
        measured = replace(measured, blocks=replace(measured.blocks, **unasked))
    return replace(measured, **{name: math.nan if name in FIELDS[Need.LOSS] else None for name in dropped})


def rates_of(schedule: Schedule, run: list[Measured], first: int = 0) -> list[Rates]:
    """The rates of every step of `run` from number `first` on, each seeing the step before it."""
    return [
        schedule.rates(run[i - 1] if i else None, run[i].progress if i < len(run) else 1.0)
        for i in range(first, len(run))
    ]


def table(rates: list[Rates]) -> np.ndarray:
    """(T, K) rates of the adapted matrices."""
    return np.array([rate.lr * (np.ones(K) if rate.multiplier_K is None else rate.multiplier_K) for rate in rates])
