"""Skips the frozen layers below the first adapted layer in a forward pass if their output is known.

Shapes: N rows of L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.lm_head import bare_model
from fastpeft.models.targets import BLOCK

_CLOSE = 1e-3


class FrozenPrefix:
    """Computes, or replaces, the output of the layers below the first adapted layer of a model.

    Raises:
        UserError: no layer is below the first adapted one, or its layers pass on more than hidden states.
    """

    def __init__(self, model: nn.Module, adapted: list[str]) -> None:
        """`adapted`: names of the adapted matrices in the model without adapter."""
        self.model = model
        self._layers, self.num_layers = _below(bare_model(model), adapted)
        self.dtype = next(self._layers[self.num_layers].parameters()).dtype
        self._given_NLD: torch.Tensor | None = None
        self._taken_NLD: torch.Tensor | None = None
        self._is_taking = False
        for layer in self._layers[: self.num_layers]:
            layer.__class__ = type(layer.__class__.__name__, (_Left, layer.__class__), {"prefix": self})
        self._layers[self.num_layers].register_forward_pre_hook(self._enter, with_kwargs=True)

    @torch.no_grad()
    def take(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, L, D), the input of the first adapted layer, without dropout. The layers above are not computed."""
        training = self.model.training
        self.model.eval()
        self._is_taking = True
        try:
            self.model(**inputs)
        except _Taken:
            pass
        finally:
            self._is_taking = False
            self.model.train(training)
        taken, self._taken_NLD = self._taken_NLD, None
        assert taken is not None, "the first adapted layer was not reached"
        return taken

    @contextmanager
    def given(self, hidden_NLD: torch.Tensor) -> Iterator[None]:
        """Context in which the first adapted layer reads `hidden_NLD`, and the layers below it are skipped."""
        self._given_NLD = hidden_NLD
        try:
            yield
        finally:
            self._given_NLD = None

    @torch.no_grad()
    def check(self, inputs: dict[str, torch.Tensor]) -> None:
        """Check that a batch's outputs are the same with and without the skipped layers, without dropout."""
        training = self.model.training
        self.model.eval()
        try:
            expected = self.model(**inputs).logits
            with self.given(self.take(inputs)):
                found = self.model(**inputs).logits
        finally:
            self.model.train(training)
        if not (found - expected).float().norm() <= _CLOSE * expected.float().norm():
            raise UserError(
                f"training.cache_prefix: {type(bare_model(self.model)).__name__} hands more than hidden states from "
                "layer to layer, so that its lower layers cannot be left out; set training.cache_prefix=off"
            )

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Hook before the first adapted layer."""
        if self._is_taking:
            self._taken_NLD = args[0] if args else kwargs["hidden_states"]
            raise _Taken
        if self._given_NLD is None:
            return None
        return ((self._given_NLD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": self._given_NLD})


class _Taken(Exception):
    """Ends a forward pass early."""


class _Left(nn.Module):
    """A layer that is skipped while its output is given."""

    prefix: FrozenPrefix
    _gives_tuple: bool | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.prefix._given_NLD is None or self._gives_tuple is None:
            found = super().forward(*args, **kwargs)
            self._gives_tuple = isinstance(found, tuple)
            return found
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if self._gives_tuple else hidden


def _below(model: nn.Module, adapted: list[str]) -> tuple[nn.ModuleList, int]:
    """The module list with the adapted layers, and the number of layers below the first adapted one."""
    for path, layers in model.named_modules():
        numbers = [
            int(found.group(1)) for name in adapted if (found := BLOCK.match(name.removeprefix(path))) is not None
        ]
        if isinstance(layers, nn.ModuleList) and len(numbers) == len(adapted):
            if numbers and min(numbers) > 0:
                return layers, min(numbers)
            break
    raise UserError(
        "training.cache_prefix: the first layer is adapted, so that there is nothing below to keep; adapt upper layers "
        "alone, by adapter.target_modules as a regular expression with their numbers, or set training.cache_prefix=off"
    )
