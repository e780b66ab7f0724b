"""FoT: each part against its formula, its state, and the loop that it closes with Adam on a noisy quadratic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fastpeft.config.schedules import FotConfig, ScheduleConfig
from fastpeft.schedules import make_schedule
from fastpeft.schedules.forecast import Divergences, Forecaster
from fastpeft.schedules.fot import Fot
from fastpeft.schedules.fot_signals import Evidence, statistics
from fastpeft.signals import Blocks, BlockSums, Measured, Need

LR = 1e-3
BLOCKS = Blocks(("q", "v"), (0, 0), ("q", "v"), (30, 50, 20), (10, 40))


def make(warmup_steps: int = 0, blocks: Blocks | None = BLOCKS, lr: float = LR, **options: Any) -> Fot:
    options = {"window": 4, "gate": False, "block_scaling": False} | options
    schedule = make_schedule(
        ScheduleConfig(name="fot", warmup_steps=warmup_steps, fot=FotConfig(**options)), lr, blocks
    )
    assert isinstance(schedule, Fot)
    return schedule


def sums(grad_sq: float = 2.0, descent: float = 1.0) -> BlockSums:
    return BlockSums(
        grad_sq_U=np.full(3, grad_sq / 3),
        mean_sq_U=np.full(3, 0.1),
        second_U=np.array([0.3, 1.0, 0.1]),
        descent_U=np.array([0.5, 0.3, 0.2]) * descent,
    )


def step(number: int, total: int, lr: float = LR, **fields: Any) -> Measured:
    """Step `number` of `total`, its loss on a power law."""
    basis: dict[str, Any] = {"loss": 3.0 * (number + 20) ** -0.4, "blocks": sums()} | fields
    return Measured(
        step=number,
        progress=(number - 1) / total,
        elapsed_s=0.1 * number,
        lr=lr,
        num_tokens=8,
        grad_norm=1.0,
        **basis,
    )


def follow(
    schedule: Fot, count: int, total: int, make_step: Callable[..., Measured] = step, first: int = 1
) -> Iterator[float]:
    """Rates of the steps after `first`, ..., `count`."""
    for number in range(first, count + 1):
        measured = make_step(number, total, lr=schedule.lr)
        yield schedule.rates(measured, number / total).lr


def figures(schedule: Fot, kind: str = "schedule") -> list[dict[str, Any]]:
    return [fields for type, fields in schedule.told() if type == kind]


# ---- the rate ------------------------------------------------------------------------------


def test_statistics_are_those_of_the_definition() -> None:
    found = statistics(sums(), np.array(BLOCKS.num_elements, dtype=float))
    assert found is not None
    means = np.array([0.3 / 30, 1.0 / 50, 0.1 / 20])
    assert found.grad_sq == pytest.approx(2.0 / 100)
    assert found.root_second == pytest.approx(math.sqrt(1.4 / 100))
    assert found.second_spread == pytest.approx(means.std())
    assert found.descent == pytest.approx(0.02 / (2 * (means.std() + math.sqrt(0.014))))
    assert statistics(sums(math.nan), np.array(BLOCKS.num_elements)) is None
    assert statistics(sums(0.0), np.array(BLOCKS.num_elements)) is None


def test_ten_blocks_hold_the_first_rate_after_a_warm_up() -> None:
    schedule = make(warmup_steps=5)
    rates = [schedule.rates(None, 0.0).lr, *follow(schedule, 39, 1000)]
    assert rates[:5] == pytest.approx([LR * i / 5 for i in range(1, 6)])
    assert rates[5:] == [LR] * 35
    assert not schedule.told()
    assert next(follow(schedule, 40, 1000, first=40)) != LR


def test_each_refit_takes_the_bound_or_grows_by_a_tenth() -> None:
    """The loss is an exact power law, so that the bound can be computed here."""
    total, before, seen = 400, LR, set()
    schedule = make(blocks=BLOCKS)
    for _ in follow(schedule, 39, total):
        pass
    for number in range(40, total, 4):
        # Gradients that shrink tenfold and back: first the growth is the lesser, then the bound.
        grad_sq = 0.02 * 10 ** (2 * math.sin(number / 30))
        make_step = lambda n, total, lr: step(n, total, lr, blocks=sums(grad_sq))  # noqa: B023, E731
        *_, after = follow(schedule, number, total, make_step, first=max(40, number - 3))
        (now,) = figures(schedule)
        curve = lambda t: 3.0 * (t + 20) ** -0.4  # noqa: E731
        predicted = statistics(sums(grad_sq), np.array(BLOCKS.num_elements)).descent
        if number >= 44:  # a whole block of one gradient
            bound = (curve(number) - curve(total)) / (total - number) / predicted
            assert now["bound"] == pytest.approx(bound, rel=0.02)
        assert now["at_bound"] == (now["bound"] <= 1.1 * before)
        assert after == pytest.approx(min(max(min(1.1 * before, now["bound"]), LR / 100), 30 * LR))
        seen.add((now["at_bound"], now["at_rail"]))
        before = after
    assert {(True, False), (False, False)} <= seen


def test_the_rate_stays_between_the_rails() -> None:
    for grad_sq, rail in ((1e-12, 30 * LR), (1e12, LR / 100)):
        schedule = make()
        make_step = lambda n, total, lr: step(n, total, lr, blocks=sums(grad_sq))  # noqa: B023, E731
        *_, last = follow(schedule, 300, 400, make_step)
        assert last == rail
        schedule.finish(1.0)
        assert figures(schedule)[-1]["at_rail_share"] > 0.3


def test_nothing_left_to_gain_holds_the_rate_and_is_counted() -> None:
    schedule = make()
    rates = list(follow(schedule, 44, 44))  # the last block ends with the budget: f(now) is f(T)
    assert rates[-1] == rates[-2]
    schedule.finish(1.0)
    assert figures(schedule)[-1]["held_refits"] == 1


def test_the_horizon_follows_the_cost_of_a_step_not_their_number() -> None:
    """Steps that take three times as long from the middle on, as under a budget of seconds."""
    forecaster = Forecaster(4, False)
    costs = [1.0] * 60 + [3.0] * 60
    spent = np.concatenate([[0], np.cumsum(costs)]) / 400
    for number in range(1, 121):
        forecaster.add(number, spent[number - 1], spent[number], 1.0 / number)
        if number % 4 == 0:
            assert forecaster.horizon == pytest.approx(number + (1 - spent[number]) / (spent[number] / number))
    assert forecaster.horizon == pytest.approx(120 + 0.4 / (0.6 / 120))


def test_what_came_before_the_first_step_costs_no_step() -> None:
    """Calibration spent a tenth of the budget."""
    forecaster = Forecaster(4, False)
    for number in range(1, 5):
        forecaster.add(number, 0.1 + 0.01 * (number - 1), 0.1 + 0.01 * number, 1.0)
    assert forecaster.horizon == pytest.approx(90)


@pytest.mark.parametrize(("total", "window"), [(100, 4), (1280, 20), (10_000, 32)])
def test_an_automatic_block_is_a_64th_of_the_run(total: int, window: int) -> None:
    forecaster = Forecaster(None, False)
    for number in range(1, 65):
        forecaster.add(number, (number - 1) / total, number / total, 1.0)
    assert forecaster.window == window
    assert forecaster.num_blocks == (1 + (64 - 8) // window if window <= 8 else 64 // window)


@pytest.mark.parametrize(("descent", "factor"), [(-1.0, 0.9), (1e9, 0.9), (1e-9, 1.1)])
def test_calibrated_the_bound_asks_the_measured_descent(descent: float, factor: float) -> None:
    schedule = make(calibrate=True)
    make_step = lambda n, total, lr: step(n, total, lr, blocks=sums(descent=descent))  # noqa: E731
    rates = list(follow(schedule, 44, 400, make_step))
    assert rates[38] == LR
    assert rates[39] == pytest.approx(LR * factor)
    assert rates[43] == pytest.approx(LR * factor**2)
    now = figures(schedule)[-1]
    assert now["descent"] == pytest.approx(descent)
    assert now["kappa"] == pytest.approx(descent / now["predicted_descent"])
    if descent > 0:
        assert now["bound"] == pytest.approx(now["improvable"] / (400 - 44) / descent)


@pytest.mark.parametrize(("descent", "factor"), [(0.3, 1.5), (-0.3, 0.9)])
def test_aligned_the_rate_moves_every_16_steps(descent: float, factor: float) -> None:
    schedule = make(alignment=True, warmup_steps=3)
    make_step = lambda n, total, lr: step(n, total, lr, blocks=sums(descent=descent))  # noqa: E731
    rates = list(follow(schedule, 50, 400, make_step))
    assert rates[14] == LR
    assert rates[15:31] == pytest.approx([LR * factor] * 16)
    assert rates[47] == pytest.approx(LR * factor**3)


@pytest.mark.parametrize(("mean", "moves"), [(0.0, 0), (1.0, 1), (-1.0, -1)])
def test_confident_the_rate_moves_by_evidence_alone(mean: float, moves: int, seed: int) -> None:
    """Of a descent in noise of standard deviation 4: z of 16 steps is 1, of 100 steps 2.5."""
    noise = np.random.default_rng(seed).standard_normal(4000) * 4

    def noisy(number: int, total: int, lr: float) -> Measured:
        return step(number, total, lr, blocks=sums(descent=mean + noise[number]))

    def changes(confidence: float) -> list[float]:
        rates = list(follow(make(alignment=True, confidence=confidence), 640, 10_000, noisy))
        return [math.log(b / a, 1.5) for a, b in pairwise(rates) if a != b]

    confident, rash = changes(3.5), changes(0.0)
    assert [round(change) for change in confident] == pytest.approx(confident)
    if moves == 0:
        assert len(confident) <= 2 < len(rash)  # 3 in 10,000 are beyond 3.5 errors; it looks 40 times
    else:
        assert set(map(round, confident)) == {moves}
        assert 1 <= len(confident) <= 10


def test_steps_of_the_warm_up_are_no_evidence() -> None:
    """Their rates are lower, and descend more."""

    def descends_at_first(number: int, total: int, lr: float) -> Measured:
        return step(number, total, lr, blocks=sums(descent=(5.0 if number <= 20 else 0.0) + (-1) ** number))

    rates = list(follow(make(alignment=True, confidence=2.5, warmup_steps=20), 200, 400, descends_at_first))
    assert set(rates[20:]) == {LR}
    assert len(set(follow(make(alignment=True, confidence=2.5, warmup_steps=0), 200, 400, descends_at_first))) > 1


def test_evidence_is_the_mean_over_its_standard_error(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(1000) + 0.1
    evidence = Evidence()
    assert evidence.errors_from(0.0) == 0.0
    for value in values:
        evidence.add(value)
    weights = Evidence.KEEP ** np.arange(999, -1, -1)
    weights /= weights.sum()
    mean, count = weights @ values, 1 / (weights @ weights)
    variance = weights @ (values - mean) ** 2 * count / (count - 1)
    assert evidence.errors_from(0.3) == pytest.approx((mean - 0.3) / math.sqrt(variance / count))
    again = Evidence()
    again.load_state(evidence.state())
    assert again.errors_from(0.0) == evidence.errors_from(0.0)


@pytest.mark.parametrize(("overshoot", "share"), [(1.0, 1 / 3), (2.0, 1 / 2), (4.0, 2 / 3)])
def test_overshooting_finds_the_rate_that_it_promises(overshoot: float, share: float) -> None:
    """Along u the loss is a parabola of the slope D0 before a step and the curvature u^T H u; it falls by f's fall."""
    law = lambda t: 3.0 * (t + 20) ** -0.4  # noqa: E731

    def parabola(number: int, total: int, lr: float) -> Measured:
        fall = law(number) - law(number + 1)
        # D0 and u^T H u such that the wanted rate is LR: there, lr = (1 + share) D0 / curvature.
        curvature = 2 * fall * (1 + share) / (1 - share) / LR**2
        slope = LR * curvature / (1 + share)
        return step(number, total, lr, blocks=sums(descent=slope - lr * curvature))

    schedule = make(alignment=True, confidence=1.0, overshoot=overshoot, lr=LR / 8)
    rates = list(follow(schedule, 800, 4000, parabola))
    assert math.log(np.exp(np.log(rates[-160:]).mean()) / LR) == pytest.approx(0, abs=0.25)
    greedy = make(alignment=True, confidence=1.0, lr=LR / 8)
    rates = list(follow(greedy, 800, 4000, parabola))
    assert math.log(np.exp(np.log(rates[-160:]).mean()) / LR * (1 + share)) == pytest.approx(0, abs=0.25)


