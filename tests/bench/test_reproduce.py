"""A paper's grid: every preset is there, what is done is left alone, and claims stand beside what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from bench.reproduce import PAPERS, command, main, parse, plan, table, write_table
from fastpeft.compare.comparison import compare
from fastpeft.config import load_run
from fastpeft.runs.store import Result, RunFolder, write_json

IWLORA = PAPERS["iwlora"]


@pytest.mark.parametrize("name", PAPERS)
def test_the_grid_is_of_presets_and_of_the_methods_that_the_claims_are_of(name):
    paper = PAPERS[name]
    for scale in paper.scales.values():
        for one in plan(paper, scale, 1):
            assert load_run(one.preset).method == paper.methods[one.own]
            load_run(one.preset, [text for text in scale.settings if "=" in text])
    assert {paper.baseline, *paper.rates} <= set(paper.methods)
    assert set(paper.claimed) | set(paper.gains)
    for own, task in [*paper.claimed, *paper.gains]:
        assert own in paper.methods
        assert task in paper.scales["full"].tasks


@pytest.mark.parametrize("name", ["fot", "graff", "unihyperlora"])
def test_rows_of_schedules_are_told_apart_by_their_presets(name, tmp_path):
    paper = PAPERS[name]
    options = options_of(tmp_path, "--table", "--paper", name)
    planned = list(plan(paper, paper.scales["stand-in"], 2))
    for one in planned:
        make(tmp_path, one, value=0.5 + 0.01 * one.seed)
    text = write_table(paper, planned, options)
    for own in paper.methods:
        assert f"| {paper.label(own, planned[0].task)} | 2 |" in text, own
    assert f"{len(planned)} runs are not done" not in text


def options_of(tmp_path, *more):
    arguments = ["--paper", "iwlora", "--scale", "stand-in", "--runs", str(tmp_path / "runs"), *more]
    return parse(arguments)


def make(tmp_path, one, status="done", value=0.5):
    folder = RunFolder(tmp_path / "runs" / one.name)
    method = next(paper.methods[one.own] for paper in PAPERS.values() if one.own in paper.methods)
    folder.path.mkdir(parents=True)
    folder.config.write_text("method: lora\n")
    write_json(folder.environment, {"device": "cpu", "threads": 1, "git": "abc", "packages": {"torch": "2.13.0"}})
    result = Result(
        run_id=one.preset, name=one.name, status=status, method=method, seed=one.seed, dataset="embedded-nli",
        model="embedded/deberta-tiny", stand_in=True, metric={"name": "accuracy", "value": value},
        best={"value": value, "step": 1}, elapsed_s=120.0,
    )  # fmt: skip
    write_json(folder.result, dataclasses.asdict(result))
    folder.events.write_text("")


def test_what_is_done_is_not_run_again_and_what_was_stopped_goes_on(tmp_path):
    options, scale = options_of(tmp_path), IWLORA.scales["stand-in"]
    done, stopped, new = list(plan(IWLORA, scale, 1))[:3]
    make(tmp_path, done)
    make(tmp_path, stopped, "stopped")
    assert command(done, IWLORA, scale, options) is None
    again = command(stopped, IWLORA, scale, options)
    assert again[-1] == "--resume"
    assert again[again.index("--name") + 1] == stopped.name
    fresh = command(new, IWLORA, scale, options)
    assert fresh[fresh.index("--run") + 1] == new.preset
    assert "--budget" in fresh
    longer = command(new, IWLORA, scale, options_of(tmp_path, "--budget", "600s"))
    assert longer[-1] == "600s"


def test_a_part_of_the_tasks_is_planned_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("bench.reproduce.write_table", lambda paper, planned, options: asked.extend(planned))
    main(["--paper", "iwlora", "--scale", "full", "--runs", str(tmp_path), "--table", "--tasks", "sst2"])
    assert {one.task for one in asked} == {"sst2"}
    with pytest.raises(SystemExit, match="unknown: wnut17; there are mnli, sst2, rte"):
        main(["--paper", "iwlora", "--scale", "full", "--runs", str(tmp_path), "--table", "--tasks", "wnut17"])


def test_the_table_has_claims_measurements_and_where_they_were_made(tmp_path):
    options, scale = options_of(tmp_path, "--table"), IWLORA.scales["stand-in"]
    planned = list(plan(IWLORA, scale, 3))
    for one in planned:
        if one.own in ("lora", "iwlora"):
            level = 0.6 if one.own == "iwlora" else 0.5
            make(tmp_path, one, value=level + 0.01 * one.seed * (1 + (one.own == "lora")))
    text = write_table(IWLORA, planned, options)
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| embedded-nli")}
    assert "0.851 | 0.6100 ± 0.0248 | +0.005 | +0.0900 (" in lines["iw_lora"]
    assert "| 0.846 | 0.5200" in lines["lora"]
    for fact in ("STAND-IN", "6 of 12 runs are not done", "device cpu, 1 threads a run", "commit abc", "torch 2.13.0"):
        assert fact in text, fact
    assert options.out.read_text() == text


def test_a_table_without_seeds_to_test_has_dashes():
    score = {"name": "accuracy", "value": 0.5}
    presets = IWLORA.methods.items()
    runs = [Result(run_id="x", name=f"{p}_mnli-seed0", method=m, metric=score, best=score) for p, m in presets]
    planned = list(plan(IWLORA, IWLORA.scales["stand-in"], 1))
    lines = table(IWLORA, compare(runs, baseline="lora"), planned)
    assert len(lines) == 2 + 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_refusals(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--paper", "iwlora", "--scale", "real"])
    assert caught.value.code == 2
    assert "--model and --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--paper", "iwlora", "--scale", "real", "--model", str(tmp_path / "x"), "--data", str(tmp_path)])
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no table: "):
        main(["--paper", "iwlora", "--scale", "stand-in", "--runs", str(tmp_path), "--table"])
