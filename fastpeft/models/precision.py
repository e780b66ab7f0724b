"""Compute dtype of a run: as requested, or for `auto` the faster one on this processor by measurement.

A processor without support for a dtype emulates it by conversions: bf16 takes 15 times as long as fp32 on an x86
without AVX-512 (measured). Reported processor features do not help, because the math library has to use them too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARGIN = 1.1
"""Times that differ by less than this factor may be noise: fp32 is kept, and no warning is given."""
MEASURE_S = 0.2
_ROWS = 64
_LARGEST = (1024, 4096)
"""Size limit of the measured product: a larger one takes longer and has the same ratio."""

Shape = tuple[int, int]
"""(in, out) of a linear layer of the model."""


@dataclass(frozen=True)
class Precision:
    """Compute dtype of frozen weights and activations."""

    dtype: torch.dtype
    note: str = ""
    """The choice and its reason, if `auto` made it."""
    warning: str = ""
    """Warning that the requested precision is slower than fp32."""
    ratio: float | None = None
    """Time of a product in the narrower dtype divided by its time in fp32; None if not measured."""


def choose_precision(asked: str, device: torch.device, shape_of: Callable[[], Shape]) -> Precision:
    """The precision that `training.precision` selects on `device`. `shape_of`, which returns the shape of the model's
    linear layers, is called only if a measurement is needed."""
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
    """The dtype's name in training.precision."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def slowdown(dtype: torch.dtype, device: torch.device, shape: Shape) -> float:
    """Time of a linear layer's products in `dtype` divided by their time in fp32.

    The best of several alternating measurements, so that other load on the machine affects both dtypes. It takes
    MEASURE_S, or two measurements each if one takes longer.
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
    """Seconds of the two products of a frozen layer in a step: its output and the gradient of its input."""
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