def test_annealing_falls_to_zero_with_the_budget() -> None:
    plain, annealed = make(), make(anneal=0.25)
    pairs = list(zip(follow(plain, 400, 400), follow(annealed, 400, 400)))
    for number, (before, after) in enumerate(pairs, 1):
        assert after == pytest.approx(before * min(1, (1 - number / 400) / 0.25))
    assert pairs[-1][1] == 0


def test_aligned_the_rate_stands_while_it_is_annealed() -> None:
    """Shorter steps always descend: the growth would undo the annealing."""
    schedule = make(alignment=True, anneal=0.5)
    rates = list(follow(schedule, 160, 320))
    assert len(set(rates)) > 1
    stored = schedule.lr
    list(follow(schedule, 320, 320, first=161))
    assert schedule.lr == stored


# ---- the gate, the matrices ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "prompt", "gate"), [(0.2, 0.5, 1.5), (0.5, 0.5, 1.0), (0.9, 0.5, 0.7), (0.5, None, 1.0), (0.5, 0.0, 1.0)]
)
def test_the_gate_scales_what_is_emitted_and_nothing_else(answer: float, prompt: float | None, gate: float) -> None:
    plain, gated = make(), make(gate=True)

    def fisher(number: int, total: int, lr: float) -> Measured:
        return step(number, total, lr, answer_fisher=answer, prompt_fisher=prompt if number % 16 == 1 else None)

    rates = list(zip(follow(plain, 200, 400), follow(gated, 200, 400, fisher)))
    assert all(a == b for a, b in rates[:39])
    assert [b for _, b in rates[39:]] == pytest.approx([a * gate for a, _ in rates[39:]])
    assert gated.lr == plain.lr


