"""The energy meter on counters that the test holds: exact where it works, silent and quick where it dies."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastpeft.budget import energy
from fastpeft.budget.energy import EnergyMeter, MeterLost, NvmlPower, Rapl, Source
from tests.support.fake_power import FakeNvml, NVMLError, raiser, write_zone

UUID = "GPU-1234"
FAULT = NVMLError("GPU is lost")
SHIPPED_WINDOW_S, SHIPPED_POWER_PERIOD_S = energy.WINDOW_S, energy.POWER_PERIOD_S


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 20 ms; still the meter's own thread on the real clock."""
    for name, seconds in (("WINDOW_S", 0.02), ("POWER_PERIOD_S", 0.005), ("LOST_AFTER_S", 0.3)):
        monkeypatch.setattr(energy, name, seconds)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.fixture
def meter(nvml: FakeNvml) -> Iterator[EnergyMeter]:
    """Of a GPU, started."""
    meter = EnergyMeter.open(UUID)
    meter.start()
    yield meter
    meter.stop()


def until(happened: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.002)


def meter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastpeft-energy"]


# ---- which method ----------------------------------------------------------------------------


def test_windows_are_a_second_and_power_is_sampled_ten_times_as_often() -> None:
    assert SHIPPED_WINDOW_S >= 1
    assert SHIPPED_POWER_PERIOD_S <= 0.1


def test_the_gpus_counter_comes_first_and_is_asked_for_by_uuid(nvml: FakeNvml) -> None:
    meter = EnergyMeter.open(UUID)
    assert (meter.method, meter.works, meter.reason) == ("nvml_counter", True, "")
    assert nvml.uuids == [UUID]
    assert meter_threads() == []


def test_several_gpus_are_added_up(nvml: FakeNvml) -> None:
    """Of the ranks of one run. Each moves by 2 J between two readings."""
    counts = iter(range(7_000_000, 10**9, 2_000))
    nvml.counter_mj = lambda: next(counts)
    source, _ = energy.open_source("GPU-1", Path(), "GPU-2", "GPU-3")
    assert nvml.uuids == ["GPU-1", "GPU-2", "GPU-3"]
    assert source is not None
    assert source.method == "nvml_counter"
    first = source.joules()
    assert source.joules() - first == 3 * 3 * 2


def test_without_one_of_them_there_is_no_sum(nvml: FakeNvml) -> None:
    nvml.counter_mj = nvml.power_mw = raiser(NVMLError("not supported"))
    source, reason = energy.open_source("GPU-1", Path(), "GPU-2")
    assert source is None
    assert "GPU-1" in reason


@pytest.mark.parametrize("counter", [raiser(NVMLError("not supported")), raiser(AttributeError("no such function")), 0])
def test_without_a_counter_the_power_is_integrated(counter, nvml: FakeNvml) -> None:
    nvml.counter_mj = counter
    assert EnergyMeter.open(UUID).method == "nvml_power"


def test_a_gpu_without_either_has_no_meter_and_rapl_is_none_of_it(nvml: FakeNvml, tmp_path: Path) -> None:
    write_zone(tmp_path, "0", "package-0", 10)
    nvml.counter_mj = nvml.power_mw = raiser(NVMLError("not supported"))
    meter = EnergyMeter.open(UUID, tmp_path)
    assert (meter.method, meter.works, meter.joules) == ("none", False, None)
    assert "nvml_counter: NVMLError: not supported; nvml_power: NVMLError: not supported" in meter.reason
    assert EnergyMeter.open(None, tmp_path).method == "rapl"


@pytest.mark.parametrize("error", [FAULT, OSError("no library"), RuntimeError("?")], ids=lambda e: type(e).__name__)
def test_a_driver_that_cannot_be_opened_is_no_meter(error: Exception, nvml: FakeNvml) -> None:
    nvml.init = raiser(error)
    meter = EnergyMeter.open(UUID)
    meter.start()
    meter.stop()
    assert (meter.method, meter.joules, meter.estimate_j, meter.check(1.0)) == ("none", None, 0.0, None)
    assert f"{type(error).__name__}: {error}" in meter.reason


def test_without_the_drivers_package_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter.open(UUID).method == "none"


def test_a_driver_that_hangs_when_it_is_opened_holds_nothing_up(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "ANSWER_S", 0.1)
    wakes = threading.Event()
    nvml.init = wakes.wait
    began = time.monotonic()
    meter = EnergyMeter.open(UUID)
    assert time.monotonic() - began < 5
    assert (meter.method, meter.reason) == ("none", "the driver has not answered for 0.1 s")
    wakes.set()


# ---- RAPL ------------------------------------------------------------------------------------


