"""The budget clock on a clock that the test turns by hand."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest

from fastpeft.budget import BudgetClock, Due
from fastpeft.budget.clock import RESERVE_FACTOR
from fastpeft.budget.energy import WINDOW_S, EnergyMeter, Source
from fastpeft.config import Budget, Interval, parse_budget, parse_interval


@dataclass
class Hands:
    now_s: float = 1e6

    def __call__(self) -> float:
        return self.now_s


def start(budget: str) -> tuple[BudgetClock, Hands]:
    hands = Hands()
    clock = BudgetClock(parse_budget(budget), hands)
    clock.start()
    return clock, hands


# ---- what is spent ---------------------------------------------------------------------------


def test_elapsed_counts_from_start_and_on_top_of_earlier_parts() -> None:
    hands = Hands()
    clock = BudgetClock(Budget("seconds", 100), hands)
    hands.now_s += 50  # set-up is outside
    assert clock.elapsed_s == 0
    clock.start(30.0)
    hands.now_s += 12.5
    assert clock.elapsed_s == pytest.approx(42.5)
    assert clock.spent == clock.elapsed_s


@pytest.mark.parametrize(("budget", "spent"), [("100s", 7.0), ("1000tok", 60), ("10steps", 2)])
def test_spent_is_in_the_budgets_unit(budget: str, spent: float) -> None:
    clock, hands = start(budget)
    hands.now_s += 7.0
    clock.count_tokens(10, 1.0)  # calibration: tokens, but no step
    clock.count_step(20, 1.0)
    clock.count_step(30, 1.0)
    assert clock.spent == spent


def test_steps_fit_exactly_and_never_look_at_time() -> None:
    clock, hands = start("3steps")
    clock.final_s = 1e9
    hands.now_s += 1e9
    taken = 0
    while clock.fits(10**9):
        clock.count_step(10, 100.0)
        taken += 1
    assert taken == 3
    assert clock.progress == 1.0


def test_tokens_never_overrun_and_a_smaller_batch_may_still_fit() -> None:
    clock, _ = start("100tok")
    clock.count_step(60, 1.0)
    assert clock.progress == pytest.approx(0.6)
    assert not clock.fits(41)
    assert clock.fits(40)
    clock.count_step(40, 1.0)
    assert not clock.fits(1)


def test_seconds_keep_a_reserve_for_the_final_evaluation() -> None:
    clock, hands = start("100s")
    clock.final_s = 20.0
    clock.count_step(1000, 2.0)  # 2 ms a token
    hands.now_s += 100 - RESERVE_FACTOR * 20.0 - 1.0  # 77 s: one second is left to train
    assert clock.fits(499)
    assert not clock.fits(501)
    assert not clock.fits(499, more_s=0.1)
    assert clock.fits(100, more_s=0.7)


def test_speed_is_a_mean_over_recent_steps() -> None:
    clock, hands = start("100s")
    clock.count_step(100, 1.0)
    for _ in range(200):
        clock.count_step(100, 3.0)  # the machine has become slower
    hands.now_s += 97.5
    assert clock.fits(80)
    assert not clock.fits(90)


def test_progress_reaches_one_where_training_ends_and_never_falls() -> None:
    clock, hands = start("100s")
    clock.final_s = 20.0
    seen = []
    for _ in range(8):
        hands.now_s += 10
        seen.append(clock.progress)
    assert seen == sorted(seen)
    assert seen[3] == pytest.approx(40 / 78)
    assert seen[-1] == 1.0
    clock.final_s = 0.0  # the evaluation became quicker: the share spent is smaller now
    assert clock.progress == 1.0


@pytest.mark.parametrize("final_s", [90.0, 91.0, 1000.0])
def test_a_reserve_over_the_budget_breaks_nothing(final_s: float) -> None:
    clock, hands = start("90s")
    clock.final_s = final_s
    hands.now_s += 1
    assert 0 < clock.progress <= 1
    assert not clock.fits(1)


# ---- the rule under noise --------------------------------------------------------------------


class Counter(Source):
    """A hand-turned energy counter."""

    method = "hand"

    def __init__(self) -> None:
        super().__init__()
        self.now_j = 1e7

    def joules(self) -> float:
        return self.now_j


@dataclass
class Machine:
    """Steps and evaluations whose times scatter, sometimes badly."""

    rng: random.Random
    step_s: float
    evaluation_s: float
    slowdown: float
    """Speed at the end over speed at the start."""
    hands: Hands = field(default_factory=Hands)
    longest_step_s: float = 0.0

    def step(self, num_tokens: int, progress: float) -> float:
        stall = 5.0 if self.rng.random() < 0.005 else 1.0
        mean = num_tokens / 1000 * self.step_s * self.slowdown**progress
        seconds = mean * self.rng.lognormvariate(0, 0.25) * stall
        self.longest_step_s = max(self.longest_step_s, seconds)
        self.hands.now_s += seconds
        return seconds

    def evaluate(self) -> float:
        seconds = self.evaluation_s * self.rng.uniform(0.96, 1.04)
        self.hands.now_s += seconds
        return seconds


def simulate(limit_s: float, machine: Machine) -> BudgetClock:
    """The loop's own order: evaluate when due, step while one fits, evaluate at the end."""
    clock = BudgetClock(Budget("seconds", limit_s), machine.hands)
    due = Due(parse_interval("20%"), 1000)
    clock.final_s = machine.evaluation_s * machine.rng.uniform(0.9, 1.1)
    clock.start()
    evaluated_at = -1
    while True:
        num_tokens = machine.rng.randint(200, 1800)
        if not clock.fits(num_tokens):
            break
        if clock.steps and due(clock):
            if clock.fits(0, more_s=clock.final_s):
                clock.final_s = machine.evaluate()
                evaluated_at = clock.steps
            due.done(clock)
        clock.count_step(num_tokens, machine.step(num_tokens, clock.progress))
    if evaluated_at != clock.steps:
        machine.evaluate()
    return clock


