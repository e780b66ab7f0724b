"""LoRA (Hu et al., arXiv:2106.09685): W x + (alpha / r) B A x, with W frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import peft

from fastpeft.adapters.adapter import Adapter, head_parameters
from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.methods import AdapterConfig
from fastpeft.models.backbone import Backbone
from fastpeft.models.inject import LowRankBlock, inject_lora


class Lora(Adapter):
    matrices: Sequence[LowRankBlock]
    """The blocks, which are all low-rank here."""
    export_format = "peft"
    _rank_stabilised = False

    def __init__(self, config: AdapterConfig, own: Any, backbone: Backbone) -> None:
        self.model, self.matrices = inject_lora(backbone, config, self._rank_stabilised)
        self.blocks = self.matrices
        self.flat = FlatParameters(self.blocks, head_parameters(self.model))

    @classmethod
    def build(cls, config: AdapterConfig, own: Any, backbone: Backbone) -> Self:
        return cls(config, own, backbone)

    @property
    def peft_model(self) -> peft.PeftModel:
        assert isinstance(self.model, peft.PeftModel)
        return self.model

    def save(self, folder: Path) -> None:
        self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)

    def describe(self) -> list[str]:
        matched = Counter(block.projection for block in self.blocks)
        kinds = ", ".join(f"{name} x {count}" for name, count in matched.items())
        trained, head = self.flat.num_adapter, self.flat.data.numel() - self.flat.num_adapter
        return [f"LoRA on {len(self.blocks)} matrices ({kinds}): {trained:,} parameters, head {head:,}"]
