"""Gradient checkpointing: layers save only their input, and backward recomputes the rest (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the model: the module list with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in found.parameters()) for found in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def checkpoint_layers(model: nn.Module) -> int:
    """Recompute each of the model's blocks in the backward pass, with the same random numbers. Returns the number of
    blocks; without any, nothing is changed.

    Applies in training mode only. Losses and gradients are equal up to rounding, because projections that are otherwise
    computed jointly are computed one by one.
    """
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = _checkpointed(block, block.forward)  # on the instance, so that earlier wrappers stay inside
    return len(blocks)


def _checkpointed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def compute(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return compute
