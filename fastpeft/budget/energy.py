"""Energy of the training device in joules, read on a thread of its own.

On a GPU the source is NVML's total energy counter (Volta and later), else NVML's power, integrated. On a CPU it is
RAPL. Without a source no number is reported. RAPL never replaces NVML for a GPU, because it counts the CPU's energy.
All sources count the whole device, including other processes on it.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.runs.system import nvml_device

POWERCAP = Path("/sys/class/powercap")
WINDOW_S = 1.0
"""Shortest time between two readings: NVML's counter moves only every 20 to 100 ms."""
POWER_PERIOD_S = 0.05
"""Time between two samples of the power that is integrated."""
LOST_AFTER_S = 10.0
"""A meter that has failed, not changed or not answered for this long is lost."""
ANSWER_S = 5.0
"""Longest wait for a driver when it is opened, and for the first reading; not counted by the budget."""
LAST_READING_S = 2.0
"""Longest wait for the last reading."""
_MAX_W = 20_000.0
"""More than any machine draws: a counter that implies this power was reset or is broken."""


class MeterLost(Exception):
    """The readings of a meter are permanently wrong."""


class Source(ABC):
    """A counter of joules from an arbitrary origin."""

    method = "none"

    def __init__(self) -> None:
        self.period_s = WINDOW_S

    def restart(self) -> None:
        """Prepare for a next reading that may come long after the last one."""

    @abstractmethod
    def joules(self) -> float:
        """Read the counter. It may raise anything and may never return: the meter calls it on its own thread."""


class NvmlCounter(Source):
    method = "nvml_counter"

    def __init__(self, nvml: Any, handle: Any) -> None:
        super().__init__()
        self._nvml, self._handle = nvml, handle
        if self.joules() <= 0:
            raise MeterLost("the counter stands at 0")

    def joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


