"""GRAFF: its hypergradient against finite differences of the next loss, its state, its options.

Shape suffixes: K blocks, U units.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fastpeft.config import ConfigError, load_run, run_values
from fastpeft.config.load import run_from_values
from fastpeft.config.schedules import GraffConfig
from fastpeft.errors import UserError
from fastpeft.kernels import AdamWOptions
from fastpeft.schedules import graff, planner
from fastpeft.schedules.graff import LR_MIN
from fastpeft.signals import Need, Rates
from tests.support.closed_loop import Loop, ResidualMlp, Task, blocks_of, train
from tests.support.graff_inputs import PEAK, K, U, curved, make, reading, trace, weights_file

# ---- the hypergradient ---------------------------------------------------------------------


def fp64_loop(seed: int) -> Loop:
    model = ResidualMlp(seed, 8, 5, 4, torch.float64)
    options = AdamWOptions(max_norm=1.0, weight_decay=0.1, head_weight_decay=0.3, head_ratio=2.0)
    return Loop(model, Task(seed, width=8, num_rows=16, dtype=torch.float64).rows, options)


def after_some_steps(seed, tmp_path, num_steps=7, **options):
    """A loop and its schedule, with the reading that the next rates will see."""
    loop = fp64_loop(seed)
    blocks = dataclasses.replace(loop.model.blocks, rate_ratios=(1, 1, 1, 1, 2))
    schedule = make(blocks, peak_lr=2e-3, warm_start=weights_file(tmp_path, seed, scale=0.1), guard="off", **options)
    loop.needs, measured = schedule.needs, None
    for step in range(num_steps):
        measured, _ = loop.step(schedule, measured, step / 100)
    return loop, schedule, measured


def loss_after(loop: Loop, *taken: Rates) -> float:
    """Loss of the batch that comes after steps with these rates."""
    loop = copy.deepcopy(loop)
    for rates in taken:
        loop.num_taken += 1
        loop.update(*loop.gradient(loop.num_taken), rates, 0.0)
    return float(loop.loss(loop.num_taken + 1, loop.buffers[0]))


def fed(monkeypatch, run) -> list[tuple[float, np.ndarray]]:
    """What `run` hands to the planner's derivative: d loss / d log eta, and by log m of each block."""
    seen, gradient = [], planner.Tape.gradient

    def note(self, d_log_eta, d_log_m_K):
        seen.append((d_log_eta, d_log_m_K.copy()))
        return gradient(self, d_log_eta, d_log_m_K)

    with monkeypatch.context() as patch:
        patch.setattr(planner.Tape, "gradient", note)
        run()
    return seen


def test_the_hypergradient_is_a_finite_difference_of_the_next_loss(seed, tmp_path, monkeypatch):
    loop, schedule, measured = after_some_steps(seed, tmp_path)
    before = copy.deepcopy(loop)
    measured, rates = loop.step(schedule, measured, 0.1)  # step t
    measured, _ = loop.step(schedule, measured, 0.11)  # step t + 1 measures what t did
    ((d_log_eta, d_log_m_K),) = fed(monkeypatch, lambda: schedule.rates(measured, 0.12))

    def loss(log_factor, block=None):
        return loss_after(before, scaled(rates, log_factor, block))

    eps = 1e-4
    assert d_log_eta == pytest.approx((loss(eps) - loss(-eps)) / (2 * eps), rel=1e-6)
    for block in range(4):
        by_difference = (loss(eps, block) - loss(-eps, block)) / (2 * eps)
        assert d_log_m_K[block] == pytest.approx(by_difference, rel=1e-6, abs=1e-10)


def scaled(rates: Rates, log_factor: float, block: int | None = None) -> Rates:
    if block is None:
        return dataclasses.replace(rates, lr=rates.lr * math.exp(log_factor))
    multiplier_K = rates.multiplier_K.copy()
    multiplier_K[block] *= math.exp(log_factor)
    return dataclasses.replace(rates, multiplier_K=multiplier_K)


