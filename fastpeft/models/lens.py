"""A logit lens on the first adapted layer (nostalgebraist 2020; Belrose et al., arXiv:2303.08112): its hidden states,
normalised as the model normalises its last ones, so that the model's own head reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.lm_head import bare_model


class FirstLayer:
    """The first layer of a causal LM with a LoRA factor in it, else the first of all; and the norm before the head.

    Raises:
        UserError: a decoder that is no list of layers with a norm behind it.
    """

    def __init__(self, model: nn.Module) -> None:
        decoder = bare_model(model).get_decoder()
        layers = next((child for child in decoder.children() if isinstance(child, nn.ModuleList)), None)
        norms = [child for child in decoder.children() if "norm" in type(child).__name__.lower()]
        if layers is None or not norms:
            raise UserError(
                f"the schedule reads the entropy behind the first layer, and {type(decoder).__name__} has no list of "
                "layers with a norm behind it; choose another schedule"
            )
        adapted = (layer for layer in layers if any(".lora_" in name for name, _ in layer.named_parameters()))
        self.layer, self.norm = next(adapted, layers[0]), norms[-1]
        self._hidden: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward pass: keeps what the layer gives, detached."""
        self._hidden = None

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._hidden = (output[0] if isinstance(output, tuple) else output).detach()

        hook = self.layer.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """(len(rows), D) for rows of the flattened tokens of the pass that was watched; forgets the pass."""
        assert self._hidden is not None
        hidden, self._hidden = self._hidden.flatten(0, 1)[rows], None
        return self.norm(hidden)
