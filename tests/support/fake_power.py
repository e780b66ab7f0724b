"""Energy meters that a test holds in its hand: a driver's module, and a powercap folder with a steady CPU."""

from __future__ import annotations

import os
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path


class NVMLError(Exception):
    pass


class FakeNvml(types.ModuleType):
    """A pynvml with one GPU. Set the fields; a function in a field is called, and may raise or hang."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.counter_mj: int | Callable[[], int] = 7_000_000_000
        self.power_mw: int | Callable[[], int] = 300_000
        self.init: Callable[[], None] | None = None
        self.uuids: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init is not None:
            self.init()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.uuids.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        return self.counter_mj() if callable(self.counter_mj) else self.counter_mj

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        return self.power_mw() if callable(self.power_mw) else self.power_mw


def raiser(error: BaseException) -> Callable[[], int]:
    def fail() -> int:
        raise error

    return fail


def write_zone(powercap: Path, zone: str, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> Path:
    folder = powercap / f"intel-rapl:{zone}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder


class SteadyCpu:
    """A context: `powercap` has one package, which draws `power_w`. `die` takes its counter away."""

    def __init__(self, powercap: Path, power_w: float) -> None:
        self.power_w = power_w
        self._file = write_zone(powercap, "0", "package-0", 1_000_000) / "energy_uj"
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def _count(self) -> None:
        # One write of one width: no reader sees half a number, and no rename waits for a busy disk
        with self._file.open("r+b", buffering=0) as file:
            while not self._stop.wait(0.01):
                now_uj = 1_000_000 + int(1e6 * self.power_w * (time.monotonic() - self._began))
                os.pwrite(file.fileno(), b"%012d\n" % now_uj, 0)

    def die(self) -> None:
        self._stop.set()
        self._thread.join()
        self._file.unlink()

    def __enter__(self) -> SteadyCpu:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
