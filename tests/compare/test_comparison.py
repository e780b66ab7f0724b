"""Means over seeds, their intervals, and the GLUE average."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from fastpeft.compare.comparison import Curve, compare, glue_average, mean_of, metric_of
from fastpeft.runs.store import Result


def result(seed: int, task: str, value: float | None, **more) -> Result:
    metric = {} if value is None else {"name": "accuracy", "value": value}
    return Result(run_id="x", name=f"{task}-{seed}", seed=seed, dataset=task, metric=metric, **more)


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_interval_is_students(count, seed):
    rng = random.Random(seed)
    values = [rng.gauss(0.8, 0.02) for _ in range(count)]
    got = mean_of(values)
    low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert (got.value - got.half_width, got.value + got.half_width) == pytest.approx((low, high))
    assert str(got) == f"{got.value:.4f} ± {got.half_width:.4f}"


def test_one_value_has_no_interval():
    got = mean_of([0.5])
    assert (got.value, got.count, str(got)) == (0.5, 1, "0.5000")
    assert math.isnan(got.half_width)
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_metric_of_leaves_out_runs_without_one():
    got = metric_of([result(0, "rte", 0.6), result(1, "rte", None), result(2, "rte", 0.8)])
    assert (got.value, got.count) == (pytest.approx(0.7), 2)
    assert metric_of([result(1, "rte", None)]) is None


def test_glue_average_goes_seed_by_seed():
    whole = [result(0, "mnli", 0.9), result(0, "sst2", 0.6), result(0, "rte", 0.3)]
    other = [result(1, "mnli", 0.8), result(1, "sst2", 0.8), result(1, "rte", 0.8)]
    assert glue_average(whole).value == pytest.approx(0.6)
    assert (glue_average(whole + other).value, glue_average(whole + other).count) == (pytest.approx(0.7), 2)
    half = [result(2, "mnli", 0.1), result(2, "sst2", 0.1)]
    assert glue_average(whole + half).value == pytest.approx(0.6), "a seed without RTE has no average"
    assert glue_average(half) is None
    assert glue_average([result(0, t, 0.5, stand_in=True) for t in ("mnli", "sst2", "rte")]) is None


def test_scores_on_other_data_are_not_put_side_by_side():
    """One dataset's name may stand for several: each hash is a task of its own."""
    first, second = {"sha256": "1" * 64}, {"sha256": "2" * 64}
    runs = [result(s, "mine", 0.5, method="lora", data=first) for s in (0, 1)]
    runs += [result(s, "mine", 0.6, method="iw_lora", data=first) for s in (0, 1)]
    same = compare(runs)
    assert [row.task for row in same.rows] == ["mine, "] * 2
    assert next(row for row in same.rows if row.label == "iw_lora").minus_baseline.value == pytest.approx(0.1)
    other = compare([*runs, result(0, "mine", 0.9, method="iw_lora", data=second), result(0, "mine", 0.1, method="x")])
    found = {(row.label, row.task): row for row in other.rows}
    assert set(found) == {
        ("lora", "mine, , data 11111111"),
        ("iw_lora", "mine, , data 11111111"),
        ("iw_lora", "mine, , data 22222222"),
        ("x", "mine, , data not noted"),
    }
    assert found["iw_lora", "mine, , data 11111111"].minus_baseline.value == pytest.approx(0.1)
    assert found["iw_lora", "mine, , data 22222222"].minus_baseline is None


def test_methods_are_paired_with_lora_by_seed():
    runs = [result(s, "rte", v, method="lora", elapsed_s=10.0) for s, v in ((0, 0.5), (1, 0.7))]
    runs += [result(s, "rte", v, method="iw_lora", energy_j=5.0) for s, v in ((0, 0.6), (1, 0.7), (2, 0.9))]
    found = compare([*runs, result(3, "rte", None, method="lora")])
    lora, own = (next(row for row in found.rows if row.label == label) for label in ("lora", "iw_lora"))
    assert (found.baseline, lora.minus_baseline, lora.metric.count) == ("lora", None, 2)
    assert (own.minus_baseline.value, own.minus_baseline.count) == (pytest.approx(0.05), 2)
    assert (lora.joules, own.joules.value, lora.seconds.value) == (None, 5.0, 10.0)
    assert found.glue == {}


