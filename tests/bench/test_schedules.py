"""Schedules against each other: the search, the statistics, what the report says, and the whole in miniature."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from typing import Any

import pytest
import torch

from bench import schedule_runs, schedules
from bench.interleave import Round, Times
from bench.schedule_presets import Presets, run_of
from bench.schedule_report import conclusions, paired, row_of, rows_of, show, unlike, verdict
from bench.schedule_runs import diverged, ratio_of_sums
from bench.schedule_search import at_edge, best_exponent, next_exponent, rate_at
from fastpeft.compare.comparison import mean_of
from fastpeft.trainer.build import build_job
from tests.support.tiny import make_causal_lm

# ---- the search ----------------------------------------------------------------------------


def search(score, count):
    scores = {}
    while len(scores) < count:
        k = next_exponent(scores)
        assert k not in scores
        scores[k] = score(k)
    return scores


def test_the_search_brackets_and_then_halves():
    scores = search(lambda k: (k - 0.4) ** 2, 7)
    assert list(scores)[:5] == [0.0, 1.0, -1.0, 0.5, 0.25]
    assert best_exponent(scores) == min(scores, key=lambda k: abs(k - 0.4))
    assert not at_edge(scores)


@pytest.mark.parametrize("optimum", [-3.2, -0.6, 0.0, 2.3])
def test_the_search_goes_where_the_best_is(optimum):
    assert abs(best_exponent(search(lambda k: (k - optimum) ** 2, 9)) - optimum) <= 0.5


def test_the_search_goes_down_from_what_diverges_and_says_that_it_found_no_end():
    assert list(search(lambda k: math.nan, 5)) == [0.0, 1.0, -1.0, -2.0, -3.0]
    below = search(lambda k: k if k < -0.5 else math.inf, 4)
    assert best_exponent(below) == -2.0
    assert at_edge(below)


def test_rates_are_a_log_grid():
    assert [rate_at(3e-3, 3.0, k) for k in (-1, 0, 0.5, 1)] == [1e-3, 3e-3, 5.196e-3, 9e-3]


# ---- the statistics ------------------------------------------------------------------------


def test_the_interval_of_paired_differences():
    """t(0.975, 4) = 2.7764; the differences' standard deviation is sqrt(2.5) / 100."""
    own = {seed: 0.50 + (seed + 1) / 100 for seed in range(5)}
    difference = paired(own, dict.fromkeys(range(5), 0.50) | {9: 0.1})
    assert difference.count == 5
    assert difference.value == pytest.approx(0.03)
    assert difference.half_width == pytest.approx(2.7764 * math.sqrt(2.5) / 100 / math.sqrt(5), rel=1e-4)


@pytest.mark.parametrize(
    ("differences", "more_is_better", "said"),
    [
        ([0.02, 0.03, 0.01, 0.02, 0.02], True, "better"),
        ([0.02, 0.03, 0.01, 0.02, 0.02], False, "worse"),
        ([-0.02, -0.03, -0.01, -0.02, -0.02], True, "worse"),
        ([0.02, -0.03, 0.01, 0.02, 0.02], True, "no difference"),
        ([0.0, 0.0, 0.0], True, "no difference"),
        ([0.5], True, "one seed"),
    ],
)
def test_the_verdict(differences, more_is_better, said):
    assert verdict(mean_of(differences), more_is_better) == said


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2 / (1 + step / 50) for step in range(500)], False),
        ([1.0] * 100 + [2.5] * 100, True),
        ([1.0] * 100 + [2.5] * 20 + [1.0] * 100, False),
        ([1.0] * 50 + [math.nan], True),
        ([1.0] * 50 + [math.nan] + [1.0] * 50, False),
        ([0.02, 0.3] * 200, False),
    ],
    ids=["falls", "stays high", "a spike", "ends as nan", "a skipped step", "noisy"],
)
def test_divergence(losses, expected):
    assert diverged(losses) is expected


def test_the_mean_ratio_counts_what_happens_now_and_then():
    """A step of ten that costs twice: the median does not see it."""
    times = Times([Round(0, {"base": (1.0, 1.0), "other": (1.0, 2.0 if i % 5 == 0 else 1.0)}) for i in range(50)])
    assert times.ratio("other", "base")[0] == 1.0
    ratio, low, high = ratio_of_sums(times, "other", "base")
    assert ratio == pytest.approx(1.1)
    assert 1.03 < low < ratio < high < 1.17


