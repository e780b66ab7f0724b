"""The tuner's decisions, with real kernels, interpreted, and a clock that the test sets."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext

import pytest
import torch

from fastpeft.kernels import dispatch, tune
from fastpeft.kernels.dispatch import Choice, Config
from fastpeft.kernels.launch import LAUNCHES
from fastpeft.kernels.ops.lora_linear import configs
from fastpeft.kernels.ops.sensitivity import op as sensitivity

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ABOUT = {"gpu": "X", "torch": "1", "date": "today"}
SMALL, LARGE = Config(16, 16, 16, 4, 1), Config(32, 32, 16, 4, 1)


def problem(operation: str = "lora_forward", num_tokens: int = 20, dtype=torch.float32) -> tune.Problem:
    return tune.Problem(operation, 24, 32, 0 if operation == "gradient_norm" else 4, num_tokens, dtype)


@pytest.fixture
def few(monkeypatch):
    """Two tiles a form, and kernels that are interpreted."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(configs, "CONFIGS", dict.fromkeys(configs.CONFIGS, (SMALL, LARGE)))
    monkeypatch.setattr(sensitivity, "DIRECT_FP32", (SMALL, LARGE))


def clock(microseconds):
    """A Measure that reads what is forced at the moment and looks its time up; calls nothing."""

    def measure(run):
        forced = [choice for choice in dispatch._forced.values() if choice.form != "split"]
        taken = forced[0] if forced else Choice("split")
        return microseconds(taken.form, taken.config)

    return measure


def table(**of_forms):
    return clock(lambda form, config: of_forms[form] * (0.9 if config == LARGE else 1.0))


def test_the_fastest_form_and_tiles_win(few):
    outcome = tune.tune_one(problem(), DEVICE, table(split=10.0, fused=8.0, fused_two=9.0))
    assert outcome.choice == Choice("fused", LARGE)
    assert outcome.choice.microseconds == {"split": 10.0, "fused": 7.2, "fused_two": 8.1}
    assert (outcome.num_candidates, outcome.faults.total()) == (5, 0)


@pytest.mark.parametrize("fused", [100.0, 11.0, 9.9 / 0.9])
def test_split_stays_unless_something_is_clearly_faster(few, fused):
    outcome = tune.tune_one(problem(), DEVICE, table(split=10.0, fused=fused, fused_two=50.0))
    assert outcome.choice == Choice("split")
    assert outcome.choice.microseconds["fused"] == pytest.approx(fused * 0.9)


def test_what_is_clearly_slower_is_timed_once(few):
    seen = []

    def microseconds(form, config):
        seen.append((form, config))
        return {"split": 10.0, "fused": 9.0, "fused_two": 30.0}[form]

    tune.tune_one(problem(), DEVICE, clock(microseconds), repeats=3)
    assert seen.count(("fused_two", SMALL)) == 1
    assert seen.count(("fused", SMALL)) == seen.count(("split", None)) == 4
    assert seen[-3:] == seen[-6:-3]  # in turns


def test_the_median_decides_and_not_one_lucky_time(few):
    lucky = itertools.chain([1.0], itertools.repeat(20.0))

    def microseconds(form, config):
        return next(lucky) if (form, config) == ("fused", SMALL) else {"split": 1.1}.get(form, 1.2)

    assert tune.tune_one(problem(), DEVICE, clock(microseconds)).choice == Choice("split")


@pytest.mark.parametrize("operation", tune.OPERATIONS)
def test_a_candidate_that_is_wrong_or_fails_never_wins(few, monkeypatch, operation):
    from fastpeft.kernels.ops.lora_linear import fused

    owner, name = {
        "lora_factors": (fused, "factors"),
        "gradient_norm": (sensitivity, "_fused"),
    }.get(operation, (fused, "matmul"))
    real = getattr(owner, name)

    def out_of_shared_memory(*args, **options):
        raise RuntimeError("out of resource: shared memory")

    def wrong(*args, **options):
        got = real(*args, **options)
        (got if torch.is_tensor(got) else got[0]).mul_(1.001)
        return got

    fast = clock(lambda form, config: 10.0 if form == "split" else 1.0)
    for broken, why in ((wrong, "differs from the split form"), (out_of_shared_memory, "RuntimeError")):
        monkeypatch.setattr(owner, name, broken)
        outcome = tune.tune_one(problem(operation), DEVICE, fast, repeats=1)
        assert outcome.choice == Choice("split")
        assert outcome.faults == {why: outcome.num_candidates - 1}
    monkeypatch.setattr(owner, name, real)
    assert tune.tune_one(problem(operation), DEVICE, fast, repeats=1).choice.form != "split"


