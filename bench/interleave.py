"""Interleaved, paired timing of alternatives, with an interval on each ratio.

A single timing on a shared machine is not reliable. Here all alternatives run in turns on the same input, forwards and
then backwards (A B C C B A), so that drift of the machine affects each pair alike. A ratio is formed within a round.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Measure = Callable[[Callable[[], object]], float]
"""Seconds of one call."""

INTERVAL_ROUNDS = 5
"""Fewer rounds than this give no interval."""
_DRAWS = 2000


@dataclass
class Round:
    """One turn forwards and one backwards of each alternative, on one input."""

    index: int
    """Index of the input."""
    seconds: dict[str, tuple[float, float]]
    """Alternative -> seconds of its call forwards and of its call backwards."""


@dataclass
class Times:
    rounds: list[Round] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return any(name in each.seconds for each in self.rounds)

    @property
    def common_inputs(self) -> set[int]:
        """Inputs on which every alternative has had a turn."""
        met: dict[str, set[int]] = {}
        for each in self.rounds:
            for name in each.seconds:
                met.setdefault(name, set()).add(each.index)
        return set.intersection(*met.values()) if met else set()

    def median_s(self, name: str) -> float:
        """Mean of the medians per common input, so that alternatives with fewer rounds are timed on the same work."""
        return float(np.mean([np.median(values) for values in self._by_input(name)]))

    def spread_s(self, name: str) -> float:
        """Mean of the interquartile ranges per common input."""
        return float(np.mean([np.subtract(*np.percentile(values, [75, 25])) for values in self._by_input(name)]))

    def ratio(self, name: str, base: str) -> tuple[float, float | None, float | None]:
        """Median over the rounds of `name`'s time over `base`'s, and its 95 % bootstrap interval. The interval is None
        with fewer than INTERVAL_ROUNDS rounds."""
        both = [each.seconds for each in self.rounds if name in each.seconds and base in each.seconds]
        ratios = np.array([sum(seconds[name]) / sum(seconds[base]) for seconds in both])
        if len(ratios) < INTERVAL_ROUNDS:
            return float(np.median(ratios)), None, None
        draws = np.random.default_rng(0).integers(len(ratios), size=(_DRAWS, len(ratios)))
        low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
        return float(np.median(ratios)), float(low), float(high)

    def _by_input(self, name: str) -> list[list[float]]:
        found: dict[int, list[float]] = {index: [] for index in self.common_inputs}
        for each in self.rounds:
            if each.index in found:
                found[each.index].extend(each.seconds.get(name, ()))
        return list(found.values())


def interleave(
    alternatives: Mapping[str, Callable[[int], object]],
    num_inputs: int,
    max_rounds: int,
    until: Callable[[], bool],
    measure: Measure,
) -> Times:
    """Rounds until there are `max_rounds` or `until()` is true, at least one.

    `alternatives`: name -> function of the input's index. Rounds cycle through the inputs. Without alternatives there
    is no round.
    """
    times = Times()
    names = list(alternatives)

    def turn(name: str, index: int) -> float:
        return measure(lambda: alternatives[name](index))

    gc.collect()
    gc.freeze()  # so that garbage collection between rounds is quick
    gc.disable()
    try:
        while names and len(times.rounds) < max_rounds and not (times.rounds and until()):
            index = len(times.rounds) % num_inputs
            forward = {name: turn(name, index) for name in names}
            backward = {name: turn(name, index) for name in reversed(names)}
            times.rounds.append(Round(index, {name: (forward[name], backward[name]) for name in names}))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def host_timer(device: torch.device, calls: int = 1) -> Measure:
    """Seconds per call by the host's clock, from an idle device to an idle device. Launches count as far as the device
    waits for them."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(run: Callable[[], object]) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - began) / calls

    return measure


def timer(seconds: float, began: float | None = None) -> Callable[[], bool]:
    """True once `seconds` have passed since `began` (default: now)."""
    start = time.perf_counter() if began is None else began
    return lambda: time.perf_counter() - start > seconds


def choose_device(name: str | None) -> torch.device:
    """The device `name`, or by default the GPU if there is one. SystemExit if that device is not available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def rates_in(text: str) -> dict[str, float]:
    """Name -> learning rate of a text such as `linear=3e-3,fot=1e-3`, for argparse."""
    refused = argparse.ArgumentTypeError(f"{text!r}: write linear=3e-3,fot=1e-3")
    try:
        rates = {name.strip(): float(rate) for name, _, rate in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        raise refused from None
    if not all(rates) or not all(0 < rate < math.inf for rate in rates.values()):
        raise refused
    return rates


def names_in(text: str | None, known: Sequence[str]) -> list[str]:
    """A comma-separated choice of `known`, in the order of `known`; all for None. SystemExit names unknown names."""
    if text is None:
        return list(known)
    wanted = text.split(",")
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in wanted]
