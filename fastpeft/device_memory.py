"""The device's memory: how much is free, which errors mean that there is none, what a batch is cut down to then."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from fastpeft.errors import UserError
from fastpeft.launched import place

# cuBLAS and cuDNN allocate past torch, and a CPU's allocator raises no class of its own: plain RuntimeErrors.
_WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)

_ADVICE = (
    "Set dataset.max_length or adapter.rank lower, match fewer layers with adapter.target_modules, set "
    "training.precision=bf16, or take a smaller model"
)

UNMEASURED_TOKENS = 4096
"""Of an evaluation batch, where nobody has measured what it takes and no number was asked for."""


def unmeasured(setting: int | Literal["auto"]) -> int:
    """evaluation.batch_tokens as a number."""
    return UNMEASURED_TOKENS if setting == "auto" else setting


class OutOfMemory(UserError):
    """The device is too small, however small the batches."""

    def __init__(self, where: str, cause: str, advice: str = _ADVICE) -> None:
        super().__init__(f"out of memory {where}: {cause}. {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


# ---- what is free ----------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """That this process may still allocate: on a CPU without being killed for it. Ranks of one host share it."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return max(0, min([psutil.virtual_memory().available, *control_group_rooms()])) // place().local_size


def control_group_rooms(process: Path = Path("/proc/self")) -> Iterator[int]:
    """What the control groups around this process leave it, of version 1 and 2. File cache that can go counts as free.

    Args:
        process: holds `cgroup` and `mountinfo`, as in proc(5).
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:  # no Linux
        return
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        for root, mount in _mounted(mounts, is_second=not controllers):
            inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
            folder = mount / inside
            while True:
                room = _room(folder)
                if room is not None:
                    yield room
                if folder == mount:
                    break
                folder = folder.parent


def _mounted(mounts: list[list[str]], is_second: bool) -> Iterator[tuple[Path, Path]]:
    """(the group that is its root, where it lies) of each mounted hierarchy that counts memory."""
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup2" if is_second else kind == "cgroup" and "memory" in options.split(","):
            yield Path(fields[3]), Path(fields[4])


def _room(folder: Path) -> int | None:
    """Of one group; None where it has no limit."""
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = ((folder / name).read_text().strip() for name in (limit_name, usage_name))
            if limit == "max":
                return None
            lines = (folder / "memory.stat").read_text().splitlines()
        except OSError:  # the group is not mounted here, or is the root's
            continue
        counts = dict(line.split(" ", 1) for line in lines if " " in line)
        return max(0, int(limit) - int(usage) + int(counts.get(cache_name, 0)))
    return None


def resident_bytes(device: torch.device) -> int:
    """That this process holds of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def high_water_bytes(device: torch.device) -> int:
    """The most that this process has held of it until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage's figure outlives an exec: it may be that of the process which started this one
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> None:
    """Give back what nothing holds any more. Not inside an `except`: its traceback holds the activations."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's: between blocks that are held its heap keeps free pages until it is asked for them."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


# ---- what a batch is cut down to -------------------------------------------------------------


@dataclass
class TokenLimits:
    """Most padded tokens in one pass; they fall when the device runs out of memory, and never rise again."""

    training: int
    evaluation: int

    def halve_training(self, num_rows: int, width: int, where: str) -> str:
        """After a micro-batch of `num_rows` x `width` did not fit. Returns what to tell the user."""
        before, self.training = self.training, _half(num_rows, width, where)
        return f"out of memory {where}: micro-batches of at most {self.training:,} tokens instead of {before:,}"

    def halve_evaluation(self, num_rows: int, width: int, where: str) -> str:
        before, self.evaluation = self.evaluation, _half(num_rows, width, where)
        return f"out of memory {where}: evaluation batches of at most {self.evaluation:,} tokens instead of {before:,}"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training, self.evaluation = state["training"], state["evaluation"]


def _half(num_rows: int, width: int, where: str) -> int:
    """Half of what did not fit, which may be far under the limit. Raises OutOfMemory for a single row."""
    if num_rows <= 1:
        raise OutOfMemory(where, f"a single row of {width:,} tokens does not fit")
    return num_rows * width // 2