@pytest.mark.parametrize("limit_s", [5.0, 20.0, 60.0, 480.0])
def test_rule_holds_when_step_times_scatter(limit_s: float, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        step_s = limit_s * 10 ** rng.uniform(-4, -2.3)
        evaluation_s = limit_s * rng.uniform(0.001, 0.05)
        machine = Machine(rng, step_s, evaluation_s, slowdown=rng.choice([0.5, 1.0, 2.0]))
        clock = simulate(limit_s, machine)
        slack_s = max(0.01 * limit_s, machine.longest_step_s)
        assert clock.elapsed_s <= limit_s + slack_s, machine
        if limit_s >= 60:
            assert clock.elapsed_s >= 0.95 * limit_s, machine


# ---- joules ----------------------------------------------------------------------------------


class Meter(EnergyMeter):
    """Read by hand, where the thread would: `turn` passes time and energy, with a reading each window."""

    def __init__(self, hands: Hands) -> None:
        self.counter, self.hands = Counter(), hands
        super().__init__(self.counter, now=hands)
        self._started_s = hands.now_s
        self._take(ending=False)

    def turn(self, seconds: float, power_w: float) -> None:
        end_s = self.hands.now_s + seconds
        while self.hands.now_s < end_s:
            window_ends_s = (math.floor(self.hands.now_s / WINDOW_S + 1e-9) + 1) * WINDOW_S
            until_s = min(end_s, window_ends_s)
            self.counter.now_j += power_w * (until_s - self.hands.now_s)
            self.hands.now_s = until_s
            if until_s == window_ends_s:
                self._take(ending=False)


def test_joules_are_the_reading_carried_on_and_keep_their_own_reserve() -> None:
    hands = Hands()
    meter = Meter(hands)
    clock = BudgetClock(Budget("joules", 1000), hands, meter)
    clock.start()
    meter.turn(3.0, 100.0)
    assert clock.spent == pytest.approx(300)
    meter.turn(0.5, 500.0)  # not read yet: taken for half a second at 100 W
    assert clock.spent == pytest.approx(350)
    meter.turn(0.5, 500.0)
    assert clock.spent == pytest.approx(800)
    assert clock.progress == pytest.approx(0.8)
    clock.count_step(1000, 1.0)  # 1 ms a token, 0.5 J at the power of the last window
    assert clock.fits(399)
    assert not clock.fits(401)
    clock.final_s, clock.final_j = 1e9, 50.0
    assert clock.fits(289)
    assert not clock.fits(291)
    assert clock.fits(100, more_s=0.18)
    assert not clock.fits(100, more_s=0.2)
    assert clock.progress == pytest.approx(800 / (1000 - RESERVE_FACTOR * 50))


@pytest.mark.parametrize("limit_j", [1_000.0, 20_000.0, 300_000.0])
def test_rule_holds_for_joules_up_to_what_the_power_changes_in_a_window(limit_j: float, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        hands = Hands()
        meter = Meter(hands)
        clock = BudgetClock(Budget("joules", limit_j), hands, meter)
        start_j, power_w = meter.counter.now_j, 200.0
        evaluation_s, step_s = limit_j / 200 * rng.uniform(0.001, 0.03), limit_j / 200 * 10 ** rng.uniform(-4, -2.3)
        clock.final_j = evaluation_s * 200
        clock.start()
        meter.turn(WINDOW_S, power_w)
        longest_j = 0.0
        while clock.fits(1000):
            seconds = step_s * rng.lognormvariate(0, 0.25)
            power_w = min(250.0, max(150.0, power_w + rng.uniform(-20, 20) * seconds))
            longest_j = max(longest_j, seconds * power_w)
            meter.turn(seconds, power_w)
            clock.count_step(1000, seconds)
        meter.turn(evaluation_s, 150.0)
        spent_j = meter.counter.now_j - start_j
        assert spent_j <= limit_j + max(0.01 * limit_j, longest_j) + 20 * WINDOW_S
        assert spent_j >= 0.93 * limit_j - 200 * WINDOW_S


# ---- what is due -----------------------------------------------------------------------------


def advance(clock: BudgetClock, hands: Hands, seconds: float = 1.0) -> None:
    hands.now_s += seconds
    clock.count_step(10, seconds)


@pytest.mark.parametrize(
    ("interval", "budget", "expected"),
    [
        ("20%", "20steps", [4, 8, 12, 16, 20]),
        ("30%", "20steps", [6, 12, 18]),
        ("100%", "20steps", [20]),
        ("20%", "200tok", [4, 8, 12, 16, 20]),
        ("25%", "20s", [5, 10, 15, 20]),
        ("7steps", "20steps", [7, 14]),
        ("1steps", "20s", list(range(1, 21))),
        ("6s", "20steps", [6, 12, 18]),
        ("epoch", "20steps", [8, 16]),
        ("end", "20steps", []),
    ],
)
def test_due_after_these_steps_of_one_second(interval: str, budget: str, expected: list[int]) -> None:
    clock, hands = start(budget)
    due = Due(parse_interval(interval), steps_per_epoch=8)
    fired = []
    assert not due(clock)
    for step in range(1, 21):
        advance(clock, hands)
        if due(clock):
            fired.append(step)
            due.done(clock)
            assert not due(clock)
    assert fired == expected


@pytest.mark.parametrize(
    "interval", [Interval("fraction", 0.1), Interval("steps", 3), Interval("seconds", 4.0), Interval("epoch")]
)
def test_due_resumes_by_its_count(interval: Interval, seed: int) -> None:
    broken_at = random.Random(seed).randint(1, 29)
    expected, fired = [], []
    for stop, found in ((math.inf, expected), (broken_at, fired)):
        clock, hands = start("30steps")
        due = Due(interval, steps_per_epoch=5)
        for step in range(1, 31):
            if step == stop:
                count = due.count
                due = Due(interval, steps_per_epoch=5)
                due.count = count
            advance(clock, hands)
            if due(clock):
                found.append(step)
                due.done(clock)
    assert fired == expected


def test_due_that_was_missed_several_times_fires_once() -> None:
    clock, hands = start("100s")
    due = Due(parse_interval("10s"), 1)
    advance(clock, hands, 35.0)
    assert due(clock)
    due.done(clock)
    assert due.count == 3
    assert not due(clock)
