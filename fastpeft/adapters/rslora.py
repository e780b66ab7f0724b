"""rsLoRA (Kalajdzievski, arXiv:2312.03732): LoRA scaled by alpha / sqrt(r), so that a larger r learns no slower."""

from __future__ import annotations

from fastpeft.adapters.lora import Lora


class RsLora(Lora):
    _rank_stabilised = True
