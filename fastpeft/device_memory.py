"""The device's memory: how much is free, which errors mean out of memory, and the token limits that shrink then."""

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

# cuBLAS and cuDNN allocate outside torch's allocator, and the CPU's raises no class of its own: plain RuntimeErrors.
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
"""Token limit of an evaluation batch whose memory was not measured, where evaluation.batch_tokens is auto."""


def unmeasured(setting: int | Literal["auto"]) -> int:
    """evaluation.batch_tokens as a number, without a measurement."""
    return UNMEASURED_TOKENS if setting == "auto" else setting


class OutOfMemory(UserError):
    """The memory does not suffice, and smaller batches do not help."""

    def __init__(self, where: str, cause: str, advice: str = _ADVICE) -> None:
        super().__init__(f"out of memory {where}: {cause}. {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


# ---- free and used memory --------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still allocate; on a CPU, before the kernel kills it. The CPU's are divided by the
    ranks of the host."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return max(0, min([psutil.virtual_memory().available, *control_group_rooms()])) // place().local_size


def control_group_rooms(process: Path = Path("/proc/self")) -> Iterator[int]:
    """Bytes that each control group (v1 or v2) around this process leaves it. Reclaimable file cache counts as free.

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
    """(root group, mount point) of each mounted hierarchy with a memory controller."""
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup2" if is_second else kind == "cgroup" and "memory" in options.split(","):
            yield Path(fields[3]), Path(fields[4])


def _room(folder: Path) -> int | None:
    """Bytes that one group leaves; None if it has no limit."""
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = ((folder / name).read_text().strip() for name in (limit_name, usage_name))
            if limit == "max":
                return None
            lines = (folder / "memory.stat").read_text().splitlines()
        except OSError:  # the group is not mounted here, or is the root group
            continue
        counts = dict(line.split(" ", 1) for line in lines if " " in line)
        return max(0, int(limit) - int(usage) + int(counts.get(cache_name, 0)))
    return None


def resident_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that this process holds."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def high_water_bytes(device: torch.device) -> int:
    """The most bytes of the device's memory that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage's maximum survives an exec, so it may belong to the program that ran before
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> None:
    """Return unused memory to the device. Not inside an `except`, whose traceback holds the activations."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim. Its heap keeps free pages between live blocks until this is called."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


# ---- token limits ----------------------------------------------------------------------------


@dataclass
class TokenLimits:
    """Most padded tokens in one pass. A limit falls when the device runs out of memory, and never rises again."""

    training: int
    evaluation: int

    def halve_training(self, num_rows: int, width: int, where: str) -> str:
        """After a micro-batch of `num_rows` x `width` did not fit. Returns a message for the user."""
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
    """Half the tokens that did not fit, which may be far below the limit. Raises OutOfMemory for a single row."""
    if num_rows <= 1:
        raise OutOfMemory(where, f"a single row of {width:,} tokens does not fit")
    return num_rows * width // 2