class NvmlPower(Source):
    """Power samples integrated by the trapezoidal rule."""

    method = "nvml_power"

    def __init__(self, nvml: Any, handle: Any, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.period_s = POWER_PERIOD_S
        self._nvml, self._handle, self._now = nvml, handle, now
        self._joules = 0.0
        self._last: tuple[float, float] | None = None
        self._power_w()

    def restart(self) -> None:
        self._last = None

    def joules(self) -> float:
        power_w, now_s = self._power_w(), self._now()
        if self._last is not None:
            before_s, before_w = self._last
            if now_s - before_s > LOST_AFTER_S:
                raise MeterLost(f"no power was read for {now_s - before_s:.0f} s")
            self._joules += (before_w + power_w) / 2 * (now_s - before_s)
        self._last = now_s, power_w
        return self._joules

    def _power_w(self) -> float:
        power_w = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        if not 0 < power_w < _MAX_W:
            raise ValueError(f"a power of {power_w} W")
        return power_w


class Rapl(Source):
    """Energy counters of the CPU packages, and of DRAM if it has its own. Each wraps around."""

    method = "rapl"

    def __init__(self, zones: list[Path]) -> None:
        super().__init__()
        self._zones = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        self._last_uj = [int(path.read_text()) for path, _ in self._zones]
        self._total_uj = 0

    def joules(self) -> float:
        now_uj = [int(path.read_text()) for path, _ in self._zones]
        for uj, last_uj, (_, range_uj) in zip(now_uj, self._last_uj, self._zones):
            self._total_uj += uj - last_uj + (range_uj if uj < last_uj else 0)
        self._last_uj = now_uj
        return self._total_uj / 1e6


class Several(Source):
    """The sum over several GPUs."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__()
        self.method = sources[0].method
        self.period_s = min(source.period_s for source in sources)
        self._sources = sources

    def restart(self) -> None:
        for source in self._sources:
            source.restart()

    def joules(self) -> float:
        return sum(source.joules() for source in self._sources)


def open_source(gpu_uuid: str | None, powercap: Path, *more: str) -> tuple[Source | None, str]:
    """The best source for these GPUs, or for the CPU if `gpu_uuid` is None; or None and the reason."""
    if gpu_uuid is None:
        return _open_rapl(powercap)
    sources = []
    for uuid in (gpu_uuid, *more):
        source, reason = _open_nvml(uuid)
        if source is None:
            return None, reason
        sources.append(source)
    return Several(sources) if more else sources[0], ""


def _open_nvml(uuid: str) -> tuple[Source | None, str]:
    reasons = []
    try:
        nvml, handle = nvml_device(uuid)
    except Exception as error:
        return None, f"NVML cannot be opened for {uuid} ({_words(error)})"
    for source in (NvmlCounter, NvmlPower):
        try:
            return source(nvml, handle), ""
        except Exception as error:
            reasons.append(f"{source.method}: {_words(error)}")
    return None, f"NVML tells neither energy nor power of {uuid} ({'; '.join(reasons)})"


def _open_rapl(powercap: Path) -> tuple[Source | None, str]:
    zones = []
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":  # package includes core and uncore; psys includes package
                zones.append(zone)
        if not zones:
            return None, f"there is no CPU energy counter in {powercap}"
        return Rapl(zones), ""
    except PermissionError as error:
        return None, f"{error.filename} may not be read: as root, chmod a+r {powercap}/intel-rapl:*/energy_uj"
    except (OSError, ValueError) as error:
        return None, f"RAPL in {powercap} cannot be read ({_words(error)})"


@dataclass(frozen=True)
class _Reading:
    joules: float
    """Energy since the first reading."""
    at_s: float
    power_w: float
    """Mean power since the previous reading."""


class EnergyMeter:
    """Joules of one run, including the parts before a resume. Only `open`, `start` and `stop` wait, for a few seconds
    at most.

    A lost meter stays lost: `joules` is None from then on, `method` says when it was lost, and `estimate_j` is
    extrapolated with the mean power until then.
    """

    def __init__(self, source: Source | None, reason: str = "", now: Callable[[], float] = time.monotonic) -> None:
        self.reason = reason
        """Why there is no source."""
        self._source, self._now = source, now
        self._own_method = source.method if source else "none"
        self._earlier_methods = ""
        self._before_j, self._complete = 0.0, source is not None
        self._origin_j: float | None = None
        self._started_s, self._ended_s = 0.0, None
        self._last = _Reading(0.0, 0.0, 0.0)
        self._calling_since: float | None = None
        self.fault: str | None = None
        """Why the meter is lost."""
        self._lost_at_s: float | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def open(cls, gpu_uuid: str | None, powercap: Path | None = None, more: Sequence[str] = ()) -> EnergyMeter:
        """Find the energy source of a GPU, or of the CPU for None. A driver that hangs is treated as no source.

        Args:
            more: UUIDs of further GPUs whose joules are added.
        """
        found: list[tuple[Source | None, str]] = []

        def find() -> None:
            found.append(open_source(gpu_uuid, powercap or POWERCAP, *more))

        opener = threading.Thread(target=find, name="fastpeft-energy", daemon=True)
        opener.start()
        opener.join(ANSWER_S)
        return cls(*found[0]) if found else cls(None, f"the driver has not answered for {ANSWER_S:g} s")

    # ---- what is spent ---------------------------------------------------------------------

    @property
    def method(self) -> str:
        lost = "" if self._lost_at_s is None else f", lost at {self._lost_at_s:.0f} s"
        return f"{self._earlier_methods}{self._own_method}{lost}"

    @property
    def works(self) -> bool:
        return self._source is not None and self.fault is None

    @property
    def joules(self) -> float | None:
        """Energy at the last reading, including earlier parts of the run; None if any part was not measured."""
        return self._before_j + self._last.joules if self.works and self._complete else None

    @property
    def power_w(self) -> float:
        """Mean power over the last window; for a lost meter the mean until the loss."""
        return self._last.power_w if self.fault is None else self.mean_w

    @property
    def mean_w(self) -> float:
        """Mean power since the last start."""
        last = self._last
        return last.joules / (last.at_s - self._started_s) if last.joules else last.power_w

    @property
    def estimate_j(self) -> float:
        """Energy now, or at `stop`: the last reading, extrapolated with `power_w`."""
        last, now_s = self._last, self._now() if self._ended_s is None else self._ended_s
        since_s = 0.0 if self._origin_j is None and self.fault is None else max(0.0, now_s - last.at_s)
        return self._before_j + last.joules + self.power_w * since_s

    def spent_since(self, start_j: float, seconds: float) -> float:
        """Joules since `estimate_j` was `start_j`, `seconds` ago; below three windows, `seconds` times `power_w`."""
        return self.estimate_j - start_j if seconds >= 3 * WINDOW_S else seconds * self.power_w

    # ---- a run -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start counting. Until the first window is over, the power is the mean of the period before this start."""
        if not self.works:
            return
        assert self._source is not None
        self._last = _Reading(0.0, self._now(), self.mean_w)
        self._started_s, self._ended_s, self._origin_j = self._last.at_s, None, None
        self._source.restart()
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastpeft-energy", daemon=True)
        self._thread.start()
        if not self._ready.wait(ANSWER_S):
            self.fault = f"the first reading has not come for {ANSWER_S:g} s"

    def stop(self) -> None:
        """Take the last reading, and wait for it up to LAST_READING_S."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join(LAST_READING_S if self.fault is None else 0)
        if self._thread.is_alive():
            self.fault = self.fault or f"the last reading has not come for {LAST_READING_S:g} s"
        self._thread = None
        self._ended_s = self._last.at_s if self.fault is None else self._now()

    def check(self, elapsed_s: float) -> str | None:
        """The reason why the meter is lost, returned once; else None. It is called often and never waits."""
        since = self._calling_since
        if self.fault is None and since is not None and self._now() - since > LOST_AFTER_S:
            self.fault = f"a reading has not come back for {LOST_AFTER_S:g} s"
        if self.fault is None or self._lost_at_s is not None:
            return None
        self._lost_at_s = elapsed_s
        return self.fault

    def state(self) -> dict[str, Any]:
        """State for a resume."""
        return {"joules": self.estimate_j, "method": self.method, "complete": self.works and self._complete}

    def load_state(self, state: dict[str, Any]) -> None:
        self._before_j, self._complete = state["joules"], self._complete and state["complete"]
        earlier, _, latest = state["method"].rpartition(", then ")
        parts = [earlier] if latest == self._own_method else [earlier, latest]
        self._earlier_methods = "".join(f"{part}, then " for part in parts if part)

    # ---- its thread ------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._source is not None
        self._take(ending=False)
        self._ready.set()
        while self.fault is None:
            ending = self._stopping.wait(self._source.period_s)
            self._take(ending)
            if ending:
                return

    def _take(self, ending: bool) -> None:
        assert self._source is not None
        self._calling_since = self._now()
        try:
            joules = float(self._source.joules())
            if not math.isfinite(joules):
                raise ValueError(f"{joules} joules")
        except BaseException as error:  # a driver that is being reset raises anything
            silent_s = self._now() - self._last.at_s
            if ending or self._origin_j is None or isinstance(error, MeterLost) or silent_s > LOST_AFTER_S:
                self.fault = self.fault or _words(error)
            return
        finally:
            self._calling_since = None
        if self.fault is None:
            self._publish(joules, ending)

    def _publish(self, joules: float, ending: bool) -> None:
        last, now_s = self._last, self._now()
        if self._origin_j is None:
            self._last = _Reading(0.0, now_s, last.power_w)
            self._started_s, self._origin_j = now_s, joules
            return
        joules -= self._origin_j
        since_s, gained = now_s - last.at_s, joules - last.joules
        if gained < 0:
            self.fault = f"its counter went back by {-gained:,.0f} J"
        elif gained > _MAX_W * max(since_s, WINDOW_S):
            self.fault = f"its counter jumped by {gained:,.0f} J in {since_s:.1f} s"
        elif gained == 0 and since_s > LOST_AFTER_S:
            self.fault = f"its counter has stood still for {since_s:.0f} s"
        elif ending or (gained > 0 and since_s >= 0.9 * WINDOW_S):
            power_w = gained / since_s if since_s >= WINDOW_S / 2 else last.power_w
            self._last = _Reading(joules, now_s, power_w)


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, MeterLost) else f"{type(error).__name__}: {error}"