# ---- what the report says ------------------------------------------------------------------


def made_run(schedule: str, seed: int, metric: float | None, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    run = {
        "schedule": schedule, "seed": seed, "rate": 1e-3, "status": "done", "diverged": False, "metric": metric,
        "metric_name": "exact_match", "loss": loss, "test": None, "test_loss": None, "steps": 100, "energy_j": None,
        "budget": {"kind": "seconds", "limit": 30.0, "spent": 30.0}, "device": "cpu", "part": 0,
        "start": {"loss": 4.0 + seed, "grad_norm": 2.0 + seed, "tokens": [100 + seed, 7]},
    }  # fmt: skip
    return run | more


def made_runs(values: dict[str, list[float]], loss: dict[str, float] | None = None) -> list[dict[str, Any]]:
    return [
        made_run(name, seed, value, (loss or {}).get(name, 1.0) + 0.01 * seed)
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]


NOISE = [0.0, 0.01, -0.01, 0.005, -0.005]
LINEAR = [0.60 + x for x in NOISE]


def made_report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(run["schedule"] for run in runs))
    trials = [{"rate": 1e-3, "score": 1.5}, {"rate": 3e-3, "score": "diverged"}]
    cost = {"ratio": 1.01, "mean_ratio": 1.02, "rounds": 9, "clock": "wall"}
    cost |= {f"{of}_{end}": 1.0 for of in ("ratio", "mean_ratio") for end in ("low", "high")}
    return {
        "title": "tiny",
        "metric": "exact_match",
        "search": {"count": 2, "budget": "30s", "seed": 1000, "tune_on": "loss", "run_s": 60.0},
        "tuned": {name: {"rate": 1e-3, "trials": trials, "edge": True} for name in names},
        "rows": rows_of(runs, names),
        "overhead": dict.fromkeys(names, cost),
        "unlike": unlike(runs),
    }


def test_a_fot_that_loses_is_reported_as_such(capsys):
    worse = [value - 0.05 + x / 5 for value, x in zip(LINEAR, reversed(NOISE))]
    runs = made_runs({"linear": LINEAR, "fot": worse, "wsd": LINEAR}, {"fot": 1.2})
    report = made_report(runs)
    assert [row["schedule"] for row in report["rows"]][-1] == "fot"
    said = conclusions(report)
    assert "exact match, val, against tuned linear: better: none; worse: fot; no difference: wsd" in said
    assert "loss, val, against tuned linear: better: none; worse: fot; no difference: wsd" in said
    show(report)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "fot" in line and "│" in line)
    assert "worse" in line
    assert "-0.0500 (-0.0" in line
    assert "0.001: 1.5, 0.003: diverged" in out
    assert "worse: fot" in out


def test_a_graff_that_wins_is_reported_as_such_and_what_no_interval_shows_is_not():
    runs = made_runs(
        {"linear": LINEAR, "graff": [x + 0.04 + i / 1e3 for i, x in enumerate(LINEAR)], "rex": LINEAR[::-1]}
    )
    said = conclusions(made_report(runs))
    assert "exact match, val, against tuned linear: better: graff; worse: none; no difference: rex" in said
    assert "loss, val, against tuned linear: better: none; worse: none; no difference: graff, rex" in said


def test_runs_without_a_metric_flatter_nobody():
    runs = made_runs({"linear": LINEAR, "fot": [0.9] * 4})
    runs.append(made_run("fot", 4, None, None, status="diverged", diverged=True))
    row = row_of("fot", runs)
    assert row["metric"]["minus_linear"]["verdict"] == "1 without"
    assert row["metric"]["minus_linear"]["n"] == 4
    assert row["diverged"] == 1
    assert "1 without: fot" in conclusions(made_report(runs))[0]


def test_the_worst_overshoot_and_the_joules():
    spent = [{"kind": "seconds", "limit": 30.0, "spent": value} for value in (29.0, 30.3)]
    runs = [made_run("linear", seed, 0.5, energy_j=100.0 + seed, budget=spent[seed]) for seed in range(2)]
    row = row_of("linear", runs)
    assert row["overshoot"] == pytest.approx(0.01)
    assert row["energy_j"] == 100.5
    runs[1]["energy_j"] = None
    assert row_of("linear", runs)["energy_j"] is None


