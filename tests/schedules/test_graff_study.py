"""GRAFF in a closed loop against tuned linear: prints the final losses that say what each option is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpeft.config.schedules import GraffConfig, ScheduleConfig
from fastpeft.schedules import make_schedule
from tests.support.closed_loop import Loop, ResidualMlp, Task, train

NUM_STEPS, SEEDS = 1500, (0, 1, 2)
START_LRS = (1e-4, 1e-3, 4e-3)
OPTIONS = {
    "frozen": {"online": False},
    "default": {},
    "guard off": {"guard": "off"},
    "anneal 0.2": {"anneal": 0.2},
    "graph off": {"graph": False},
    "guard off, anneal 1": {"guard": "off", "anneal": 1.0},
    "guard off, anneal 1, caution 0.25": {"guard": "off", "anneal": 1.0, "caution": 0.25},
}


def final_loss(seed: int, name: str, lr: float, **options) -> float:
    """On 8,192 unseen rows, after NUM_STEPS without a warm-up."""
    task, model = Task(seed), ResidualMlp(seed, width=32, rank=64, num_blocks=6)
    assert 24_000 < model.flat.numel() < 26_000
    config = ScheduleConfig(name=name, warmup_steps=0, graff=GraffConfig(**options))
    loop = Loop(model, task.rows)
    train(loop, make_schedule(config, lr, model.blocks), NUM_STEPS)
    x_ND, y_N = task.rows(10**8, 8192)
    with torch.no_grad():
        return float((model(x_ND, loop.buffers[0]) - y_N).square().mean())


@pytest.mark.soak
def test_what_the_options_are_worth():
    linear = {lr: np.mean([final_loss(seed, "linear", lr) for seed in SEEDS]) for lr in (2e-3, 4e-3, 6e-3, 1e-2)}
    print(f"tuned linear {min(linear.values()):.4f}  {linear}")
    found = {}
    for name, options in OPTIONS.items():
        found[name] = [np.mean([final_loss(s, "graff", lr, **options) for s in SEEDS]) for lr in START_LRS]
        print(f"{name:34}", *(f"{lr:g}: {loss:.4f}" for lr, loss in zip(START_LRS, found[name])))
    assert found["guard off"][0] < found["frozen"][0] - 0.1  # a rate that is too low is mended
    cautious = found["guard off, anneal 1, caution 0.25"]
    assert max(cautious) - min(cautious) < 0.05  # over a range of 40 in the rate that it starts from
