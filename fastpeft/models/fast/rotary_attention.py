"""Rotary embedding in fewer passes over memory: an attention module's own forward with its rotary function replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fastpeft.kernels.ops.rotary.op import rotary
from fastpeft.models.fast.small_parts import fuses
from fastpeft.models.fast.swaps import Fast, Outputs, alike

_FUNCTION = "apply_rotary_pos_emb"


class RotaryAttention(Fast):
    """transformers' attention with queries and keys rotated by fastpeft."""

    lever = "rotary"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        if not type(module).__name__.endswith("Attention"):
            return False
        forward = inspect.unwrap(type(module).forward)
        if not isinstance(forward, FunctionType) or _FUNCTION not in forward.__code__.co_names:
            return False
        theirs = forward.__globals__.get(_FUNCTION)
        return callable(theirs) and _is_rotary(theirs)

    @classmethod
    def variants(cls, module: nn.Module) -> list[dict[str, Any]]:
        forward = inspect.unwrap(type(module).forward)
        names = forward.__globals__ | {_FUNCTION: _rotating(forward.__globals__[_FUNCTION])}
        mine = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        mine.__kwdefaults__ = forward.__kwdefaults__
        return [{"forward": mine}]

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        return lambda module: ()  # only the function changed, and _is_rotary tested it


@cache
def _rotating(theirs: Callable) -> Callable:
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if not fuses(q) or cos.shape[-1] != q.shape[-1]:  # some models rotate a part of each head
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


@cache
def _is_rotary(theirs: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    try:
        parameters = list(inspect.signature(theirs).parameters)
        if parameters[:5] != ["q", "k", "cos", "sin", "unsqueeze_dim"] or len(parameters) > 5:
            return False
        return alike(_rotating(theirs)(q, k, cos, sin), theirs(q, k, cos, sin))
    except (RuntimeError, TypeError, ValueError):
        return False
