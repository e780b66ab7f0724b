"""Full fine-tuning: every weight is trained, in fp32, under autocast to the compute dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch

from fastpeft.adapters.adapter import Adapter
from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.methods import AdapterConfig
from fastpeft.models.backbone import Backbone, quiet_transformers


class FullFineTune(Adapter):
    saved_as = "model"
    export_format = "transformers"
    trains_backbone = True

    def __init__(self, backbone: Backbone) -> None:
        self.model = self._pretrained = backbone.model
        self._tokenizer = backbone.tokenizer
        parts: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            parts[any(name.startswith(f"{module}.") for module in backbone.head)].append(parameter)
        self.flat = FlatParameters([], head=parts[True], extra=parts[False])
        if backbone.dtype != torch.float32:
            for module in backbone.entry_points:  # separate autocast objects, since one cannot be entered twice
                module.forward = torch.autocast(self.flat.data.device.type, backbone.dtype)(module.forward)

    @classmethod
    def build(cls, config: AdapterConfig, own: Any, backbone: Backbone) -> Self:
        return cls(backbone)

    def save(self, folder: Path) -> None:
        """A folder that transformers loads: config, weights, tokenizer."""
        state, copies = {}, {}
        for name, tensor in self.model.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape)
            if place not in copies:  # tied weights are one tensor and are written once
                copies[place] = tensor.detach().clone()
            state[name] = copies[place]
        with quiet_transformers():
            self._pretrained.save_pretrained(str(folder), state_dict=state)
        self._tokenizer.save_pretrained(str(folder))

    def describe(self) -> list[str]:
        return [f"full fine-tuning: {self.flat.data.numel():,} parameters"]
