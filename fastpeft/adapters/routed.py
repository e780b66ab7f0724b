"""Base of the methods whose update of a linear layer depends on the token. The adapted model is called the host.

A layer computes y = W x + update(x). W x is computed by the layer's own class; the update is added in place. Layers
that read the same tensor share one route.

Shape suffixes: T tokens, I in, O out, Q canonical width, K active atoms per token.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import nn

F = TypeVar("F")
"""Tensors that a method computes from its parameters at the start of a forward pass."""


@dataclass(frozen=True)
class Route:
    c_TK: torch.Tensor
    index_TK: torch.Tensor
    weight_T: torch.Tensor | None = None
    """1 for tokens and 0 for padding; None if there is no padding."""


@dataclass
class _Kept:
    """The last computed route, and the input tensor that it belongs to."""

    x: weakref.ref[torch.Tensor]
    version: int
    with_gradient: bool
    reader: Any
    route: Route


class RoutedHost(ABC, Generic[F]):
    """Adapts `model` in place; `detach` undoes it.

    Args:
        names: module paths of the linear layers.
        entry_points: modules whose call starts a forward pass, as in Backbone.
        pad_token: token id that marks padding in a forward pass without attention mask.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], entry_points: Sequence[nn.Module], pad_token: int | None = None
    ) -> None:
        self._pad_token = pad_token
        self._folded: F | None = None
        self._weight: torch.Tensor | None = None
        self._kept: _Kept | None = None
        self._layers = [model.get_submodule(name) for name in names]
        self._entry_points = list(dict.fromkeys(entry_points))
        self._hooks: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Adapt the layers and register the hooks."""
        for place, layer in enumerate(self._layers):
            layer.__class__ = _adapted(type(layer))
            layer.host, layer.place = self, place  # type: ignore[assignment]
        self._hooks = [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in self._entry_points]

    def detach(self) -> None:
        """Restore the layers' classes and remove the hooks."""
        for layer in self._layers:
            layer.__class__ = type(layer).__bases__[1]
            del layer.host, layer.place
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def absent(self) -> Iterator[None]:
        """Context in which the model has no adapter."""
        self.detach()
        try:
            yield
        finally:
            self.attach()

    @abstractmethod
    def fold(self) -> F:
        """Compute the tensors of one forward pass from the parameters, with gradients. Called once per forward pass."""

    @abstractmethod
    def reader(self, folded: F, place: int) -> Any:
        """Identifies how layer `place` reads its input. Layers with the same reader and input share a route."""

    @abstractmethod
    def route(self, folded: F, place: int, x_TI: torch.Tensor, weight_T: torch.Tensor | None) -> Route:
        """Select the atoms of each token.

        Args:
            x_TI: input of the layer.
            weight_T: 1 for tokens and 0 for padding; None if that is unknown or there is no padding.
        """

    @abstractmethod
    def add(self, folded: F, place: int, route: Route, y_TO: torch.Tensor) -> None:
        """Add the update to y in place."""

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called at the start of a forward pass: fold again, since the parameters may have changed."""
        self._folded, self._kept = self.fold(), None
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
        if torch.is_tensor(mask) and mask.ndim == 2:
            self._weight = mask
        elif torch.is_tensor(ids) and ids.ndim == 2 and self._pad_token is not None:
            self._weight = ids != self._pad_token
        else:
            self._weight = None

    def adapt(self, place: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the update to y (..., O), the output of the layer's own class for x (..., I), in place."""
        if self._folded is None:
            self._folded = self.fold()
        self.add(self._folded, place, self._routed(self._folded, place, x), y.view(-1, y.shape[-1]))
        return y

    def _routed(self, folded: F, place: int, x: torch.Tensor) -> Route:
        reader, version = self.reader(folded, place), 0 if x.is_inference() else x._version
        found, kept = (version, torch.is_grad_enabled()), self._kept
        if (
            kept is None
            or kept.x() is not x
            or kept.reader is not reader
            or found != (kept.version, kept.with_gradient)
        ):
            weight = self._weight
            weight_T = None if weight is None or weight.shape != x.shape[:-1] else weight.reshape(-1)
            route = self.route(folded, place, x.reshape(-1, x.shape[-1]), weight_T)
            kept = self._kept = _Kept(weakref.ref(x), *found, reader, route)
        return kept.route


class RoutedLayer(nn.Module):
    """Base class placed before a linear layer's class in its method resolution order."""

    host: RoutedHost[Any]
    place: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.host.adapt(self.place, x, super().forward(x))


@cache
def _adapted(theirs: type[nn.Module]) -> type[nn.Module]:
    return type(f"Routed{theirs.__name__}", (RoutedLayer, theirs), {"__doc__": RoutedLayer.__doc__})
