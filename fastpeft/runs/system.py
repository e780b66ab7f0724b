"""The machine: its description, and a heartbeat of its load every two seconds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HEARTBEAT_S = 2.0

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "wandb",
)


def environment() -> dict[str, Any]:
    """Versions and machine facts, for environment.json."""
    from fastpeft._version import __version__

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "fastpeft": __version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command": sys.argv,
    }


def git_commit() -> str | None:
    """The commit of the fastpeft checkout, with `-dirty` if it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class Heartbeat:
    """Calls `emit(util=, memory_mb=, power_w=, temp_c=)` every two seconds from its own thread.

    On a GPU the values are NVML's, on a CPU the machine's load and this process's memory. A value that cannot be read
    is None. A failing driver ends the heartbeat's values, never the run.
    """

    def __init__(self, emit: Callable[..., None], gpu_uuid: str | None) -> None:
        self._emit = emit
        self._gpu_uuid = gpu_uuid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fastpeft-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=HEARTBEAT_S)

    def _beat(self) -> None:
        read = _cpu_reader() if self._gpu_uuid is None else _gpu_reader(self._gpu_uuid)  # may hang
        while not self._stop.wait(HEARTBEAT_S):
            self._emit(**read())


def _cpu_reader() -> Callable[[], dict[str, float | None]]:
    import psutil

    process = psutil.Process()
    psutil.cpu_percent()

    def read() -> dict[str, float | None]:
        return {
            "util": psutil.cpu_percent(),
            "memory_mb": round(process.memory_info().rss / 2**20, 1),
            "power_w": None,
            "temp_c": None,
        }

    return read


def nvml_device(uuid: str) -> tuple[Any, Any]:
    """(NVML's module, its handle of a GPU). May raise any exception, and may hang."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)  # an index would ignore CUDA_VISIBLE_DEVICES


def _gpu_reader(uuid: str) -> Callable[[], dict[str, float | None]]:
    nothing: dict[str, float | None] = dict.fromkeys(("util", "memory_mb", "power_w", "temp_c"))
    try:
        pynvml, handle = nvml_device(uuid)
    except Exception:
        return lambda: nothing
    reads = {
        "util": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_mb": lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20, 1),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temp_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }

    def read() -> dict[str, float | None]:
        out = dict(nothing)
        for name, get in reads.items():
            try:
                out[name] = get()
            except Exception:  # a driver that is being reset raises more than NVMLError
                continue
        return out

    return read
