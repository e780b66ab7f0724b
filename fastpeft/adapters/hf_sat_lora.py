"""HF-SAT-LoRA: SAT-LoRA with a function of a layer's depth and type in place of the mixing table.

The papers that name it give no definition. This is the project's reconstruction. Like SAT-LoRA it is trained separately
for each architecture.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpeft.adapters.sat_lora import SatLora
from fastpeft.adapters.unihyperlora.mixer import Mixer, conditions


class HfSatLora(SatLora):
    label = "HF-SAT-LoRA"

    def _make_mixing(self) -> dict[str, nn.Parameter]:
        self._conditions_SC = conditions(self.sites, self._device)
        self._mixer = Mixer(self.config.num_atoms, bits=8).to(self._device)
        return {"first": self._mixer.first, "second": self._mixer.second}

    def gains(self) -> torch.Tensor:
        return self._mixer(self._conditions_SC)