@pytest.mark.parametrize("operation", tune.OPERATIONS)
def test_each_problem_runs_its_own_operation_alone(few, operation):
    run = tune.build(problem(operation), DEVICE)
    LAUNCHES.clear()
    with tune._forced(problem(operation), Choice("split")):
        run()
    assert not LAUNCHES
    with tune._forced(problem(operation), tune.candidates(problem(operation))[1]):
        got = run()
    kernels, shapes = {
        "lora_forward": ("lora_matmul_kernel", [(20, 32)]),
        "lora_backward": ("lora_matmul_kernel", [(20, 24)]),
        "lora_factors": ("factors_kernel", [(4, 24), (32, 4)]),
        "gradient_norm": ("gradient_norm", [()]),
    }[operation]
    assert any(name.startswith(kernels) for name in LAUNCHES), LAUNCHES
    assert [tuple(tensor.shape) for tensor in got] == shapes


def test_the_table_is_written_after_each_problem_and_goes_on_where_it_ended(few, tmp_path):
    path = tmp_path / "gpu.json"
    todo = [problem("lora_forward"), problem("lora_backward"), problem("lora_factors")]
    measure = table(split=10.0, fused=8.0, fused_two=9.0, fused_factors=11.0)
    found = tune.tune(todo, DEVICE, path, ABOUT, measure=measure, repeats=1)
    next(found)
    assert list(dispatch.read_table(path)) == [todo[0].key]
    found.close()  # as Ctrl-C does
    rest = list(tune.tune(todo, DEVICE, path, ABOUT | {"date": "tomorrow"}, measure=measure, repeats=1))
    assert [outcome.problem for outcome in rest] == todo[1:]
    assert {key[0]: choice.form for key, choice in dispatch.read_table(path).items()} == {
        "lora_forward": "fused",
        "lora_backward": "fused",
        "lora_factors": "split",
    }
    assert json.loads(path.read_text())["gpu"] == "X"


def test_another_version_is_measured_anew(few, tmp_path):
    path = tmp_path / "gpu.json"
    old = dispatch.key_of("lora_forward", torch.float32, 7, 7, 7, 7)
    dispatch.write_table(path, {old: Choice("split")}, ABOUT | {"torch": "0"})
    measure = table(split=10.0, fused=8.0, fused_two=9.0)
    list(tune.tune([problem()], DEVICE, path, ABOUT, measure=measure, repeats=1))
    assert list(dispatch.read_table(path)) == [problem().key]


def test_it_ends_with_its_time(tmp_path):
    now = iter([0.0, 10.0, 59.0, 60.0, 99.0])
    over = tune.minutes(1.0, lambda: next(now))
    assert [over(), over(), over()] == [False, False, True]
    assert not list(tune.tune([problem()], DEVICE, tmp_path / "gpu.json", ABOUT, until=lambda: True))
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("operation", tune.OPERATIONS)
def test_every_form_of_an_operation_is_a_candidate(operation):
    every = tune.candidates(problem(operation))
    assert every[0] == Choice("split")
    assert {choice.form for choice in every} == set(configs.FORMS.get(operation, ("split", "fused")))
    assert len(set(map(str, every))) == len(every)


def test_no_problem_is_measured_twice():
    assert set(configs.FORMS) < set(tune.OPERATIONS)
    found = tune.problems(tune.MODELS["deberta-v3-base"], ranks=(8, 16), buckets=(64, 128))
    assert len({p.key for p in found}) == len(found) == 3 * 2 * (2 * 3 + 1)


class Gpu:
    """A host and a device with clocks of their own, in microseconds: work starts when both are ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host_us: float, device_us: float) -> None:
        self.host_us, self.device_us = host_us, device_us
        self.now = self.free = self.slept = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.now, gpu.free)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def sleep(self, cycles: int) -> None:
        self.free = max(self.now, self.free) + cycles / 2000
        self.slept = cycles / 2000

    def run(self) -> list[torch.Tensor]:
        self.now += self.host_us
        self.free = max(self.now, self.free) + self.device_us
        return []


@pytest.mark.parametrize("host_us", [1.0, 190.0, 500.0, 1500.0])
def test_what_the_host_takes_to_launch_does_not_count(monkeypatch, host_us):
    gpu = Gpu(monkeypatch, host_us, device_us=10.0)
    assert tune.DeviceTimer(torch.device("cuda", 0))(gpu.run) == pytest.approx(10.0)


def test_a_host_that_is_too_slow_ends_the_pauses(monkeypatch):
    gpu = Gpu(monkeypatch, 1e5, device_us=10.0)
    assert tune.DeviceTimer(torch.device("cuda", 0))(gpu.run) > 10.0
    assert gpu.slept == pytest.approx(8 * 8 * 200)


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operation", tune.OPERATIONS)
def test_what_is_chosen_on_the_device_is_not_slower_than_split(operation):
    device = torch.device("cuda", 0)
    one = tune.Problem(operation, 768, 768, 0 if operation == "gradient_norm" else 8, 8192)
    timer = tune.DeviceTimer(device)
    outcome = tune.tune_one(one, device, timer)
    assert outcome.faults["differs from the split form"] == 0
    run = tune.build(one, device)
    ratios = []
    for _ in range(20):
        times = []
        for choice in (outcome.choice, Choice("split")):
            with tune._forced(one, choice):
                times.append(timer(run))
        ratios.append(times[0] / times[1])
    assert sorted(ratios)[10] < 1.05
