"""Launches and peak memory of one step.

On a GPU `launches` counts the host's launch calls to CUDA's runtime and driver, by torch's profiler.
A CPU launches nothing: there it counts the operators that torch dispatches and that compute, without views.
`peak_mb` is the most that torch's allocator held: on a GPU by its own count, on a CPU by the profiler's record of every
allocation. Memory of the libraries themselves (oneDNN's packed weights, cuBLAS's workspace) is not included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_LAUNCH = re.compile(r"^cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")


def launches_kind(device: torch.device) -> str:
    return "kernel launches" if device.type == "cuda" else "operators that compute"


def count_launches(step: Callable[[], object], device: torch.device) -> int | None:
    """Launches of one call of `step`; None if the profiler recorded none, since 0 would not be a measurement."""
    if device.type != "cuda":
        with _Counter() as counter:
            step()
        return counter.count
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    return sum(_LAUNCH.match(event.name()) is not None for event in _raw_events(profiler)) or None


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def peak_mb(work: Callable[[], object], device: torch.device) -> float:
    """Most memory, in MiB, that torch held during `work` beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    records = [(e.start_ns(), e.nbytes()) for e in _raw_events(profiler) if e.name() == "[memory]"]
    held = peak = 0
    for _, num_bytes in sorted(records, key=lambda record: record[0]):
        held += num_bytes
        peak = max(peak, held)
    return peak / 2**20


def _raw_events(profiler: profile) -> Any:
    return profiler.profiler.kineto_results.events()