def test_rapl_counts_packages_and_their_memory_once(tmp_path: Path) -> None:
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "1:0": "uncore", "2": "psys"}
    for zone, name in zones.items():
        write_zone(tmp_path, zone, name, 1_000_000)
    meter = EnergyMeter.open(None, tmp_path)
    meter.start()
    for i, (zone, name) in enumerate(zones.items()):
        write_zone(tmp_path, zone, name, 1_000_000 + 10**i)
    meter.stop()
    assert meter.joules == pytest.approx((1 + 10**2 + 10**3) / 1e6, abs=1e-9)
    assert meter.method == "rapl"


def test_rapl_wraps_around_zone_by_zone(tmp_path: Path) -> None:
    zones = [write_zone(tmp_path, "0", "package-0", 900, 1000), write_zone(tmp_path, "1", "package-1", 100, 2000)]
    source = Rapl(zones)
    for first, second, total in ((50, 300, 350), (50, 300, 350), (949, 100, 1249 + 1800), (948, 200, 3049 + 999 + 100)):
        (zones[0] / "energy_uj").write_text(f"{first}\n")
        (zones[1] / "energy_uj").write_text(f"{second}\n")
        assert source.joules() == pytest.approx(total / 1e6, abs=1e-12)


def test_a_counter_that_may_not_be_read_is_none_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zone(tmp_path, "0", "package-0", 900)
    read = Path.read_text

    def refuse(path: Path, *args, **kwargs) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = EnergyMeter.open(None, tmp_path)
    assert meter.method == "none"
    assert "energy_uj may not be read: as root, chmod a+r" in meter.reason


