"""A learning rate that ends where a budget ends, in one's own loop; interrupted half-way and resumed.

python examples/budget_lr.py --steps 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import fastpeft


def make(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, fastpeft.BudgetLR]:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # each group's own rate is its peak
    # budget_s=1800 in place of total_steps follows seconds of wall clock.
    return model, optimizer, fastpeft.BudgetLR(optimizer, "wsd", total_steps=steps, decay_fraction=0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: fastpeft.BudgetLR, steps: int) -> list[float]:
    """The learning rate of each step."""
    rates = []
    for step in range(steps):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.results_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.results_dir / "budget_lr.pt"
    half = arguments.steps // 2

    model, optimizer, scheduler = make(arguments.steps)
    rates = train(model, optimizer, scheduler, half)
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], checkpoint)

    model, optimizer, scheduler = make(arguments.steps)  # as another process would
    for part, state in zip((model, optimizer, scheduler), torch.load(checkpoint, weights_only=True)):
        part.load_state_dict(state)
    rates += train(model, optimizer, scheduler, arguments.steps - half)

    for step in range(0, arguments.steps, max(1, arguments.steps // 10)):
        print(f"step {step:4d}  learning rate {rates[step]:.2e}  {'#' * round(rates[step] / max(rates) * 40)}")
    print(f"after the last step the rate is {scheduler.get_last_lr()[0]:.2e}")


if __name__ == "__main__":
    main()
