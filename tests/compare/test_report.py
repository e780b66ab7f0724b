"""`fastpeft evaluate` on real runs and on made ones: files, figures, rows of runs that do not count, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
from matplotlib import font_manager
from rich.console import Console

from fastpeft.cli.result_tables import comparison_table, left_out_table
from fastpeft.compare.found_runs import find_runs
from fastpeft.compare.plain_font import FALLBACK, families, plain_font
from fastpeft.compare.report import Report, report
from fastpeft.config import load_run
from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.predictions import Answer, write_predictions
from fastpeft.errors import UserError
from fastpeft.runs.curves import Budgets, auc_of, evaluations
from fastpeft.runs.events import read_events
from fastpeft.runs.store import Result, RunFolder, write_json
from fastpeft.trainer.seeds import train_seeds
from tests.support.tiny_runs import write_run

PNG, PDF = b"\x89PNG", b"%PDF"


def evaluated(results_dir, *names, **options) -> Report:
    return report(find_runs(list(names), results_dir), results_dir, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two seeds of LoRA and of IW-LoRA, and a folder that is no run."""
    home = tmp_path_factory.mktemp("evaluate")
    file = write_run(home)
    for method in ("lora", "iw_lora"):
        run = load_run(file, {"method": method, "budget": "16steps", "evaluation.every": "4steps"})
        train_seeds(run, [0, 1], results_dir=home / "results", name=method)
    (home / "results" / "notes").mkdir()
    return home / "results"


@pytest.fixture(scope="module")
def made(results):
    return evaluated(results)


@pytest.fixture
def results_copy(results, tmp_path):
    """To be evaluated otherwise than `made` was."""
    return shutil.copytree(results, tmp_path / "copy")


def test_metrics_hold_the_whole_history_and_the_settings(made, results):
    for name in ("lora-seed0", "lora-seed1", "iw_lora-seed0", "iw_lora-seed1"):
        metrics = json.loads((results / name / "metrics.json").read_text())
        events = [json.loads(line) for line in (results / name / "events.jsonl").open()]
        scores = [event["value"] for event in events if event["type"] == "eval"]
        assert [entry["value"] for entry in metrics["evaluations"]] == scores
        assert metrics["metric"]["value"] == scores[-1]
        assert metrics["steps_logged"] == 8
        losses = [event["loss"] for event in events if event["type"] == "step"]
        assert metrics["last_loss"] == pytest.approx(sum(losses) / len(losses))
        assert metrics["history"]["steps"]["loss"] == pytest.approx(losses, rel=1e-6)
        assert metrics["history"]["steps"]["step"] == list(range(8))
        assert metrics["config"]["training"]["seed"] == metrics["seed"]


def test_figures_are_vectors_with_their_fonts_and_pictures(made, results):
    figures = results / "iw_lora-seed0" / "figures"
    stems = {path.stem for path in figures.iterdir()}
    assert stems == {f"iw_lora-seed0_{topic}" for topic in ("curves", "importance", "confusion")}
    assert {path.stem for path in (results / "lora-seed0" / "figures").iterdir()} == {
        "lora-seed0_curves",
        "lora-seed0_confusion",
    }
    stems = {path.stem for path in made.folder.glob("comparison_*")}
    assert stems == {"comparison_bar", "comparison_box", "comparison_seconds"}
    for path in [*figures.glob("*.pdf"), *made.folder.glob("*.pdf")]:
        content = path.read_bytes()
        assert content.startswith(PDF)
        assert b"/FontFile2" in content, "TrueType, embedded"
        assert b"/Type3" not in content
        assert path.with_suffix(".png").read_bytes().startswith(PNG)


def test_a_second_report_of_a_process_has_the_font_of_the_first():
    for _ in range(2):
        with plain_font() as path:
            found = font_manager.findfont(font_manager.FontProperties(families()[0]), fallback_to_default=False)
            assert found == str(path)
    assert families() == [FALLBACK]