def test_the_planners_gradient_is_a_finite_difference_through_the_planner_of_that_time(seed, tmp_path, monkeypatch):
    """Change the weights that step t's rates were made of, and see the loss of step t + 1; the graph is step t's."""
    monkeypatch.setattr(graff, "SLEW", 10.0)  # where the limit holds, the rate does not follow the weights
    loop, schedule, measured = after_some_steps(seed, tmp_path)
    before, planner_before = copy.deepcopy(loop), copy.deepcopy(schedule)
    measured_before = measured
    measured, rates = loop.step(schedule, measured, 0.1)
    measured, _ = loop.step(schedule, measured, 0.11)
    taken = []
    with monkeypatch.context() as patch:
        patch.setattr(planner.Adam, "step", lambda self, weights, gradient: taken.append(gradient) or weights)
        schedule.rates(measured, 0.12)
    (gradient_P,) = taken

    # Step t's rates come from the weights after the update at t, which a change has to survive.
    random = np.random.default_rng(seed)
    direction_P = random.normal(size=len(gradient_P))

    def loss(eps):
        step, moved = planner.Adam.step, copy.deepcopy(planner_before)
        with monkeypatch.context() as patch:
            patch.setattr(planner.Adam, "step", lambda *given: step(*given) + eps * direction_P)
            moved_rates = moved.rates(measured_before, 0.1)
        return loss_after(before, moved_rates)

    assert loss(0.0) == loss_after(before, rates)
    eps = 1e-6
    by_difference = (loss(eps) - loss(-eps)) / (2 * eps)
    assert gradient_P @ direction_P == pytest.approx(by_difference, rel=1e-5)


def test_the_trace_sees_the_loss_two_steps_later(seed, tmp_path, monkeypatch):
    """Its second term is the slope of L(t+2) along what step t did."""
    loop, schedule, measured = after_some_steps(seed, tmp_path, trace_decay=0.25)
    start = loop.buffers[0].clone()
    measured, _ = loop.step(schedule, measured, 0.1)
    moved = loop.buffers[0] - start
    measured, _ = loop.step(schedule, measured, 0.11)
    _, grad = loop.gradient(loop.num_taken + 1)
    measured, _ = loop.step(schedule, measured, 0.12)
    (d_log_eta, d_log_m_K), _ = fed(monkeypatch, lambda: schedule.rates(measured, 0.13))
    slope_U = loop.model.layout.unit_sums(grad * moved).numpy()
    assert d_log_eta == pytest.approx(0.25 * slope_U.sum(), rel=1e-8)
    np.testing.assert_allclose(d_log_m_K, 0.25 * slope_U[:4], rtol=1e-8)


def test_a_step_that_was_skipped_teaches_nothing(seed, monkeypatch):
    random, schedule = np.random.default_rng(seed), make()
    steps = [1, 2, 3, 4, 5, 6, 7]
    calls = [len(fed(monkeypatch, lambda: schedule.rates(None, 0.0)))]
    for step in steps:
        measured = reading(random, step, skipped=step == 4)
        calls.append(len(fed(monkeypatch, lambda m=measured: schedule.rates(m, 0.0))))
    # Step 2 is the first whose loss shows what a step did. Step 4 shows nothing and did nothing for 5 to show.
    assert calls == [0, 0, 1, 1, 0, 0, 1, 1]


def test_emissions_whose_effect_is_never_measured_do_not_pile_up():
    schedule = make()
    trace(schedule, [None] * 20)
    assert len(schedule.state_dict()["pending"]) == 3


# ---- learning ------------------------------------------------------------------------------


def test_a_planner_that_trains_changes_its_weights_and_a_frozen_one_does_not(seed, tmp_path):
    for online in (True, False):
        random, schedule = np.random.default_rng(seed), make(online=online, guard="off")
        readings = [None, *(reading(random, step) for step in range(1, 40))]
        rates = trace(schedule, readings)
        schedule.save(tmp_path)
        after = planner.load_weights(tmp_path / planner.SHIPPED.name)
        changed = after != planner.initial_weights()
        assert changed.mean() > 0.9 if online else not changed.any()
        assert all(row == pytest.approx([PEAK] + [1] * K) for row in rates) is not online


