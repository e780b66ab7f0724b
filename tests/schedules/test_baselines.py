"""SALeLR, BATS, SNAC and BACON against their formulas, on made-up measurements.

Shape suffixes: K blocks, U units, D parameters, T steps.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastpeft.config.schedules import BaconConfig, BatsConfig, SalelrConfig, ScheduleConfig, SnacConfig
from fastpeft.errors import UserError
from fastpeft.kernels import AdamWOptions, FlatLayout, adamw_step
from fastpeft.kernels.ops.adamw.op import SUMS
from fastpeft.schedules import make_schedule
from fastpeft.schedules.schedule import Schedule
from fastpeft.schedules.snac import SignalShare
from fastpeft.signals import Blocks, BlockSums, Measured, Secants
from tests.support.measurements import BLOCKS, PEAK, K, U, rates_of, run_of, spoilt

SNAC = SnacConfig()
ADAM = AdamWOptions()


def make(name: str, adam: AdamWOptions = ADAM, warmup_steps: int = 0, **settings: object) -> Schedule:
    return make_schedule(ScheduleConfig(name=name, warmup_steps=warmup_steps, **settings), PEAK, BLOCKS, adam=adam)


def with_gradients(measured: Measured, grad_sq_U: np.ndarray) -> Measured:
    return replace(measured, blocks=replace(measured.blocks, grad_sq_U=grad_sq_U))


# ---- SALeLR --------------------------------------------------------------------------------


def test_salelr_multiplies_the_linear_rate_by_the_root_of_a_matrix_share_of_the_norm() -> None:
    """Norms 1, 2, 3, 4, 5, 45 of mean 10: shares 0.1 ... 4.5, the roots of which are 0.32 ... 2.12."""
    norm_U = np.array([1, 2, 3, 4, 5, 45, 100, 1000], dtype=float)  # the head's count for nothing
    run = [with_gradients(measured, norm_U**2) for measured in run_of(50)]
    rates, linear = rates_of(make("salelr"), run), rates_of(make("linear"), run)
    assert [r.lr for r in rates] == [r.lr for r in linear]
    assert rates[0].multiplier_K is None
    want_K = np.sqrt(norm_U[:K] / 10)
    for one in rates[1:]:
        assert one.multiplier_K == pytest.approx(want_K)
    bounded = make("salelr", salelr=SalelrConfig(most=2.0, exponent=1.0))
    assert rates_of(bounded, run)[-1].multiplier_K == pytest.approx(np.clip(norm_U[:K] / 10, 0.5, 2))


def test_salelr_forgets_as_its_decay_says() -> None:
    """Norms 1 everywhere, then 3 for block 0: after n steps its running mean is 3 - 2 decay^n of a long past."""
    run = run_of(460)
    ones_U, later_U = np.ones(U), np.array([9.0] + [1.0] * (U - 1))
    run = [with_gradients(measured, ones_U if i < 450 else later_U) for i, measured in enumerate(run)]
    schedule = make("salelr", salelr=SalelrConfig(decay=0.9))
    multiplier_K = rates_of(schedule, [*run, run[-1]])[-1].multiplier_K
    norm = 3 - 2 * 0.9**10
    assert multiplier_K[0] == pytest.approx(math.sqrt(norm / ((norm + 5) / 6)), rel=1e-6)


def test_salelr_leaves_out_a_matrix_whose_gradient_is_not_finite() -> None:
    run = run_of(20)
    grad_sq_U = np.ones(U)
    grad_sq_U[2] = np.nan
    rates = rates_of(make("salelr"), [with_gradients(measured, grad_sq_U) for measured in run])
    assert rates[-1].multiplier_K == pytest.approx(np.ones(K))


@pytest.mark.parametrize("blocks", [None, Blocks((), (), (), (5,))])
def test_salelr_without_matrices_is_refused(blocks: Blocks | None) -> None:
    with pytest.raises(UserError, match="salelr scales the rates of adapted matrices"):
        make_schedule(ScheduleConfig(name="salelr"), PEAK, blocks)


# ---- BATS ----------------------------------------------------------------------------------


def test_bats_scales_the_next_step_by_the_root_of_the_last_batch_over_the_mean_before() -> None:
    fishers = [0.4, 0.4, 0.9, 0.1, 40.0, None, 0.0, 0.5]
    run = [replace(measured, answer_fisher=fisher) for measured, fisher in zip(run_of(8), fishers)]
    factors, mean = [1.0], None
    for fisher in fishers[:-1]:
        if fisher is None:
            factors.append(1.0)
            continue
        factors.append(1.0 if mean is None else min(max(math.sqrt(fisher / mean[0]), 0.5), 2.0))
        total, weight = (0.0, 0.0) if mean is None else mean[1:]
        total, weight = 0.95 * total + 0.05 * fisher, 0.95 * weight + 0.05
        mean = total / weight, total, weight
    assert factors[3] == pytest.approx(1.5)
    assert factors[4:] == [pytest.approx(0.5), 2.0, 1.0, 0.5]
    rates, linear = rates_of(make("bats"), run), rates_of(make("linear"), run)
    assert [r.lr for r in rates] == pytest.approx([one.lr * factor for one, factor in zip(linear, factors)])


def test_bats_is_linear_where_every_batch_is_alike_and_takes_its_settings() -> None:
    run = [replace(measured, answer_fisher=0.3) for measured in run_of(50)]
    assert [r.lr for r in rates_of(make("bats"), run)] == pytest.approx([r.lr for r in rates_of(make("linear"), run)])
    run[40] = replace(run[40], answer_fisher=2.4)
    wide = make("bats", bats=BatsConfig(most=10.0, exponent=1.0))
    assert rates_of(wide, run)[41].lr == pytest.approx(8 * rates_of(make("linear"), run)[41].lr)


# ---- SNAC ----------------------------------------------------------------------------------


def sums_of(grad_TD: torch.Tensor, adam: AdamWOptions) -> list[BlockSums]:
    """What the optimizer's own step reports of these gradients."""
    num = grad_TD.shape[1]
    layout = FlatLayout([], head=(num,))
    data = torch.zeros(num, dtype=grad_TD.dtype)
    moments, step, made = [torch.zeros_like(data), torch.zeros_like(data)], torch.zeros(()), []
    for grad in grad_TD:
        done = adamw_step(
            data, grad.clone(), *moments, step, layout, lr=0.0, norm=grad.norm(), options=adam, reduces=SUMS
        )  # fmt: skip
        made.append(BlockSums(*done.sums.double().numpy().T))
    return made


