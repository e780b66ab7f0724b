"""Faster implementations of parts of transformers' models, with equal results.

`speed_up` changes the classes of a model's modules in place. Each change is tested on the module first (swaps.py).
Models of unknown families keep their own classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastpeft.models.fast import attention_functions
from fastpeft.models.fast.deberta import DisentangledAttention
from fastpeft.models.fast.last_layer import shorten_last_layer
from fastpeft.models.fast.last_rows import read_rows_in_last_layer
from fastpeft.models.fast.rotary_attention import RotaryAttention
from fastpeft.models.fast.small_parts import Dropout, GatedFeedForward, ResidualNorm, RmsNorm
from fastpeft.models.fast.swaps import Fast, is_free, tried

LEVERS = ("attention", "rotary", "norms", "feed_forward", "dropout", "last_layer")
_SWAPS: tuple[type[Fast], ...] = (
    DisentangledAttention,
    RotaryAttention,
    RmsNorm,
    ResidualNorm,
    GatedFeedForward,
    Dropout,
)

_off: set[str] = set()


@contextmanager
def without(*levers: str) -> Iterator[None]:
    """Context in which new models keep transformers' implementation of these parts, for benchmarks and tests."""
    unknown = set(levers) - set(LEVERS)
    if unknown:
        raise ValueError(f"no levers: {', '.join(sorted(unknown))}; there are {', '.join(LEVERS)}")
    before = set(_off)
    _off.update(levers)
    try:
        yield
    finally:
        _off.clear()
        _off.update(before)


def speed_up(model: nn.Module, decoder: nn.Module | None = None) -> dict[str, int]:
    """Swap the known modules of a transformers model.

    Args:
        decoder: the part of a language model before its head.

    Returns:
        lever -> number of modules that it changed.
    """
    done: Counter[str] = Counter()
    if "attention" not in _off and attention_functions.use(model):
        done["attention"] += 1
    known: dict[tuple[type, type], type | None] = {}
    for module in list(model.modules()):
        if not is_free(module):
            continue
        for fast in _SWAPS:
            if fast.lever in _off or not fast.fits(module):
                continue
            kind = fast, type(module)
            if kind not in known:
                known[kind] = tried(fast, module)
            if (found := known[kind]) is not None:
                module.__class__ = found
                done[fast.lever] += 1
                break
    if "last_layer" not in _off:
        done["last_layer"] += shorten_last_layer(model) if decoder is None else read_rows_in_last_layer(model, decoder)
    return {lever: count for lever, count in done.items() if count}
