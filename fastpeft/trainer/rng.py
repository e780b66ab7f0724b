"""State of random generators: those of dropout, for repeating a pass, and all of them, for a resume."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """States of the generators that dropout draws from. The host keeps them, so reading waits for no device."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_generator_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def rng_state() -> dict[str, Any]:
    """States of all global random generators, as tensors and JSON values."""
    version, keys, gauss = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    position = {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": [version, list(keys), gauss],
        "numpy": numpy | {"state": position},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    position = state["numpy"]["state"]
    key = np.array(position["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": {"key": key, "pos": position["pos"]}})


class GlobalRng:
    """The global generators as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return rng_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_rng_state(state)