def test_methods_are_tested_against_the_baseline_over_seeds_and_over_rows(made):
    assert [(row.label, row.metric.count) for row in made.comparison.rows] == [("iw_lora", 2), ("lora", 2)]
    own, base = made.comparison.rows
    assert (base.seeds_test, base.rows_test) == (None, None)
    assert own.rows_test.test == "paired bootstrap"
    assert own.rows_test.count == (64, 64)
    means = [sum(row.by_seed.values()) / 2 for row in (own, base)]
    assert own.rows_test.difference == pytest.approx(means[0] - means[1], abs=1e-6)
    assert own.seeds_test.test == "paired t"
    saved = json.loads((made.folder / "aggregated_metrics.json").read_text())
    assert saved["rows"][0]["rows_p_holm"] == pytest.approx(own.rows_test.p_holm)
    with (made.folder / "aggregated_metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["iw_lora", "lora"]
    assert float(lines[0]["improvement"]) == pytest.approx(own.minus_baseline.value)
    assert lines[1]["improvement"] == ""


def test_another_baseline_is_named(made, results_copy, quick_figures):
    other = evaluated(results_copy, baseline="iw_lora").comparison
    assert other.row("lora", other.rows[0].task).minus_baseline.value == pytest.approx(
        -made.comparison.rows[0].minus_baseline.value
    )
    with pytest.raises(UserError, match=r"--baseline iwlora: no run is called so; there are: iw_lora, lora"):
        evaluated(results_copy, baseline="iwlora")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attrs if name == "id"]


def test_the_page_needs_no_other_file_and_the_text_links_to_figures_that_are_there(made):
    page, text = _Page(), (made.folder / "report.html").read_text()
    page.feed(text)
    assert page.tags.count("svg") == 3 + 2 * 2 + 2 * 3
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links), "inside the page"
    assert not re.search(r"url\((?!#)", text)
    assert {"script", "link", "img"}.isdisjoint(page.tags)
    defined = [i for i in page.ids if not i.startswith(("figure", "axes", "patch", "line", "text", "matplotlib"))]
    clips = [i for i in defined if re.fullmatch(r"[pm][0-9a-f]{10}", i)]
    assert len(clips) == len(set(clips)), "two figures would take each other's"
    assert "prefers-color-scheme: dark" in text
    assert "#000000" not in text, "ink that a dark page swallows"
    links = re.findall(r"\]\((.+?)\)", (made.folder / "report.md").read_text())
    assert len(links) == page.tags.count("svg")
    assert all((made.folder / link).is_file() for link in links)


def test_a_group_a_run_and_a_folder_by_name(results):
    def runs(*names):
        return [one.name for one in find_runs(list(names), results)]

    assert runs("lora") == ["lora-seed0", "lora-seed1"]
    assert runs("iw_lora-seed1") == ["iw_lora-seed1"]
    assert runs(str(results / "lora-seed1"), "lora") == ["lora-seed1", "lora-seed0"]


def test_refusals(results, tmp_path):
    with pytest.raises(UserError, match=r"lorra: there is no such run .*; there are: iw_lora, iw_lora-seed0"):
        find_runs(["lorra"], results)
    with pytest.raises(UserError, match="nothing has been evaluated yet"):
        find_runs([], tmp_path)


def test_the_command(results_copy, fastpeft_here, quick_figures):
    command = ["evaluate", "--results-dir", results_copy, "--target", "0.01"]
    done = fastpeft_here(*command, "lora", "iw_lora", "lorra")
    assert done.code == 0, done.err
    for fact in ("minus lora (best)", "to 0.01", "p over rows", "lorra", "missing", "report.html"):
        assert fact in done.out, fact
    assert "no such run" in fastpeft_here(*command, "nothing").refused()
    assert "--baseline nothing" in fastpeft_here(*command, "--baseline", "nothing").refused()


# ---- made runs ----------------------------------------------------------------------------------


def made_run(results_dir, name, values, metered=True, **fields):
    """A run of 100 s with an evaluation every 20 s, and its test."""
    folder = RunFolder(results_dir / name)
    folder.path.mkdir(parents=True)
    folder.config.write_text("method: lora\n")
    events = [{"type": "step", "elapsed_s": float(i), "step": i, "loss": 1.0, "lr": 0.1} for i in range(90)]
    for i, value in enumerate(values, start=1):
        common = {"type": "eval", "time_s": 0.0, "elapsed_s": 20.0 * i, "step": 20 * i, "energy_j": 900.0 * i}
        events.append(common | {"split": "validation", "metric": "exact_match", "value": value, "loss": 0.9, "num": 5})
    events.append(events[-1] | {"split": "test", "value": 0.99, "elapsed_s": 95.0})
    if not metered:
        events = [event | {"energy_j": None} for event in events]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    result = Result(
        run_id="r", name=name, status="done", method="lora", dataset="gsm8k", elapsed_s=95.0,
        budget={"kind": "seconds", "limit": 100.0, "spent": 95.0}, energy_j=4000.0 if metered else None,
        metric={"name": "exact_match", "value": values[-1]}, best={"value": max(values), "step": 20},
        test={"name": "exact_match", "value": 0.99, "num": 7, "weights": "best", "step": 20}, **fields,
    )  # fmt: skip
    write_json(folder.result, dataclasses.asdict(result))
    return folder