def test_matrices_of_small_answer_gradients_get_the_larger_rates() -> None:
    schedule = make(block_scaling=True)
    grad_sq_K = np.array([10 * 0.1**2, 40 * 0.4**2])  # RMS over the 10 and 40 elements of B: 0.1 and 0.4
    for number in range(1, 40):
        assert schedule.rates(step(number, 400, answer_grad_sq_K=grad_sq_K), number / 400).multiplier_K is None
    found = schedule.rates(step(40, 400, answer_grad_sq_K=grad_sq_K), 0.1).multiplier_K
    assert found == pytest.approx(np.sqrt([0.25 / 0.1, 0.25 / 0.4]))


def test_multipliers_are_clipped_and_survive_a_matrix_without_gradient() -> None:
    names = tuple("abcd")
    blocks = Blocks(names, (0,) * 4, names, (20,) * 4, (10,) * 4)
    for grads, expected in (
        ([0.0, 1.0, 1.0, 1.0], [4, math.sqrt(0.75), math.sqrt(0.75), math.sqrt(0.75)]),
        ([1e-30, 1.0, 1.0, 1e8], [4, 4, 4, 0.50005]),
    ):
        schedule = make(blocks=blocks, block_scaling=True)
        fields = {"answer_grad_sq_K": np.array(grads), "blocks": None}
        for number in range(1, 41):
            rates = schedule.rates(step(number, 400, **fields), number / 400)
        assert rates.multiplier_K == pytest.approx(expected, rel=1e-6)
    schedule = make(blocks=blocks, block_scaling=True)
    for number in range(1, 41):
        rates = schedule.rates(step(number, 400, answer_grad_sq_K=np.zeros(4), blocks=None), number / 400)
    assert rates.multiplier_K is None


