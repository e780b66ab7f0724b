"""Schedules to test GRAFF with, and readings that a step might have measured.

Shape suffixes: K blocks, U units.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fastpeft.config.schedules import GraffConfig, ScheduleConfig
from fastpeft.schedules import make_schedule, planner
from fastpeft.schedules.graff import Graff
from fastpeft.signals import BlockSums, Measured, Secants
from tests.support.closed_loop import blocks_of

PEAK = 1e-3
BLOCKS = blocks_of(2, ("q", "v"), others=2)
K, U = len(BLOCKS), len(BLOCKS.num_elements)


def make(blocks=BLOCKS, peak_lr=PEAK, warmup_steps=0, **options) -> Graff:
    config = ScheduleConfig(name="graff", warmup_steps=warmup_steps, graff=GraffConfig(**options))
    return make_schedule(config, peak_lr, blocks)


def weights_file(tmp_path, seed: int, scale: float = 0.3) -> str:
    """A planner whose decoder says something."""
    weights_P = planner.initial_weights(seed)
    planner.views(weights_P)["decoder.weight"][:2] = scale * np.random.default_rng(seed).normal(size=(2, planner.STATE))
    planner.save_weights(tmp_path / "planner.safetensors", weights_P)
    return str(tmp_path / "planner.safetensors")


def reading(random: np.random.Generator, step: int, skipped: bool = False, curvature: float = 1.0) -> Measured:
    """What a step might have measured."""
    return Measured(
        step=step, progress=step / 500, elapsed_s=0.3 * step, lr=PEAK, num_tokens=100, loss=1.0, grad_norm=1.0,
        skipped=skipped, blocks=BlockSums(*random.normal(size=(4, U))),
        secant=Secants(curvature * random.normal(size=U), random.uniform(size=U)),
        lens_entropy=float(random.uniform(1, 3)),
    )  # fmt: skip


def trace(schedule: Graff, readings: list[Measured | None]) -> list[list[float]]:
    rates = [schedule.rates(measured, i / 500) for i, measured in enumerate(readings)]
    return [[r.lr, *r.multiplier_K] for r in rates]


def curved(step: int, curvature_U: np.ndarray, descent: float = 1.0) -> Measured:
    sums = BlockSums(*np.ones((3, U)), np.full(U, descent))
    return dataclasses.replace(
        reading(np.random.default_rng(step), step), blocks=sums, secant=Secants(curvature_U, np.ones(U))
    )
