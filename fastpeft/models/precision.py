"""What a run computes in: as asked, or for `auto` what is faster on this processor, measured and not looked up.

A processor that lacks a data type still computes in it, through conversions: bf16 takes 15 times as long as fp32 on
an x86 without AVX-512 (measured). What a processor says it has is no better guide, for the library has to use it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARGIN = 1.1
"""Less than this factor apart, two times may be noise: fp32 stays, and nobody is warned."""
MEASURE_S = 0.2
_ROWS = 64
_LARGEST = (1024, 4096)
"""What a larger product would add is time, and nothing about the ratio."""

Shape = tuple[int, int]
"""Inputs and outputs of a linear layer of the model."""


@dataclass(frozen=True)
class Precision:
    """Of frozen weights and activations."""

    dtype: torch.dtype
    note: str = ""
    """What was chosen and why, where it was chosen here."""
    warning: str = ""
    """What was asked for is slower than fp32."""
    ratio: float | None = None
    """Time of a product in the narrower type over its time in fp32; None where nothing was measured."""


def choose_precision(asked: str, device: torch.device, shape_of: Callable[[], Shape]) -> Precision:
    """The precision that `training.precision` means on `device`, for a model whose linear layers have this shape. It is
    asked for only where it is to be measured."""
    if asked == "fp32":
        return Precision(torch.float32)
    if asked == "auto" and device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = torch.bfloat16 if native else torch.float32
        return Precision(
            dtype, f"precision auto is {name_of(dtype)}: this GPU has {'' if native else 'no '}native bf16"
        )
    narrow = "bf16" if asked == "auto" else asked
    shape = _at_most(shape_of())
    ratio = slowdown(DTYPES[narrow], device, shape)
    size = " x ".join(map(str, (_ROWS, *shape)))
    figure = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
    found = f"a product of {size} takes {figure} times as long in {narrow} as in fp32 on this processor, measured"
    if asked == "auto":
        dtype = torch.bfloat16 if ratio * MARGIN < 1 else torch.float32
        return Precision(dtype, note=f"precision auto is {name_of(dtype)}: {found}", ratio=ratio)
    slow = f"training.precision is {asked}, which is slower here: {found}. Set training.precision=auto"
    return Precision(DTYPES[narrow], warning=slow if ratio > MARGIN else "", ratio=ratio)


def name_of(dtype: torch.dtype) -> str:
    """As training.precision has it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def slowdown(dtype: torch.dtype, device: torch.device, shape: Shape) -> float:
    """Time of a linear layer's products in `dtype` over their time in fp32.

    The best of several, taken in turns, so that what else the machine does meets both. It takes MEASURE_S, or two of
    each where one takes longer.
    """
    timers = [_times(kind, device, shape) for kind in (torch.float32, dtype)]
    best = [math.inf, math.inf]
    rounds, until = 0, time.perf_counter() + MEASURE_S
    while rounds < 2 or time.perf_counter() < until:
        best = [min(seconds, next(timer)) for seconds, timer in zip(best, timers)]
        rounds += 1
    return best[1] / best[0]


def _at_most(shape: Shape) -> Shape:
    return min(shape[0], _LARGEST[0]), min(shape[1], _LARGEST[1])


@torch.inference_mode()
def _times(dtype: torch.dtype, device: torch.device, shape: Shape) -> Iterator[float]:
    """Seconds of the two products that a frozen layer takes in a step, its outputs and its inputs' gradient."""
    num_in, num_out = shape
    x_NI, weight_OI = (torch.full((rows, num_in), 2**-6, dtype=dtype, device=device) for rows in (_ROWS, num_out))
    while True:
        _wait(device)
        began = time.perf_counter()
        torch.mm(torch.mm(x_NI, weight_OI.T), weight_OI)
        _wait(device)
        yield time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
