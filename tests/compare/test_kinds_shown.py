"""What commands show of a score: parts of the data, figures that are no shares, correlations under 0."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fastpeft.cli.console import ConsoleReporter
from fastpeft.cli.result_tables import closing, comparison_table
from fastpeft.compare.comparison import compare
from fastpeft.compare.found_runs import find_runs
from fastpeft.compare.report import report
from fastpeft.runs.curves import Budgets, auc_of, evaluations, to_target_of
from fastpeft.runs.store import Result, RunFolder
from tests.support.kind_runs import KINDS, METRICS, kind_run
from tests.support.tui_logs import evaluation, header, make_run, step

PARTS = {
    "LOC": {"precision": 0.9, "recall": 0.8, "f1": 0.847, "support": 1234},
    "[PER]": {"precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 56},
}


def printed(*renderables) -> list[str]:
    """Lines, with single spaces."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*renderables, sep="\n")
    return [" ".join(line.split()) for line in capture.get().split("\n")]


def test_parts_stand_behind_the_facts_a_table_a_split(tmp_path):
    metric = {"name": "f1", "value": 0.6, "groups": PARTS, "more": {"mse": 1234.5}}
    test = {"name": "f1", "value": 0.5, "num": 9, "groups": {"LOC": PARTS["LOC"]}}
    lines = printed(closing(Result(run_id="x", name="x", metric=metric, test=test), RunFolder(tmp_path)))
    assert "f1 0.6000" in lines
    assert "mse 1,234.50" in lines
    at = lines.index("validation precision recall f1 support")
    assert lines[at - 1 : at + 3] == [
        "",
        "validation precision recall f1 support",
        "LOC 0.9000 0.8000 0.8470 1,234",
        "[PER] 0.5000 0.2500 0.3333 56",
    ]
    at = lines.index("test precision recall f1 support")
    assert lines[at + 1] == "LOC 0.9000 0.8000 0.8470 1,234"


def test_a_score_without_parts_has_no_table_of_them(tmp_path):
    lines = printed(
        closing(Result(run_id="x", name="x", metric={"name": "accuracy", "value": 0.6}), RunFolder(tmp_path))
    )
    assert not any(line.startswith("validation") for line in lines)


def test_how_a_run_learned_is_a_row_of_its_loss_and_one_of_its_evaluations(tmp_path):
    events = [step(i, loss=2.0 - i / 10) for i in range(10)]
    events += [evaluation(i, 0.5 + i / 100) for i in (9, 29)]
    folder = make_run(tmp_path, "r", [header(), *events])
    lines = printed(closing(Result(run_id="x", name="r", metric={"name": "accuracy", "value": 0.59}), folder))
    assert "training loss █▇▆▆▅▄▃▃▂▁ 2 to 1.1" in lines
    assert "learning curve 0.590 0.790, evaluated after 1, 3 s" in lines
    alone = make_run(tmp_path, "s", [header(), step(0)])
    lines = printed(closing(Result(run_id="x", name="s"), alone))
    assert not any(line.startswith(("training loss", "learning curve")) for line in lines)


def test_the_rows_that_were_read_are_shown_with_their_hash(tmp_path):
    data = {"sha256": "ab" * 32, "splits": {"train": {"rows": 1200}, "validation": {"rows": 40}}}
    assert "rows train 1,200, validation 40; SHA-256 abababababab" in printed(
        closing(Result(run_id="x", name="x", data=data), RunFolder(tmp_path))
    )
    assert not any(
        line.startswith("rows") for line in printed(closing(Result(run_id="x", name="x"), RunFolder(tmp_path)))
    )


def test_the_live_lines_tell_every_figure(capsys):
    reporter = ConsoleReporter(Console(width=200))
    reporter.on_event(evaluation(9, -0.25, metric="spearman", more={"mse": 1234.5, "pearson": "nan"}))
    assert "spearman -0.2500, mse 1,234.50, pearson nan on 2,000 rows" in capsys.readouterr().out


# ---- correlations under 0 -----------------------------------------------------------------------


@pytest.fixture
def correlations(tmp_path):
    """A run that begins under 0, and one that never gets over it."""
    for name, values in (("rising", (-0.5, 0.0, 0.4)), ("below", (-0.5, -0.25, -0.125))):
        events = [header(), *(step(i) for i in range(30))]
        events += [evaluation(9 + 10 * i, v, metric="spearman", more={"mse": 4.0 - i}) for i, v in enumerate(values)]
        metric = {"name": "spearman", "value": values[-1], "more": {"mse": 2.0}}
        budget = {"kind": "seconds", "limit": 3.0, "spent": 3.0}
        fields = {"elapsed_s": 3.0, "dataset": "scores", "model": "m", "seed": 0, "method": name}
        best = {"value": values[-1], "step": 30}
        make_run(tmp_path, name, events, status="done", metric=metric, best=best, budget=budget, **fields)
    return tmp_path


