"""Swaps of transformers' modules for faster ones with equal results, tested before use.

A swap changes only a module's class, like fastpeft's LoRA layers: parameters, names, saving and loading stay the same.
The result of transformers' class is not inferred from its name or version, but tested on a few random rows, with
gradients. If the results differ, the module keeps its own forward.
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
"""Errors of a module whose call signature differs from the test's."""

Outputs = Callable[[nn.Module], tuple[torch.Tensor, ...]]
"""A test call: module -> its outputs."""


class Fast(nn.Module):
    """Base class placed before a class of transformers, which provides the attributes declared here."""

    lever: ClassVar[str]
    """Group of swaps that it belongs to, which benchmarks and tests can turn off."""

    @classmethod
    @abstractmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module has the parts that this class needs."""

    @classmethod
    def variants(cls, module: nn.Module) -> list[dict[str, Any]]:
        """Candidate class attributes; one of them may give equal results."""
        return [{}]

    @classmethod
    @abstractmethod
    def trial(cls, module: nn.Module) -> Outputs:
        """A call whose outputs and input gradients must not change by the swap."""


@cache
def made(fast: type[Fast], theirs: type[nn.Module], attributes: tuple[tuple[str, Any], ...] = ()) -> type[nn.Module]:
    """The class `theirs` with `fast` placed before it, under the name of `theirs`."""
    return type(theirs.__name__, (fast, theirs), {"__doc__": fast.__doc__, **dict(attributes)})


def is_free(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward only, without hooks or patches."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not (hooked or isinstance(module, Fast))


def tried(fast: type[Fast], module: nn.Module) -> type[nn.Module] | None:
    """The faster class for the module, tested on it; None if its results differ or it does not fit."""
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
    """The output of a call, and the gradients of a fixed weighted sum of it by the inputs."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    with torch.enable_grad():
        y = call(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()
        return y.detach(), *torch.autograd.grad(y, leaves, weights)


def noise(module: nn.Module, *shape: int) -> torch.Tensor:
    """Random rows for a test, in the module's dtype and on its device, without use of torch's global generators."""
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
