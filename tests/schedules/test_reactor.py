"""REACTOR: its policy learns, and what it hears and tells is what happened."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fastpeft.config.schedules import ReactorConfig, ScheduleConfig
from fastpeft.schedules import make_schedule
from fastpeft.schedules.reactor import STATE, GaussianPolicy, Reactor
from fastpeft.signals import Measured
from tests.support.measurements import BLOCKS, PEAK, rates_of, run_of


def make(seed: int = 0, warmup_steps: int = 0, **settings: float) -> Reactor:
    config = ScheduleConfig(name="reactor", warmup_steps=warmup_steps, reactor=ReactorConfig(**settings))
    schedule = make_schedule(config, PEAK, BLOCKS, seed=seed)
    assert isinstance(schedule, Reactor)
    return schedule


# ---- the policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("best", [-0.1, 0.0, 0.08])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_the_policy_learns_a_bandit(best: float, scale: float, seed: int) -> None:
    """Rewards fall with the squared distance from the best action, whatever their unit, with noise on them."""
    rng = np.random.default_rng(seed)
    policy, ones = GaussianPolicy(1, ReactorConfig(), seed), np.ones(1)
    means = []
    for _ in range(1500):
        action = policy.act(ones)
        policy.learn(scale * (5 - (20 * (action - best)) ** 2 + 0.5 * rng.standard_normal()))
        means.append(policy.mean(ones))
    assert np.mean(means[1000:]) == pytest.approx(best, abs=0.02)


def test_the_policy_learns_what_depends_on_the_state(seed: int) -> None:
    """The best action is 0.05 x: a weight of 1 for x, in deviations, and of 0 for the bias and a feature of no use."""
    rng = np.random.default_rng(seed)
    policy, weights = GaussianPolicy(3, ReactorConfig(), seed), []
    for _ in range(3000):
        features = np.array([1.0, rng.uniform(-1.5, 1.5), rng.uniform(-1, 1)])
        policy.learn(-((policy.act(features) - 0.05 * features[1]) ** 2))
        weights.append(policy.weights)
    assert np.mean(weights[1500:], axis=0) == pytest.approx([0, 1, 0], abs=0.25)


def test_a_reward_as_the_baseline_teaches_nothing() -> None:
    policy = GaussianPolicy(2, ReactorConfig(), 3)
    for _ in range(50):
        policy.act(np.ones(2))
        policy.learn(0.7)
    assert np.abs(policy.weights).max() < 1e-6
    assert policy.baseline == pytest.approx(0.7)


def test_actions_are_drawn_from_the_seed() -> None:
    draws = {seed: [GaussianPolicy(1, ReactorConfig(), seed).act(np.ones(1))] for seed in (0, 1, 2)}
    assert len({round(action, 12) for (action,) in draws.values()}) == 3
    again = GaussianPolicy(1, ReactorConfig(), 2)
    assert again.act(np.ones(1)) == draws[2][0]
    many = np.array([again.act(np.ones(1)) for _ in range(2000)])
    assert many.mean() == pytest.approx(0, abs=0.01)
    assert many.std() == pytest.approx(ReactorConfig().sigma, rel=0.08)


# ---- the schedule --------------------------------------------------------------------------


@pytest.mark.parametrize("best", [-0.06, 0.06])
def test_the_schedule_credits_a_change_with_what_came_of_it(best: float, seed: int) -> None:
    """The loss falls the slower, the farther the last change of log lr is from the best one; it is noisy."""
    rng = np.random.default_rng(seed)
    schedule, first = make(seed), run_of(1)[0]
    loss, measured, changes = 0.0, None, []
    for step in range(1, 8 * 1400):
        schedule.rates(measured, 0.5)
        change = schedule._change or 0.0
        loss -= 0.02 - (change - best) ** 2
        measured = replace(first, step=step, loss=loss + 0.0005 * rng.standard_normal(), elapsed_s=0.1 * step)
        changes.append(change)
    assert np.mean(changes[-8 * 700 :]) == pytest.approx(best, abs=0.03)


def test_the_rate_changes_every_window_and_not_within_one() -> None:
    run = run_of(100)
    lrs = [rates.lr for rates in rates_of(make(), run)]
    changes = [i for i in range(1, len(lrs)) if lrs[i] != lrs[i - 1]]
    assert changes == list(range(8, 100, 8))


def test_weights_change_and_the_events_have_rewards_and_baseline(seed: int) -> None:
    run = run_of(700, seed)
    schedule = make(seed, warmup_steps=10)
    seen = [schedule.policy.weights]
    for i in range(len(run)):
        rates_of(schedule, run[: i + 1], first=i)
        if not np.array_equal(schedule.policy.weights, seen[-1]):
            seen.append(schedule.policy.weights)
    told = schedule.told()
    assert len(seen) > 60
    assert {kind for kind, _ in told} == {"schedule"}
    assert len(told) == (len(seen)) // 4
    rewards = [reward for _, fields in told for reward in fields["rewards"]]
    assert len(rewards) == 4 * len(told)
    # Windows of 8 steps begin behind the warm-up's 10; steps are 0.1 s long.
    losses = np.array([m.loss for m in run[10:690]]).reshape(-1, 8).mean(1)
    want = (losses[:-1] - losses[1:]) / 0.8
    assert rewards == pytest.approx(want[: len(rewards)], rel=0.05)
    fields = told[-1][1]
    weights = 0.8 ** np.arange(len(rewards))[::-1]
    assert fields["baseline"] == pytest.approx(np.average(rewards, weights=weights), rel=1e-6)
    assert list(fields["policy"]) == list(STATE)
    assert fields["lr"] > 0


def test_an_evaluation_in_a_window_does_not_count() -> None:
    """A pause of 50 s between two steps changes no reward."""
    run = run_of(200)
    paused = [replace(m, elapsed_s=m.elapsed_s + 50 * (m.step > 90)) for m in run]
    schedules = make(), make()
    for schedule, measured in zip(schedules, (run, paused)):
        rates_of(schedule, measured)
    rewards = [[f["rewards"] for _, f in schedule.told()] for schedule in schedules]
    assert rewards[0] == [pytest.approx(row) for row in rewards[1]]
    assert len(rewards[0]) > 4


def test_steps_that_are_not_finite_are_in_no_window(seed: int) -> None:
    """With a bad step after every good one, the windows are those of the good ones."""
    run = run_of(200, seed)

    def rates_at_good_steps(bad: Measured | None) -> list[float]:
        schedule, lrs = make(seed), []
        for measured in run:
            lrs.append(schedule.rates(measured, 0.5).lr)
            if bad is not None:
                schedule.rates(bad, 0.5)
        return lrs

    want = rates_at_good_steps(None)
    assert len(set(want)) > 20
    for bad in (replace(run[0], loss=math.nan), replace(run[0], grad_norm=math.inf), replace(run[0], skipped=True)):
        assert rates_at_good_steps(bad) == want


def test_it_stays_within_its_rails() -> None:
    schedule = make(sigma=3.0, most=4.0)
    lrs = [rates.lr for rates in rates_of(schedule, run_of(2000))]
    assert min(lrs) == pytest.approx(PEAK / 4)
    assert max(lrs) == pytest.approx(PEAK * 4)


def test_the_state_is_what_was_measured() -> None:
    """Constant figures are 0 standardised; a window of a rising loss, a larger norm and entropy is above."""
    run = [replace(m, loss=1.0, grad_norm=0.5, entropy=2.0) for m in run_of(100)]
    schedule = make()
    rates_of(schedule, run)
    features = schedule.policy._taken[0]
    assert features.tolist() == pytest.approx([1, 0, 0, 1 - run[96].progress, 0], abs=1e-5)
    rises = [replace(m, loss=1.0 + 0.1 * m.step, grad_norm=0.9, entropy=2.5) for m in run]
    rates_of(schedule, rises)
    assert (schedule.policy._taken[0][[1, 2, 4]] != 0).any()
    schedule = make()
    rates_of(schedule, run[:42])
    rates_of(schedule, [*run[:42], *rises[42:52]], first=42)
    assert (schedule.policy._taken[0][[1, 2, 4]] > 0.5).all()
