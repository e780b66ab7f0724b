"""The generators that dropout draws from, so that a pass can be taken again with the same masks."""

from __future__ import annotations

import torch


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that dropout draws from; the host keeps them, so nothing waits."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_generator_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