def share_of(grad_TD: torch.Tensor, adam: AdamWOptions = ADAM, options: SnacConfig = SNAC) -> SignalShare:
    share = SignalShare(adam, options)
    for sums in sums_of(grad_TD, adam):
        share.update(sums)
    return share


def gradients(share: float, num_steps: int, num: int, seed: int, norm: float = 1.0) -> torch.Tensor:
    """Of the given share of signal: a constant part and independent noise, `norm` in the mean square."""
    draw = torch.Generator().manual_seed(seed)
    signal_D = torch.randn(num, generator=draw, dtype=torch.float64)
    noise_TD = torch.randn(num_steps, num, generator=draw, dtype=torch.float64)
    signal_D *= math.sqrt(share) / signal_D.norm()
    return norm * (signal_D + noise_TD * math.sqrt((1 - share) / num))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.8, 0.95), (0.95, 0.9)])
def test_the_share_of_signal_is_that_of_the_gradients(share: float, beta1: float, beta2: float, seed: int) -> None:
    """In 4,000 dimensions and 300 steps the estimate is off by about 0.01, whatever the decays."""
    adam = AdamWOptions(beta1=beta1, beta2=beta2)
    got = share_of(gradients(share, 300, 4000, seed), adam).value
    assert got == pytest.approx(max(share, SNAC.floor), abs=0.03)


def test_pure_noise_is_the_floor_and_pure_signal_is_one(seed: int) -> None:
    options = SnacConfig(floor=0.05, decay=0.99)
    assert share_of(gradients(0.0, 300, 4000, seed), options=options).value == 0.05
    assert share_of(gradients(1.0, 10, 50, seed), options=options).value == pytest.approx(1)


def test_it_has_no_bias_from_the_second_step_on(seed: int) -> None:
    """Over 400 runs of 4 steps in 30 dimensions, the mean signal over the mean square is the share."""
    means = [share_of(gradients(0.3, 4, 30, seed + i))._signal_and_all.value for i in range(400)]
    signal, total = np.mean(means, axis=0)
    assert signal / total == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("norm", [0.1, 1.0, 30.0])
def test_clipping_changes_nothing(norm: float, seed: int) -> None:
    grad_TD = gradients(0.4, 300, 4000, seed, norm)
    clipped, free = (share_of(grad_TD, AdamWOptions(max_norm=most)).value for most in (1.0, 0.0))
    assert clipped == pytest.approx(free, abs=0.01)


def test_a_gradient_that_shrinks_is_measured_over_the_first_moments_window(seed: int) -> None:
    """By 1 % a step: Adam's second moment, of a window of 1,000 steps, is 10 times the square of today's gradient, and
    would give a tenth of the share."""
    grad_TD = gradients(0.5, 600, 2000, seed) * 0.99 ** torch.arange(600, dtype=torch.float64)[:, None]
    sums = sums_of(grad_TD, ADAM)[-1]
    assert sums.mean_sq_U.sum() / sums.second_U.sum() < 0.1
    assert share_of(grad_TD).value == pytest.approx(0.5, abs=0.04)