def test_areas_the_target_and_the_test_are_reported(tmp_path, quick_figures):
    folder = made_run(tmp_path, "a", [0.2, 0.4, 0.6, 0.5])
    made_run(tmp_path, "b", [0.1, 0.2, 0.3, 0.4], seed=1)
    comparison = evaluated(tmp_path, target=0.6).comparison
    (row,) = comparison.rows
    saved = json.loads((folder.path / "metrics.json").read_text())
    assert saved["auc"]["seconds"] == pytest.approx((0.3 + 0.5 + 0.55 + 0.5) * 20 / 100)
    assert saved["auc"]["joules"] == pytest.approx(((0.3 + 0.5 + 0.55) * 900 + 0.5 * 400) / 4000)
    assert saved["target"] == {"value": 0.6, "seconds": 60.0, "joules": 2700.0}
    budgets = Budgets.of(saved["budget"], saved["elapsed_s"], saved["energy_j"])
    assert saved["auc"] == auc_of(evaluations(read_events(folder.events)), budgets), "as result.json's"
    assert [entry["value"] for entry in saved["evaluations"]] == [0.2, 0.4, 0.6, 0.5], "the test is no part of it"
    assert [(entry["split"], entry["value"]) for entry in saved["other_splits"]] == [("test", 0.99)]
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["target"]["seconds"] is None
    assert (str(row.target), row.auc["seconds"].count, comparison.by) == ("1 of 2 runs", 2, "test")
    assert (tmp_path / "comparison" / "comparison_joules.pdf").is_file()
    text = printed(comparison_table(comparison))
    for fact in ("AUC over J", "to 0.6", "1 of 2 runs", "0.9900", "minus lora (test)"):
        assert fact in text, fact


def test_without_a_meter_nothing_is_drawn_or_said_over_joules(tmp_path, quick_figures):
    made_run(tmp_path, "a", [0.2, 0.4], metered=False)
    stale = tmp_path / "comparison" / "comparison_joules.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of earlier runs")
    comparison = evaluated(tmp_path).comparison
    assert not stale.exists()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["target"] is None
    text = printed(comparison_table(comparison))
    assert "AUC" in text
    assert "AUC over J" not in text


@pytest.mark.parametrize("target", [0.0, 60.0, -1.0, math.nan])
def test_a_target_is_a_share(tmp_path, target):
    with pytest.raises(UserError, match=r"write 0.6 for 60 %"):
        report([], tmp_path, target)


def printed(table):
    console = Console(width=250)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def mixed(tmp_path):
    """Two runs that count, on a stand-in and on other data, and one of each that does not."""
    made_run(tmp_path, "done", [0.2, 0.4], data={"sha256": "1" * 64}, stand_in=True)
    made_run(tmp_path, "other", [0.3, 0.5], data={"sha256": "2" * 64}, stand_in=True, seed=1)
    for status in ("running", "stopped", "diverged", "failed"):
        folder = made_run(tmp_path, status, [0.9, 0.9], seed=9)
        write_json(folder.result, json.loads(folder.result.read_text()) | {"status": status})
    dead = made_run(tmp_path, "crashed", [0.9, 0.9], seed=8)
    write_json(dead.result, json.loads(dead.result.read_text()) | {"status": "running"})
    os.utime(dead.events, (0, 0))
    (made_run(tmp_path, "set-up", [0.9]).result).unlink()
    empty = made_run(tmp_path, "empty", [0.9])
    write_json(empty.result, json.loads(empty.result.read_text()) | {"metric": {}, "best": {}, "test": {}})
    return tmp_path