def test_a_schedule_that_does_nothing_is_told():
    runs = made_runs({"linear": LINEAR, "bats": LINEAR, "wsd": LINEAR}, {"wsd": 1.0001})
    said = [line for line in conclusions(made_report(runs)) if "to the bit" in line]
    assert said == ["bats: every run of it ended as linear's did, to the bit. Did it do anything?"]


def test_a_machine_that_was_not_quiet_is_told():
    runs = made_runs({"linear": LINEAR, "wsd": LINEAR})
    assert not [line for line in conclusions(made_report(runs)) if "not quiet" in line]
    next(run for run in runs if run["schedule"] == "wsd")["steps"] = 80
    assert any("wsd took 80 steps in one run and 100 in another" in line for line in conclusions(made_report(runs)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("loss", 5.0000001, "fot, seed 1: loss 5.0000001 and not 5.0"),
        ("grad_norm", "nan", "fot, seed 1: grad_norm nan and not 3.0"),
        ("tokens", [101, 8], "fot, seed 1: the first batches are others"),
    ],
)
def test_another_start_is_told(key, value, said):
    runs = made_runs({"linear": LINEAR, "fot": LINEAR})
    assert unlike(runs) == []
    other = copy.deepcopy(runs)
    next(run for run in other if run["schedule"] == "fot" and run["seed"] == 1)["start"][key] = value
    assert unlike(other) == [said]
    assert "same initial weights and data order: NO" in conclusions(made_report(other))


# ---- the whole -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a tiny model and tiny problems."""
    folder = tmp_path_factory.mktemp("local")
    make_causal_lm(folder / "model", max_position_embeddings=64)
    rng = random.Random(0)
    for split, count in (("train", 48), ("test", 8)):
        pairs = [(rng.randrange(9), rng.randrange(9)) for _ in range(count)]
        rows = [{"question": f"{a} and {b}?", "answer": f"{a}+{b}\n#### {a + b}"} for a, b in pairs]
        (folder / f"data-{split}").write_text("\n".join(map(json.dumps, rows)))
    data = folder / "data"
    data.mkdir()
    for split in ("train", "test"):
        (folder / f"data-{split}").rename(data / f"{split}.jsonl")
    small = ["adapter.rank=4", "training.batch_size=4", "dataset.held_out=8", "training.precision=fp32"]
    return ["--task", "gsm8k", "--model", str(folder / "model"), "--data", str(data), *small]


