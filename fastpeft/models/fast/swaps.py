"""Changing a module of transformers' into a faster one of the same numbers, tried before it is believed.

A swap changes a module's class and nothing else, as fastpeft's LoRA layers do: parameters, names, saving and loading
stay. What transformers' class computes is not read from its name or version; it is tried, on a few random rows, with
gradients. A class that gives other numbers keeps its own forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

TRIAL_ROWS = 5
_CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4}
_CLOSE_HALF = 4e-2

FAULTS = RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError
"""What a module raises that is called in another way than a trial does."""

Outputs = Callable[[nn.Module], tuple[torch.Tensor, ...]]
"""Of a trial."""


class Fast(nn.Module):
    """Goes before a class of transformers', which has what is only declared here."""

    lever: ClassVar[str]
    """Which group of swaps it belongs to, as the benches and tests turn them off."""

    @classmethod
    @abstractmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module has the parts that this class works with."""

    @classmethod
    def variants(cls, module: nn.Module) -> list[dict[str, Any]]:
        """Attributes of the class that one of which may make the numbers equal."""
        return [{}]

    @classmethod
    @abstractmethod
    def trial(cls, module: nn.Module) -> Outputs:
        """A call whose outputs, and gradients by its inputs, must not change by the swap."""


@cache
def made(fast: type[Fast], theirs: type[nn.Module], attributes: tuple[tuple[str, Any], ...] = ()) -> type[nn.Module]:
    """The class of `theirs` with `fast` before it, under the name that users know."""
    return type(theirs.__name__, (fast, theirs), {"__doc__": fast.__doc__, **dict(attributes)})


def is_free(module: nn.Module) -> bool:
    """Whether nobody else has changed what calling the module does."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not (hooked or isinstance(module, Fast))


def tried(fast: type[Fast], module: nn.Module) -> type[nn.Module] | None:
    """The class that computes the module's numbers faster, tried on it; None where there is none."""
    theirs, training = type(module), module.training
    module.eval()
    try:
        outputs = fast.trial(module)
        expected = outputs(module)
        for attributes in fast.variants(module):
            module.__class__ = candidate = made(fast, theirs, tuple(attributes.items()))
            if alike(outputs(module), expected):
                return candidate
    except FAULTS:
        pass
    finally:
        module.__class__ = theirs
        module.train(training)
    return None


def with_gradients(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output of a call, and the gradients of a fixed sum of it by the inputs."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    with torch.enable_grad():
        y = call(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()
        return y.detach(), *torch.autograd.grad(y, leaves, weights)


def noise(module: nn.Module, *shape: int) -> torch.Tensor:
    """Rows for a trial, in the module's dtype and on its device; torch's own generators are not touched."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def alike(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Equal up to rounding."""
    return all(map(_close, found, expected))


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    apart, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(apart <= _CLOSE.get(found.dtype, _CLOSE_HALF) * size)