def test_curves_and_targets_take_values_under_0(correlations, quick_figures):
    comparison = report(find_runs([], correlations), correlations, target=0.3).comparison
    rows = {row.label: row for row in comparison.rows}
    assert rows["rising"].measures == rows["below"].measures == "spearman"
    assert rows["below"].metric.value == -0.125
    assert rows["below"].auc["seconds"].value < 0 < 0.1
    assert str(rows["rising"].target) == "3.0 s, 1.0 J"
    assert str(rows["below"].target) == "not reached"
    assert (correlations / "comparison" / "comparison_seconds.png").is_file()
    lines = printed(comparison_table(comparison))
    assert lines[0].startswith("task method seeds measures metric best")
    assert any(" spearman -0.1250 " in line for line in lines)
    metrics = json.loads((correlations / "below" / "metrics.json").read_text())
    assert [entry["value"] for entry in metrics["evaluations"]] == [-0.5, -0.25, -0.125]
    assert metrics["metric"]["more"] == {"mse": 2.0}


def test_an_area_may_lie_under_0():
    found = evaluations([evaluation(9, -0.5), evaluation(19, 0.0), evaluation(29, -0.5)])
    area = auc_of(found, Budgets(seconds=3.0, joules=None))
    assert area["seconds"] == pytest.approx((0 - 0.25 - 0.25) / 3)  # 0 until the first has ended
    assert to_target_of(found, 0.0)["seconds"] == 2.0


# ---- the commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_shows_a_kind_by_its_own_metrics(kind, tmp_path, fastpeft_here, quick_figures):
    kind_run(tmp_path, kind)
    settings = ["budget=10steps", "evaluation.every=end"]
    shown = fastpeft_here("train", "--run", tmp_path / "run.yaml", "--name", "r", *settings).out
    again = fastpeft_here("runs", "show", "r").out
    fastpeft_here("evaluate", "r")
    metrics = json.loads((tmp_path / "results" / "r" / "metrics.json").read_text())
    assert (metrics["kind"], metrics["metric"]["name"]) == (kind, METRICS[kind])
    groups = metrics["metric"].get("groups", {})
    assert bool(groups) == (kind != "regression")
    assert metrics["evaluations"][-1].get("groups", {}) == groups
    for text in (shown, again):
        lines = [" ".join(line.split()) for line in text.split("\n")]
        assert f"{METRICS[kind]} {metrics['metric']['value']:.4f}" in lines
        for name, value in metrics["metric"]["more"].items():
            assert f"{name} {value:.4f}" in lines
        assert ("validation precision recall f1 support" in lines) == bool(groups)
        for part, figures in groups.items():
            *shares, support = figures.values()
            assert " ".join([part, *(f"{value:.4f}" for value in shares), str(support)]) in lines


# ---- the majority beside the metric -------------------------------------------------------------


def scored(name: str, value: float, majority: float | None, **more) -> Result:
    metric = {"name": "accuracy", "value": value, "more": {} if majority is None else {"majority": majority}}
    return Result(
        run_id="x", name=name, method=name, dataset="d", model="m", metric=metric, best=metric | {"step": 3}, **more
    )


def test_the_majority_stands_beside_every_accuracy(tmp_path):
    assert "majority 0.7500" in printed(closing(scored("r", 0.8, 0.75), RunFolder(tmp_path)))
    comparison = compare([scored("lora", 0.8, 0.75), scored("full", 0.9, 0.75), scored("older", 0.9, None)])
    assert [row.majority and row.majority.value for row in comparison.rows] == [0.75, 0.75, None]
    header, *lines = printed(comparison_table(comparison))
    assert "majority" in header
    assert sum(" 0.7500 " in line for line in lines) == 2


def test_without_a_majority_there_is_no_column():
    assert "majority" not in printed(comparison_table(compare([scored("lora", 0.8, None)])))[0]


def test_the_majority_is_of_the_rows_that_are_compared():
    run = scored("lora", 0.8, 0.75)
    run.test = {"name": "accuracy", "value": 0.7, "num": 9, "more": {"majority": 0.6}}
    (row,) = compare([run]).rows
    assert row.majority.value == 0.6