def test_from_a_rate_that_is_too_low_it_climbs_and_does_better(seed):
    def final(**options) -> tuple[float, float]:
        model = ResidualMlp(seed, 16, 8, 2)
        loop, task = Loop(model, Task(seed, width=16).rows), Task(seed, width=16)
        rates = train(loop, make(model.blocks, peak_lr=3e-4, **options), 150)
        x_ND, y_N = task.rows(10**8, 2048)
        return float((model(x_ND, loop.buffers[0]) - y_N).square().mean()), rates[-1].lr

    learning, frozen = final(), final(online=False)
    assert frozen[1] == pytest.approx(3e-4)
    assert learning[1] > 2 * frozen[1]
    assert learning[0] < frozen[0]


def test_regret_is_divided_by_the_elapsed_time_and_at_least_by_a_second(seed, monkeypatch):
    norms = []
    for elapsed_s, regret in ((0.01, "elapsed"), (1.0, "elapsed"), (100.0, "elapsed"), (100.0, "step")):
        random, schedule, taken = np.random.default_rng(seed), make(regret=regret), []
        readings = [dataclasses.replace(reading(random, step), elapsed_s=elapsed_s) for step in (1, 2)]
        monkeypatch.setattr(
            planner.Adam, "step", lambda self, weights, gradient, t=taken: t.append(gradient) or weights
        )
        trace(schedule, [None, *readings])
        monkeypatch.undo()
        norms.append(np.linalg.norm(taken[0]))
    assert norms[0] == pytest.approx(norms[1])
    assert norms[1] == pytest.approx(100 * norms[2])
    assert norms[1] == pytest.approx(norms[3])


# ---- state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 17, 40])
@pytest.mark.parametrize(
    "options", [{}, {"trace_decay": 0.5, "layers": 2, "anneal": 0.9}, {"graph": False, "multipliers": "centred"}]
)
def test_a_resume_continues_exactly(stop, options, seed):
    random = np.random.default_rng(seed)
    readings = [None, *(reading(random, step, skipped=step in (10, 38)) for step in range(1, 70))]
    whole, first, second = (make(warmup_steps=20, **options) for _ in range(3))
    expected = trace(whole, readings)
    trace(first, readings[:stop])
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    assert stop < 17 or len(state["pending"]) == 2 + ("trace_decay" in options) or stop == 40
    second.load_state_dict(state)
    rates = [second.rates(readings[i], i / 500) for i in range(stop, 70)]
    assert [[r.lr, *r.multiplier_K] for r in rates] == expected[stop:]
    first.told(), second.told()


# ---- options -------------------------------------------------------------------------------


def test_needs():
    always = {Need.LENS}
    assert make().needs == always | {Need.DESCENT, Need.SECANT}
    assert make(guard="paper").needs == always | {Need.DESCENT, Need.PLAIN_SECANT}
    assert make(curvature="hvp").needs == always | {Need.DESCENT, Need.PRODUCT}
    assert make(online=False).needs == always | {Need.SECANT}


def test_each_option_changes_the_rates(seed, tmp_path):
    path = weights_file(tmp_path, seed)
    random = np.random.default_rng(seed)
    readings = [None, *(reading(random, step, curvature=1e5) for step in range(1, 40))]
    options = [
        {}, {"graph": False}, {"budget_feature": False}, {"online": False}, {"layers": 2}, {"trace_decay": 0.5},
        {"anneal": 0.95}, {"guard": "off"}, {"outer_learning_rate": 2e-3}, {"outer_max_norm": 1e-9},
        {"curvature": "hvp"}, {"curvature_decay": 0.5}, {"multipliers": "centred"}, {"regret": "step"},
        {"caution": 0.25},
    ]  # fmt: skip
    seen = {}
    for given in options:
        rates = tuple(map(tuple, trace(make(warm_start=path, **given), readings)))
        assert rates not in seen, f"{given} changes nothing beside {seen[rates]}"
        seen[rates] = given