def test_runs_that_cannot_be_counted_are_rows_that_say_so(mixed, quick_figures):
    names = [path.parent.name for path in mixed.glob("*/run.yaml")]
    made = evaluated(mixed, *names, "nowhere")
    found = {one.name: one for one in made.found}
    assert {name for name, one in found.items() if one.counts} == {"done", "other"}
    expected = {
        "running": "still running",
        "crashed": "lost its heartbeat",
        "stopped": "before the end of its budget",
        "diverged": "not finite",
        "failed": "failed",
        "set-up": "set up",
        "empty": "nothing has been evaluated",
        "nowhere": "no such run",
    }
    text, page = printed(left_out_table([one for one in made.found if not one.counts])), made.folder / "report.md"
    rows = {
        line.split(" | ")[0].removeprefix("| "): line for line in page.read_text().splitlines() if " | no | " in line
    }
    saved = {run["name"]: run for run in json.loads((made.folder / "aggregated_metrics.json").read_text())["runs"]}
    for name, why in expected.items():
        assert why in found[name].note
        assert why in rows[name]
        assert why in saved[name]["note"]
        assert name in text
    assert found["crashed"].status == "dead"
    assert {row.metric.count for row in made.comparison.rows} == {1}, "on other data nothing is averaged"
    assert "other data" in found["done"].remark
    content = page.read_text()
    assert content.count("stand-in: ") == 2
    assert "STAND-IN" in content


def test_only_runs_that_do_not_count_make_a_report_all_the_same(mixed, quick_figures):
    made = evaluated(mixed, "running", "failed")
    assert (made.comparison.rows, (made.folder / "report.html").is_file()) == ([], True)
    assert (mixed / "running" / "metrics.json").is_file()


def answers_of(folder, right):
    rows = [ReadRow((f"question {i}", "<b>&amp;"), ("2",)) for i in range(len(right))]
    answered = [Answer("2", "2" if is_right else "3 | `x`", correct=is_right) for is_right in right]
    value = sum(right) / len(right)
    write_predictions(
        folder.predictions("test"), zip(rows, answered), split="test", step=20, metric="exact_match", value=value
    )
    result = json.loads(folder.result.read_text())
    write_json(folder.result, result | {"test": result["test"] | {"value": value}})


def test_one_run_a_side_is_told_apart_by_mcnemar(tmp_path, quick_figures):
    first, second = made_run(tmp_path, "a", [0.2]), made_run(tmp_path, "b", [0.3])
    write_json(second.result, json.loads(second.result.read_text()) | {"method": "iw_lora"})
    answers_of(first, [True] * 30 + [False] * 10)
    answers_of(second, [True] * 38 + [False] * 2)
    made = evaluated(tmp_path)
    own = made.comparison.row("iw_lora", made.comparison.rows[0].task).rows_test
    assert (own.test, own.p, own.note) == ("McNemar", pytest.approx(2 * 0.5**8), "8 rows gained, 0 lost")
    html = (made.folder / "report.html").read_text()
    assert "question 39 | &lt;b&gt;&amp;amp;" in html, "as text"
    assert "3 \\| \\`x\\`" in (made.folder / "report.md").read_text(), "no cell of its own"


def test_answers_of_another_evaluation_are_left_out_and_said(tmp_path, quick_figures):
    folder = made_run(tmp_path, "a", [0.2])
    answers_of(folder, [True, False])
    write_json(folder.result, json.loads(folder.result.read_text()) | {"test": {"name": "exact_match", "value": 0.9}})
    made = evaluated(tmp_path)
    assert "of another evaluation than the score" in (made.folder / "report.md").read_text()
    folder.predictions("test").write_text("damaged")
    assert "test.jsonl: cannot be read" in (evaluated(tmp_path).folder / "report.md").read_text()


def test_many_runs_are_read_in_processes_of_their_own(tmp_path, monkeypatch, quick_figures):
    for i in range(2):
        made_run(tmp_path, f"r{i}", [0.2, 0.1 * i], seed=i)
    alone = evaluated(tmp_path).comparison
    monkeypatch.setattr("fastpeft.compare.report._OWN_PROCESSES_FROM", 2)
    assert evaluated(tmp_path).comparison == alone
    for i in range(2):  # where figures are quick only in this process
        assert (tmp_path / f"r{i}" / "figures" / f"r{i}_curves.png").read_bytes().startswith(PNG)