def test_the_measured_descent_is_that_of_the_steps_as_they_were_scaled() -> None:
    schedule = make(block_scaling=True)
    fields = {"answer_grad_sq_K": np.array([10 * 0.1**2, 40 * 0.4**2])}
    list(follow(schedule, 400, 500, lambda n, total, lr: step(n, total, lr, **fields)))
    now = figures(schedule)[-1]
    first, second = np.sqrt([0.25 / 0.1, 0.25 / 0.4])
    assert now["descent"] == pytest.approx(0.5 * first + 0.3 * second + 0.2, rel=1e-3)


def test_matrices_without_the_size_of_b_are_refused() -> None:
    with pytest.raises(ValueError, match="2 matrices, but 0 sizes"):
        make(blocks=replace(BLOCKS, num_b_elements=()), block_scaling=True)


def test_only_what_is_switched_on_is_asked_for() -> None:
    assert make().needs == {Need.LOSS, Need.GRAD_SQ, Need.SECOND, Need.DESCENT}
    assert make(gate=True).needs == {Need.LOSS, Need.GRAD_SQ, Need.SECOND, Need.DESCENT, Need.TOKENS, Need.PROMPT}
    assert make(block_scaling=True).needs == {Need.LOSS, Need.GRAD_SQ, Need.SECOND, Need.DESCENT, Need.ANSWER_GRADIENT}
    assert make(calibrate=True, anneal=0.3).needs == make(alignment=True).needs == make().needs