def test_snac_is_the_warmed_peak_times_the_share() -> None:
    run = run_of(60)
    schedule = make("snac", warmup_steps=3)
    share = SignalShare(ADAM, SNAC)
    for i, rates in enumerate(rates_of(schedule, run)):
        if i:
            share.update(run[i - 1].blocks)
        assert rates.lr == pytest.approx(PEAK * min(1, (i + 1) / 3) * share.value)
        assert rates.multiplier_K is None
    assert SNAC.floor < share.value < 1


def test_no_first_moment_is_refused() -> None:
    for name in ("snac", "bacon"):
        with pytest.raises(UserError, match=r"optimizer\.beta1: .* more than 0"):
            make(name, AdamWOptions(beta1=0.0))


def test_a_skipped_step_counts_as_none() -> None:
    run = run_of(40)
    skipping = [*run[:20], spoilt(run[20], math.nan), spoilt(run[20], 3.0), *run[20:]]
    without, within = make("snac"), make("snac")
    rates_of(without, run)
    rates_of(within, skipping)
    assert within.share.state() == without.share.state()


# ---- BACON ---------------------------------------------------------------------------------


def curved(measured: Measured, curvature_U: np.ndarray) -> Measured:
    """A step that is all signal, of known curvature."""
    ones_U = np.ones(U)
    return replace(measured, blocks=BlockSums(*[ones_U] * 4), secant=Secants(np.asarray(curvature_U) * 2, ones_U * 2))


def test_bacon_is_signal_by_flatness_by_budget() -> None:
    """All signal. The curvature is 0.5 in and after the warm-up, then 1.5: the factor goes from 1/2 to 1/4."""
    num, cut = 1000, 500
    run = [curved(measured, np.full(U, 0.5 if i < cut else 1.5)) for i, measured in enumerate(run_of(num))]
    rates = rates_of(make("bacon", warmup_steps=40), run)
    left = [1 - measured.progress for measured in run]
    for i in (60, 200, cut):
        assert rates[i].lr == pytest.approx(PEAK * 0.5 * left[i])
    for i in (cut + 300, num - 1):
        assert rates[i].lr == pytest.approx(PEAK / (1 + 1.5 / 0.5) * left[i], rel=1e-6)
    assert all(PEAK / 4 * left[i] <= rates[i].lr <= PEAK / 2 * left[i] * (1 + 1e-9) for i in range(cut, num))
    assert rates[20].lr == pytest.approx(PEAK * 21 / 40 * 0.5 * left[20])


def test_bacon_takes_its_reference_once_the_warm_up_is_over() -> None:
    """The curvature falls all along: the reference is its running mean at the end of the warm-up, of 30 steps."""
    run = [curved(measured, np.full(U, 1 + 10 / (1 + i))) for i, measured in enumerate(run_of(600))]
    schedule = make("bacon", warmup_steps=30)
    rates_of(schedule, run[:30])
    assert schedule.reference is None
    rates_of(schedule, run[:40], first=30)
    mean = np.average([1 + 10 / (1 + i) for i in range(30)], weights=[0.95 ** (29 - i) for i in range(30)])
    assert schedule.reference == pytest.approx(mean)
    rates_of(schedule, run, first=40)
    assert schedule.reference == pytest.approx(mean)


def test_bacon_raises_the_rate_of_flat_matrices() -> None:
    curvature_U = np.array([1, 2, 3, 4, 0.01, -5, 100, 100])
    run = [curved(measured, curvature_U) for measured in run_of(100)]
    rates = rates_of(make("bacon"), run)
    assert rates[10].multiplier_K is None  # too few readings
    mean = (1 + 2 + 3 + 4 + 0.01 + 0) / 6
    want_K = [*(math.sqrt(mean / c) for c in (1, 2, 3, 4)), 4, 4]
    assert rates[-1].multiplier_K == pytest.approx(np.array(want_K))
    narrow = make("bacon", bacon=BaconConfig(most=1.2))
    assert rates_of(narrow, run)[-1].multiplier_K == pytest.approx(np.clip(want_K, 1 / 1.2, 1.2))


@pytest.mark.parametrize("curvature", [-1.0, 0.0, np.nan, np.inf])
def test_bacon_without_positive_curvature_has_a_rate_all_the_same(curvature: float) -> None:
    run = [curved(measured, np.full(U, curvature)) for measured in run_of(100)]
    rates = rates_of(make("bacon"), run)[-1]
    assert rates.multiplier_K is None
    assert rates.lr == pytest.approx(PEAK * 0.5 * (1 - run[-1].progress))


def test_bacon_lowers_the_rate_as_snac_does(seed: int) -> None:
    run = run_of(300, seed)
    bacon, snac = make("bacon"), make("snac")
    rates_of(bacon, run)
    rates_of(snac, run)
    assert bacon.share.state() == snac.share.state()