@pytest.mark.parametrize(
    "spoil",
    [
        lambda zone: (zone / "energy_uj").write_text("many\n"),
        lambda zone: (zone / "max_energy_range_uj").unlink(),
        lambda zone: (zone / "name").write_text("core\n"),
    ],
)
def test_a_broken_powercap_folder_is_no_meter(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    spoil(write_zone(tmp_path, "0", "package-0", 900))
    meter = EnergyMeter.open(None, tmp_path)
    assert meter.method == "none"
    assert str(tmp_path) in meter.reason
    assert EnergyMeter.open(None, tmp_path / "absent").method == "none"


# ---- what is measured ------------------------------------------------------------------------


def test_only_what_is_between_start_and_stop_counts_and_exactly(nvml: FakeNvml) -> None:
    meter = EnergyMeter.open(UUID)
    nvml.counter_mj += 1_000_000  # loading the model
    meter.start()
    assert meter.joules == 0.0
    nvml.counter_mj += 4_321
    until(lambda: meter.joules == pytest.approx(4.321, abs=1e-6))
    nvml.counter_mj += 1_000
    meter.stop()
    assert meter.joules == meter.estimate_j == pytest.approx(5.321, abs=1e-6)
    nvml.counter_mj += 9_000_000
    assert meter.joules == meter.estimate_j == pytest.approx(5.321, abs=1e-6)
    assert (meter.method, meter.check(1.0)) == ("nvml_counter", None)
    assert meter_threads() == []


def test_a_reading_is_a_window_old_at_most_and_the_estimate_goes_on_between(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 W for a second, read every 0.1 s."""
    monkeypatch.setattr(energy, "WINDOW_S", 0.1)
    monkeypatch.setattr(energy, "LOST_AFTER_S", 30.0)
    began = time.monotonic()
    nvml.counter_mj = lambda: 10**9 + int(200_000 * (time.monotonic() - began))
    meter = EnergyMeter.open(UUID)
    meter.start()
    until(lambda: meter.power_w > 0)
    steps = set()
    start_j, start_s = nvml.counter_mj() / 1e3, time.monotonic()
    offset_j = meter.estimate_j
    while time.monotonic() - start_s < 1.0:
        truth_j = nvml.counter_mj() / 1e3 - start_j + offset_j
        assert meter.estimate_j == pytest.approx(truth_j, abs=200 * 0.1)
        assert meter.joules <= truth_j + 200 * 0.01
        steps.add(meter.joules)
        time.sleep(0.005)
    meter.stop()
    assert 3 <= len(steps) <= 12
    assert meter.mean_w == pytest.approx(200, rel=0.1)


def test_power_is_integrated_by_the_trapezoid_rule(nvml: FakeNvml) -> None:
    now_s = 50.0
    source = NvmlPower(nvml, "handle", lambda: now_s)
    for power_w, gap_s, total in [(100, 3, 0), (300, 0.1, 20), (300, 0.05, 35), (50, 0.2, 70), (150, 0.1, 80)]:
        nvml.power_mw, now_s = power_w * 1000, now_s + gap_s
        assert source.joules() == pytest.approx(total, abs=1e-9)
    now_s += energy.LOST_AFTER_S + 1
    with pytest.raises(MeterLost, match="no power was read for 1 s"):
        source.joules()


def test_integrated_power_on_the_meters_thread(nvml: FakeNvml) -> None:
    nvml.counter_mj = raiser(NVMLError("not supported"))
    meter = EnergyMeter.open(UUID)
    time.sleep(0.4)  # longer than what loses a meter: loading the model
    meter.start()
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 0.5)
    meter.stop()
    assert meter.method == "nvml_power"
    assert meter.joules == pytest.approx(300 * (time.monotonic() - began), rel=0.1)


# ---- a meter that dies -----------------------------------------------------------------------


def running(nvml: FakeNvml, meter: EnergyMeter) -> None:
    """Some readings at about 100 W."""
    began, base = time.monotonic(), nvml.counter_mj
    nvml.counter_mj = lambda: base + int(100_000 * (time.monotonic() - began))
    until(lambda: meter.joules and meter.joules > 5)


@pytest.mark.parametrize(
    "error", [FAULT, OSError("?"), SystemExit(3), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_a_driver_that_raises_from_some_reading_on_is_lost(
    error: BaseException, nvml: FakeNvml, meter: EnergyMeter
) -> None:
    running(nvml, meter)
    nvml.counter_mj = raiser(error)
    until(lambda: meter.fault)
    assert meter.joules is None
    mean_w = meter.power_w
    assert mean_w == pytest.approx(100, rel=0.5)
    spent_j, at_s = meter.estimate_j, time.monotonic()
    assert meter.check(123.4) == f"{type(error).__name__}: {error}"
    assert meter.check(124.4) is None
    assert meter.method == "nvml_counter, lost at 123 s"
    time.sleep(0.05)
    assert meter.estimate_j - spent_j == pytest.approx(mean_w * (time.monotonic() - at_s), rel=0.3)
    meter.stop()
    after_j = meter.estimate_j
    time.sleep(0.02)
    assert meter.estimate_j == after_j
    assert meter.joules is None


def test_a_short_failure_costs_nothing(nvml: FakeNvml, meter: EnergyMeter) -> None:
    failed = threading.Event()

    def fail() -> int:
        failed.set()
        raise FAULT

    nvml.counter_mj += 1_000
    until(lambda: meter.joules == pytest.approx(1.0, abs=1e-6))
    value, nvml.counter_mj = nvml.counter_mj, fail
    assert failed.wait(20)
    nvml.counter_mj = value + 2_000
    until(lambda: meter.joules == pytest.approx(3.0, abs=1e-6))
    meter.stop()
    assert (meter.check(1.0), meter.method) == (None, "nvml_counter")


def test_a_reading_that_never_comes_back_stalls_nobody(
    nvml: FakeNvml, meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "LAST_READING_S", 0.1)
    running(nvml, meter)
    wakes = threading.Event()

    def hang() -> int:
        wakes.wait(30)
        return 10**12

    nvml.counter_mj = hang
    longest_s, told = 0.0, None
    deadline = time.monotonic() + 20
    while told is None and time.monotonic() < deadline:
        began = time.perf_counter()
        told = meter.check(7.0)
        _ = meter.joules, meter.estimate_j, meter.power_w
        longest_s = max(longest_s, time.perf_counter() - began)
        time.sleep(0.001)
    assert told == "a reading has not come back for 0.3 s"
    assert longest_s < 0.1
    assert (meter.joules, meter.method) == (None, "nvml_counter, lost at 7 s")
    began = time.monotonic()
    meter.stop()
    assert time.monotonic() - began < 5
    spent_j = meter.estimate_j
    wakes.set()
    until(lambda: not meter_threads())
    assert (meter.joules, meter.estimate_j) == (None, spent_j)  # what came late is not counted


@pytest.mark.parametrize("hang_at", ["start", "stop"])
def test_a_first_or_last_reading_that_hangs_is_waited_for_briefly(
    hang_at: str, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes = threading.Event()
    meter = EnergyMeter.open(UUID)
    if hang_at == "start":
        monkeypatch.setattr(energy, "ANSWER_S", 0.1)
        nvml.counter_mj = lambda: wakes.wait(30) or 1
    meter.start()
    if hang_at == "stop":
        monkeypatch.setattr(energy, "LAST_READING_S", 0.1)
        nvml.counter_mj = lambda: wakes.wait(30) or 1
    began = time.monotonic()
    meter.stop()
    assert time.monotonic() - began < 10
    assert meter.joules is None
    assert "has not come for 0.1 s" in str(meter.check(2.0))
    wakes.set()
    until(lambda: not meter_threads())


@pytest.mark.parametrize(
    ("counter", "told"),
    [
        (lambda mj: mj - 2_000_000, "its counter went back by"),
        (lambda mj: 5, "its counter went back by"),
        (lambda mj: mj + 10**12, "its counter jumped by"),
        (lambda mj: float("nan"), "nan joules"),
        (lambda mj: None, "TypeError"),
        (lambda mj: mj, "its counter has stood still for"),
    ],
    ids=["back", "reset", "jump", "nan", "none", "still"],
)
def test_a_counter_that_lies_is_lost(counter: Callable, told: str, nvml: FakeNvml, meter: EnergyMeter) -> None:
    running(nvml, meter)
    mj = nvml.counter_mj()
    nvml.counter_mj = lambda: counter(mj)
    until(lambda: meter.fault)
    assert told in str(meter.check(1.0))
    assert meter.joules is None


def test_a_power_that_is_none_is_lost(nvml: FakeNvml) -> None:
    nvml.counter_mj = raiser(NVMLError("not supported"))
    meter = EnergyMeter.open(UUID)
    meter.start()
    until(lambda: meter.joules)
    nvml.power_mw = -1
    until(lambda: meter.fault)
    assert "a power of -0.001 W" in str(meter.check(1.0))
    meter.stop()


def test_a_last_reading_that_fails_leaves_no_number(nvml: FakeNvml, meter: EnergyMeter) -> None:
    running(nvml, meter)
    nvml.counter_mj = raiser(FAULT)
    meter.stop()
    assert meter.joules is None
    assert meter.check(9.0) == "NVMLError: GPU is lost"


# ---- across a resume -------------------------------------------------------------------------


class Given(Source):
    """A counter that the test sets."""

    def __init__(self, method: str, joules: float = 100.0) -> None:
        super().__init__()
        self.method, self.now_j = method, joules

    def joules(self) -> float:
        return self.now_j


def test_joules_go_on_exactly_where_the_checkpoint_was(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Given("nvml_counter", 500.0), Given("nvml_counter", 20.0)
    meter = EnergyMeter(first)
    meter.start()
    first.now_j += 8.0
    until(lambda: meter.joules == 8.0)
    meter.stop()  # the estimate of a checkpoint is the reading itself
    state = meter.state()
    assert state == {"joules": 8.0, "method": "nvml_counter", "complete": True}
    resumed = EnergyMeter(second)
    second.now_j += 1000  # between the parts
    resumed.start()
    resumed.load_state(state)
    assert resumed.joules == resumed.estimate_j == 8.0
    second.now_j += 3.5
    until(lambda: resumed.joules == 11.5)
    second.now_j += 1.0
    resumed.stop()
    assert resumed.joules == resumed.estimate_j == 12.5
    assert resumed.state() == {"joules": 12.5, "method": "nvml_counter", "complete": True}


@pytest.mark.parametrize(
    ("methods", "told", "known"),
    [
        (["rapl", "rapl", "rapl"], "rapl", True),
        (["nvml_counter", "nvml_power"], "nvml_counter, then nvml_power", True),
        (["rapl", "nvml_counter", "nvml_counter"], "rapl, then nvml_counter", True),
        (["none", "rapl"], "none, then rapl", False),
        (["rapl", "none", "none"], "rapl, then none", False),
        (["none", "none"], "none", False),
    ],
)
def test_the_method_names_every_part_and_a_part_without_a_number_leaves_none(
    methods: list[str], told: str, known: bool
) -> None:
    state = None
    for method in methods:
        source = None if method == "none" else Given(method)
        meter = EnergyMeter(source)
        meter.start()
        if state:
            meter.load_state(state)
        if source:
            source.now_j += 2.0
        meter.stop()
        state = meter.state()
    assert meter.method == told
    assert meter.joules == (2.0 * len(methods) if known else None)


def test_a_meter_that_was_lost_before_the_resume_leaves_no_number_but_what_is_spent(nvml: FakeNvml) -> None:
    meter = EnergyMeter.open(UUID)
    meter.start()
    running(nvml, meter)
    nvml.counter_mj = raiser(FAULT)
    until(lambda: meter.fault)
    meter.check(12.0)
    state = meter.state()
    assert state["joules"] > 5
    assert state["complete"] is False
    meter.stop()
    resumed = EnergyMeter(Given("nvml_counter"))
    resumed.start()
    resumed.load_state(state)
    assert resumed.method == "nvml_counter, lost at 12 s, then nvml_counter"
    assert resumed.joules is None
    assert resumed.estimate_j == pytest.approx(state["joules"])
    assert resumed.works
    resumed.stop()