def test_two_settings_of_one_method_are_told_apart():
    runs = [result(0, "rte", v, method="iw_lora") for v in (0.5, 0.9)]
    runs[0].run_id, runs[1].run_id = "weak", "strong"
    found = compare(runs)
    assert {row.label: row.metric.value for row in found.rows} == {"weak": 0.5, "strong": 0.9}
    assert found.baseline is None
    for run, group in zip(runs, ("first", "second")):
        run.run_id, run.group = "same", group
    assert {row.label for row in compare(runs).rows} == {"first", "second"}
    for run, name in zip(runs, ("a", "b")):
        run.group, run.name = "same", name
    assert {row.label for row in compare(runs).rows} == {"a", "b"}, "one seed is never counted twice"


def test_models_and_budgets_are_never_averaged():
    runs = [result(s, "rte", 0.5, method="lora", budget={"kind": "steps", "limit": 10.0 * (s + 1)}) for s in (0, 1)]
    assert {row.label for row in compare(runs).rows} == {"lora, 10 steps", "lora, 20 steps"}
    runs = [result(s, "rte", 0.5, method="lora", model=f"home/model{s}") for s in (0, 1)]
    assert [(row.label, row.task) for row in compare(runs).rows] == [("lora", "rte, model0"), ("lora", "rte, model1")]


def test_stand_ins_are_named():
    runs = [result(0, "embedded-nli", 0.9, method="lora", stand_in=True, model="embedded/deberta-tiny")]
    (row,) = compare(runs).rows
    assert row.task == "embedded-nli, deberta-tiny (stand-in)"


def test_differences_are_of_the_test_where_all_have_one_else_of_the_best_validation():
    runs = [
        result(seed, "gsm8k", value, method=method, best={"value": value + 0.1}, test={"name": "x", "value": value / 2})
        for method, values in (("lora", (0.4, 0.5)), ("iw_lora", (0.6, 0.6)))
        for seed, value in enumerate(values)
    ]
    found = compare(runs)
    own = next(row for row in found.rows if row.label == "iw_lora")
    assert (found.by, own.test.value, own.minus_baseline.value) == ("test", pytest.approx(0.3), pytest.approx(0.075))
    runs[0].test = {}
    found = compare(runs)
    lora, own = (next(row for row in found.rows if row.label == label) for label in ("lora", "iw_lora"))
    assert (found.by, lora.test, own.test.value) == ("best", None, pytest.approx(0.3))
    assert own.minus_baseline.value == pytest.approx(0.15)
    runs[0].best = {}
    assert compare(runs).by == "metric"


def test_areas_and_the_way_to_a_target_over_seeds():
    runs = [result(seed, "gsm8k", 0.5, method="lora") for seed in range(3)]
    runs.append(result(0, "gsm8k", 0.5, method="full"))
    curves = [
        Curve({"seconds": 0.3, "joules": 0.2}, {"seconds": 10.0, "joules": 100.0}),
        Curve({"seconds": 0.5, "joules": 0.4}, {"seconds": 20.0, "joules": 300.0}),
        Curve({"seconds": 0.4, "joules": None}, {"seconds": 30.0, "joules": None}),
        Curve({"seconds": 0.1, "joules": None}, {"seconds": None, "joules": None}),
    ]
    found = compare(runs, curves, 0.5)
    full, lora = found.rows
    assert (found.target, set(lora.auc), lora.auc["seconds"].count) == (0.5, {"seconds"}, 3)
    low, high = stats.t.interval(0.95, 2, loc=0.4, scale=stats.sem([0.3, 0.5, 0.4]))
    assert lora.auc["seconds"].half_width == pytest.approx((high - low) / 2)
    assert (lora.target.count, lora.target.seconds.value, lora.target.joules) == (3, 20.0, None)
    assert str(lora.target) == "20.0 ± 24.8 s"
    assert str(full.target) == "not reached"
    curves[1] = Curve({}, {"seconds": None, "joules": None})
    lora = compare(runs, curves, 0.5).rows[1]
    assert (str(lora.target), lora.target.seconds, lora.auc) == ("2 of 3 runs", None, {})


def test_without_curves_the_areas_are_those_of_the_results():
    run = result(0, "gsm8k", 0.5, auc={"seconds": 0.25, "joules": None})
    (row,) = compare([run]).rows
    assert (row.auc["seconds"].value, "joules" in row.auc, row.target) == (0.25, False, None)