def bench(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["schedules.py", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        schedules.main()
    return ended.value.code


QUICK = ("--quick", "--search-trials", 2, "--schedules", "constant")


def test_the_whole_in_miniature_and_a_resume_runs_only_what_is_missing(local, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    assert bench(monkeypatch, *local, *QUICK, "--json", out) == 0
    said = capsys.readouterr().out
    whole = json.loads(out.read_text())
    names = {"linear", "constant"}
    assert whole["unlike"] == []
    assert {row["schedule"] for row in whole["rows"]} == names
    assert all(len(tuned["trials"]) == 2 for tuned in whole["tuned"].values())
    assert whole["search"]["count"] == 4
    compared = [run for run in whole["runs"] if run["phase"] == "compare"]
    assert len(compared) == 4
    assert all(run["steps"] == 4 and run["metric_name"] == "exact_match" for run in compared)
    assert all(run["rate"] == whole["tuned"][run["schedule"]]["rate"] for run in compared)
    assert {run["num_validation"] for run in compared} == {8}
    assert {run["num_test"] for run in compared} == {8}
    assert whole["overhead"].keys() == names
    assert all(cost["steps"] == 10 and cost["ratio"] > 0 for cost in whole["overhead"].values())
    assert "same initial weights and data order: yes" in said
    by_seed = {}
    for run in compared:
        by_seed.setdefault(run["seed"], []).append(run["start"])
    assert all(len(starts) == 2 and starts[0] == starts[1] for starts in by_seed.values())
    assert by_seed[0][0] != by_seed[1][0]

    left = copy.deepcopy(whole)
    for key in ("rows", "tuned", "search", "unlike", "title", "metric"):
        del left[key]
    gone = [left["runs"].pop(), left["runs"].pop(3)]
    del left["overhead"]["constant"]
    out.write_text(json.dumps(left))
    taken = []
    monkeypatch.setattr(schedules, "measure_run", lambda run: taken.append(run) or schedule_runs.measure_run(run))
    assert bench(monkeypatch, *local, *QUICK, "--json", out, "--resume") == 0
    again = json.loads(out.read_text())
    assert sorted((run.training.seed, run.training.learning_rate, run.run_id) for run in taken) == sorted(
        (run["seed"], run["rate"], f"{run['schedule']}_gsm8k") for run in gone
    )
    assert len(again["parts"]) == 2
    assert again["tuned"] == whole["tuned"]  # the same seed at the same rate gives the same bits
    assert again["overhead"].keys() == names
    drop = {"elapsed_s", "setup_s", "part", "told", "budget"}
    assert {json.dumps({k: v for k, v in run.items() if k not in drop}) for run in again["runs"]} == {
        json.dumps({k: v for k, v in run.items() if k not in drop}) for run in whole["runs"]
    }

    assert bench(monkeypatch, *local, *QUICK, "--json", out) == 2
    assert "--resume goes on from it" in capsys.readouterr().err
    assert bench(monkeypatch, *local, *QUICK, "--json", out, "--resume", "--budget", "5steps") == 2
    assert "was measured with another budget, search_budget" in capsys.readouterr().err
    out.write_text("spoilt")
    assert bench(monkeypatch, *local, *QUICK, "--json", out, "--resume") == 2
    assert out.read_text() == "spoilt"


def test_one_seed_gives_every_schedule_the_same_weights_and_the_same_batches(local):
    found = presets(local).choose("constant,schedule_free")
    jobs = [build_job(run_of(run, seed, 1e-3, "4steps")) for seed in (0, 1) for run in found.values()]
    first, others = jobs[0], jobs[1:3]
    for job in others:
        assert torch.equal(job.adapter.flat.data, first.adapter.flat.data)
        assert all((job.batches.rows(step) == first.batches.rows(step)).all() for step in range(30))
    assert not torch.equal(jobs[3].adapter.flat.data, first.adapter.flat.data)
    assert any((jobs[3].batches.rows(step) != first.batches.rows(step)).any() for step in range(3))


def presets(arguments: list[str]) -> Presets:
    return Presets(schedules.parse_args([*arguments, "--quick"]))


def test_the_presets_that_differ_in_the_schedule_alone_are_found():
    found = presets(["--task", "gsm8k"]).found
    assert {"linear", "constant", "cosine", "wsd", "rex", "schedule_free"} <= found.keys()
    assert not [name for name in found if "nf4" in name or "mistral" in name]
    assert found["linear"].model.name == "embedded/qwen3-tiny"
    mnli = presets(["--task", "mnli"]).found
    assert "linear" in mnli
    assert not mnli.keys() & {"iwlora", "adalora", "full", "rslora", "lora"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--schedules", "cosin"], "--schedules cosin: no such schedule; did you mean cosine?"),
        (["--rates", "wsd=1e-3", "--schedules", "rex"], "--rates wsd: not among the schedules linear, rex"),
        (["--rates", "wsd"], "--rates: 'wsd': write linear=3e-3,fot=1e-3"),
        (["--budget", "soon"], "--budget: 'soon': write 30s, 2m or 300steps"),
        (["--model", "x"], "--model and --data go together"),
        (["--resume"], "--resume goes on from --json"),
        (["adapter.rnk=3"], "adapter.rnk: unknown key; did you mean rank?"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(monkeypatch, capsys, args, said):
    monkeypatch.setattr(schedules, "measure_run", lambda run: pytest.fail("measured"))
    assert bench(monkeypatch, "--task", "gsm8k", *args) == 2
    assert said in capsys.readouterr().err


def test_given_rates_are_not_searched_and_an_interrupt_keeps_what_is_done(local, tmp_path, monkeypatch, capsys):
    out, rates = tmp_path / "out.json", []

    def measured(run):
        if len(rates) == 3:
            raise KeyboardInterrupt
        rates.append(run.training.learning_rate)
        return made_run("", 0, 0.5) | {"elapsed_s": 1.0, "setup_s": 0.1}

    monkeypatch.setattr(schedules, "measure_run", measured)
    given = ["--rates", "linear=2e-3,wsd=5e-4", "--schedules", "wsd", "--quick", "--json", out]
    assert bench(monkeypatch, *local, *given) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert sorted(set(rates)) == [5e-4, 2e-3]
    assert len(json.loads(out.read_text())["runs"]) == 3