# ---- bad steps, and what is told -----------------------------------------------------------


def test_steps_that_are_not_finite_change_nothing_and_are_counted() -> None:
    def hostile(number: int, total: int, lr: float) -> Measured:
        if number % 10 == 3:
            nan = {"loss": math.nan, "blocks": sums(math.nan, math.nan), "answer_grad_sq_K": np.full(2, math.nan)}
            return step(number, total, lr, skipped=number % 20 == 3, answer_fisher=math.nan, **nan)
        return step(number, total, lr, answer_fisher=0.5, prompt_fisher=0.5, answer_grad_sq_K=np.ones(2))

    schedule = make(gate=True, block_scaling=True)
    rates = list(follow(schedule, 380, 400, hostile))
    assert all(map(math.isfinite, rates))
    schedule.finish(0.95)
    told = figures(schedule)[-1]
    assert told["skipped_statistics"] == 38
    assert told["divergences"] == 38
    assert told["forecast_error"]["50%"] < 0.05
    json.dumps(schedule.state_dict(), allow_nan=False)


def test_blocks_without_any_statistic_hold_the_rate() -> None:
    schedule = make()
    make_step = lambda n, total, lr: step(n, total, lr, blocks=sums(math.nan))  # noqa: E731
    assert set(follow(schedule, 60, 400, make_step)) == {LR}
    schedule.finish(1.0)
    assert figures(schedule)[-1]["skipped_statistics"] == 60 + 6  # steps and refits


def test_losses_that_are_all_nan_leave_the_first_rate() -> None:
    schedule = make()
    assert set(follow(schedule, 100, 200, lambda n, total, lr: step(n, total, lr, loss=math.nan))) == {LR}
    schedule.finish(1.0)
    assert figures(schedule)[-1]["forecast_error"] == {"25%": None, "50%": None, "75%": None}


def test_forecasts_are_told_at_every_refit_and_their_errors_at_the_end() -> None:
    schedule = make()
    list(follow(schedule, 400, 400))
    told = schedule.told()
    forecasts = [fields for type, fields in told if type == "forecast"]
    assert [f["at"] for f in forecasts] == list(range(40, 401, 4))
    assert sum(type == "schedule" for type, _ in told) == len(forecasts)
    final = 3.0 * 420**-0.4
    for forecast in forecasts:
        assert forecast["horizon"] == pytest.approx(400)
        assert forecast["progress"] == forecast["at"] / 400
        assert forecast["low"] <= forecast["value"] <= forecast["high"]
        assert forecast["value"] == pytest.approx(final, rel=0.06 if forecast["progress"] < 0.25 else 0.03)
    schedule.finish(1.0)
    (end,) = figures(schedule)
    at_end = np.mean([3.0 * (t + 20) ** -0.4 for t in range(393, 401)])
    for mark in (0.25, 0.5, 0.75):
        value = next(f["value"] for f in forecasts if f["progress"] >= mark)
        assert end["forecast_error"][f"{mark:.0%}"] == pytest.approx(abs(value - at_end) / at_end)
    assert end["divergences"] == end["skipped_statistics"] == 0


def test_a_mark_that_passed_before_the_first_forecast_has_none() -> None:
    schedule = make()
    list(follow(schedule, 80, 80))  # the first of them at step 40
    schedule.finish(1.0)
    error = figures(schedule)[-1]["forecast_error"]
    assert error["25%"] is None
    assert error["50%"] is not None
    assert error["75%"] not in (None, error["50%"])


def test_divergences_are_counted_once_each() -> None:
    counter = Divergences()
    curve = [1.0] * 100 + [3.0] * 80 + [1.0] * 100 + [3.0] * 20 + [1.0] * 60 + [math.nan] * 5 + [1.0, math.inf]
    for loss in curve:
        counter.add(loss)
    assert counter.count == 3  # the stretch of 80, the NaNs, the infinity; 20 steps are too few