def test_without_its_feature_the_budget_is_not_seen(seed, tmp_path):
    path, readings = weights_file(tmp_path, seed), [None, *(curved(s, np.ones(U)) for s in range(1, 30))]

    def rates(budget_feature, scale):
        schedule = make(warm_start=path, budget_feature=budget_feature)
        rates = [schedule.rates(measured, scale * i) for i, measured in enumerate(readings)]
        return [[r.lr, *r.multiplier_K] for r in rates]

    assert rates(False, 0.001) == rates(False, 0.03)
    assert rates(True, 0.001) != rates(True, 0.03)


def test_anneal_ends_at_the_rail_and_warmup_scales_the_rate():
    schedule = make(online=False, anneal=0.2, warmup_steps=4)
    shares = [schedule.rates(None, p).lr / PEAK for p in (0, 0.001, 0.002, 0.003, 0.1, 0.8, 0.9, 0.95, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.25, LR_MIN / PEAK])


def test_centred_multipliers_have_mean_one_and_differ(seed, tmp_path):
    random, schedule = np.random.default_rng(seed), make(multipliers="centred", warm_start=weights_file(tmp_path, seed))
    rates = trace(schedule, [None, *(reading(random, step) for step in range(1, 30))])
    log_m = np.log([row[1:] for row in rates])
    np.testing.assert_allclose(log_m.mean(1), 0, atol=1e-12)
    assert np.ptp(log_m[-1]) > 1e-3


def test_a_warm_start_sets_the_rates_and_keeps_learning(seed, tmp_path):
    path = weights_file(tmp_path, seed)
    schedule = make(warm_start=path)
    first = schedule.rates(None, 0.0)
    assert first.lr != pytest.approx(PEAK, rel=1e-3)
    assert np.ptp(first.multiplier_K) > 0 or np.abs(first.multiplier_K - 1).min() > 1e-3
    schedule.save(tmp_path)
    again = make(warm_start=str(tmp_path / planner.SHIPPED.name))
    assert again.rates(None, 0.0).lr == pytest.approx(first.lr, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(blocks=None), "graff plans rates for adapted matrices"),
        (lambda: make(blocks=blocks_of(0, ())), "graff plans rates for adapted matrices"),
        (lambda: make(peak_lr=0.02), r"training\.learning_rate: graff keeps it in \[1e-06, 0\.01\]; it is 0\.02"),
        (lambda: make(warm_start="no/such"), "warm_start: no/such: there is no such file"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_shipped_planner_is_loaded_or_its_absence_said(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "SHIPPED", tmp_path / "planner.safetensors")
    with pytest.raises(UserError, match="warm_start: shipped: this installation comes with none"):
        make(warm_start="shipped")
    weights_file(tmp_path, 1)
    assert (
        make(warm_start="shipped").rates(None, 0.0).lr
        == make(warm_start=str(tmp_path / "planner.safetensors")).rates(None, 0.0).lr
    )


def test_the_planner_that_ships_has_learnt_something_and_plans():
    shipped = planner.load_weights(planner.SHIPPED)
    assert np.isfinite(shipped).all()
    assert (shipped != planner.initial_weights()).mean() > 0.9
    rates = make(warm_start="shipped").rates(None, 0.0)
    assert 0.1 * PEAK < rates.lr < 10 * PEAK
    assert rates.multiplier_K.shape == (K,)


def config(**options):
    values = run_values(load_run("lora_mnli"))
    values["schedule"] |= {"name": "graff", "graff": options}
    return run_from_values(values, "test").schedule.graff


def test_off_without_quotes_is_a_word():
    run = load_run("lora_mnli", ["schedule.name=graff", "schedule.graff.guard=off", "schedule.graff.graph=off"])
    assert run.schedule.graff == GraffConfig(guard="off", graph=False)
    assert config(guard="off").guard == "off"
    with pytest.raises(ConfigError, match=r"schedule\.graff\.guard"):
        config(guard=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": "paper", "curvature": "hvp"}, "guard: paper asks for the plain secant"),
        ({"trace_decay": 0.5, "guard": "paper"}, "trace_decay: needs the lagged secant"),
        ({"trace_decay": 0.5, "curvature": "hvp"}, "trace_decay: needs the lagged secant"),
        ({"layers": 0}, "layers"),
        ({"anneal": 1.5}, "anneal"),
        ({"guard": "laged"}, "did you mean lagged"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)