# ---- resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 3, 7, 21, 40, 42, 163, 390])
@pytest.mark.parametrize(
    "options",
    [
        {"gate": True, "block_scaling": True},
        {"calibrate": True, "anneal": 0.3, "floor": True, "block_scaling": True},
        {"alignment": True, "confidence": 1.5, "overshoot": 2.0, "window": "auto", "gate": True},
    ],
    ids=["paper", "calibrated", "aligned"],
)
def test_a_resumed_schedule_goes_on_to_the_bit(stop: int, options: dict[str, Any]) -> None:
    total, rng = 400, np.random.default_rng(0)
    noise = rng.standard_normal((total + 1, 3))

    def noisy(number: int, lr: float) -> Measured:
        a, b, c = noise[number]
        fields = {"blocks": sums(2 * math.exp(a), b), "answer_fisher": 0.3 * math.exp(c / 4)}
        fields |= {"prompt_fisher": 0.3 if number % 16 == 1 else None, "answer_grad_sq_K": np.exp([a, c])}
        loss = math.nan if number == 5 else 3.0 * (number + 20) ** -0.4 * (1 + 0.05 * c)
        return step(number, total, lr, loss=loss, **fields)

    def rates(schedule: Fot, first: int, last: int) -> list[Any]:
        found = []
        for number in range(first, last + 1):
            emitted = schedule.rates(noisy(number, schedule.lr), number / total)
            found.append([emitted.lr, None if emitted.multiplier_K is None else emitted.multiplier_K.tolist()])
        return found

    unbroken, first, second = (make(warmup_steps=10, **options) for _ in range(3))
    expected = rates(unbroken, 1, total)
    assert rates(first, 1, stop) == expected[:stop]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert rates(second, stop + 1, total) == expected[stop:]
    for schedule in (unbroken, second):
        schedule.finish(1.0)
    assert figures(unbroken)[-1] == figures(second)[-1]
    assert second.state_dict() == unbroken.state_dict()


# ---- closed loop ---------------------------------------------------------------------------


def train_quadratic(config: ScheduleConfig, lr: float, steps: int, seed: int = 0) -> float:
    """Adam on a noisy quadratic of 60 parameters in four tensors; the final loss."""
    rng = np.random.default_rng(seed)
    curvature = np.geomspace(1e-2, 1.0, 60)
    theta, first, second, direction = rng.standard_normal(60), np.zeros(60), np.zeros(60), np.zeros(60)
    schedule = make_schedule(config, lr, Blocks((), (), (), (15,) * 4))
    measured = None
    for number in range(1, steps + 1):
        loss = 0.5 * float(curvature @ theta**2) + 0.1
        grad = curvature * theta + 0.3 * np.sqrt(curvature) * rng.standard_normal(60)
        rate = schedule.rates(measured, (number - 1) / steps).lr
        before = grad * direction
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        mean, mean_sq = first / (1 - 0.9**number), second / (1 - 0.95**number)
        direction = mean / (np.sqrt(mean_sq) + 1e-8)
        theta = theta - rate * direction
        if schedule.needs:
            parts = [part.reshape(4, 15).sum(1) for part in (grad**2, mean**2, mean_sq, before)]
            norm = float(np.linalg.norm(grad))
            progress = (number - 1) / steps
            measured = Measured(number, progress, 0.0, rate, 1, loss, norm, blocks=BlockSums(*parts))
    return 0.5 * float(curvature @ theta**2)


def test_aligned_and_annealed_it_needs_no_tuned_rate() -> None:
    """Over a factor of 60 in the first rate, against linear at the best of its rates."""
    steps, rates = 1000, (5e-4, 4e-3, 3e-2)

    def mean_loss(config: ScheduleConfig, lr: float) -> float:
        return float(np.mean([train_quadratic(config, lr, steps, seed) for seed in range(2)]))

    linear = ScheduleConfig(name="linear", warmup_steps=50)
    ours = {"alignment": True, "confidence": 2.5, "overshoot": 2.0, "anneal": 0.7, "window": "auto"}
    fot = ScheduleConfig(name="fot", warmup_steps=50, fot=FotConfig(gate=False, block_scaling=False, **ours))
    plain = {lr: mean_loss(linear, lr) for lr in (*rates, 1.6e-2)}
    adapted = {lr: mean_loss(fot, lr) for lr in rates}
    assert max(plain.values()) / min(plain.values()) > 300, plain
    assert max(adapted.values()) < 4 * min(plain.values()), (plain, adapted)
