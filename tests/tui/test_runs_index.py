"""The list of runs: what a row says, and that it is read again only when something changed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time

import pytest

from fastpeft.runs.store import DEAD_AFTER_S, RunFolder
from fastpeft.tui import runs_index as runs
from fastpeft.tui.runs_index import SPARK_POINTS, RunsIndex, groups
from tests.support.tui_logs import evaluation, header, heartbeat, lines, make_run, step, usual


def row_of(results_dir, name="a"):
    return next(row for row in RunsIndex(results_dir).refresh() if row.name == name)


def test_no_folder_an_empty_one_and_strangers(tmp_path):
    assert RunsIndex(tmp_path / "none").refresh() == []
    assert RunsIndex(tmp_path).refresh() == []
    (tmp_path / "figures").mkdir()
    (tmp_path / "note.txt").write_text("x")
    assert RunsIndex(tmp_path).refresh() == []
    (tmp_path / "note.txt").unlink()
    assert RunsIndex(tmp_path / "figures").refresh() == []


def test_links_in_a_circle_hidden_folders_and_names_that_no_terminal_shows_are_left_out(tmp_path):
    make_run(tmp_path, "a", usual(3))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    for name in (".deleted-b", "new\nline", "esc\x1b[31m", b"not-\xff-utf8".decode(errors="surrogateescape")):
        make_run(tmp_path, name, usual(3))
    make_run(tmp_path, "with space [bold]", usual(3))
    assert {row.name for row in RunsIndex(tmp_path).refresh()} == {"a", "with space [bold]"}


def test_a_log_that_may_not_be_read_hides_no_run(tmp_path):
    folder = make_run(tmp_path, "a", None, status="done", steps=7)
    folder.events.mkdir()
    row = row_of(tmp_path)
    assert (row.status, row.steps, row.last_loss) == ("done", 7, None)


def test_a_running_run(tmp_path):
    events = [header(), *(step(i, loss=2.0 - i / 500) for i in range(500)), heartbeat(50.5, 500), evaluation(499, 0.7)]
    make_run(tmp_path, "a", events, model="m", dataset="d", stand_in=True, group="g", best={"value": 0.75, "step": 100})
    row = row_of(tmp_path)
    assert (row.status, row.method, row.model, row.dataset) == ("running", "iw_lora", "m", "d")
    assert (row.stand_in, row.group, row.seed) == (True, "g", 7)
    assert (row.budget_kind, row.budget_limit, row.budget_spent) == ("seconds", 100.0, 50.5)
    assert (row.elapsed_s, row.eta_s, row.progress) == (50.5, pytest.approx(49.5), pytest.approx(0.505))
    assert (row.metric_name, row.metric, row.best) == ("accuracy", 0.7, 0.75)
    assert row.last_loss == pytest.approx(2.0 - 499 / 500)
    assert row.tokens_per_s == pytest.approx(5000.0)
    assert row.energy_j == pytest.approx(10_000.0)
    assert row.steps == 500
    assert len(row.sparkline) == SPARK_POINTS
    assert list(row.sparkline) == sorted(row.sparkline, reverse=True)
    assert row.sparkline[0] > 1.95
    assert row.sparkline[-1] == row.last_loss


def test_a_budget_of_another_kind_is_timed_by_its_pace(tmp_path):
    make_run(tmp_path, "a", [header(), *(step(i) for i in range(250))], budget={"kind": "steps", "limit": 1000})
    row = row_of(tmp_path)
    assert row.progress == pytest.approx(0.25)
    assert row.budget_spent == pytest.approx(250)
    assert row.eta_s == pytest.approx(75.0)


def test_a_finished_run_says_what_its_result_says(tmp_path):
    make_run(
        tmp_path,
        "a",
        usual(100),
        status="done",
        elapsed_s=20.0,
        tokens=40_000,
        steps=123,
        energy_j=55.0,
        metric={"name": "f1", "value": 0.6},
        best={"value": 0.65, "step": 3},
        budget={"kind": "seconds", "limit": 25.0, "spent": 20.0},
    )
    row = row_of(tmp_path)
    assert (row.status, row.metric_name, row.metric, row.best) == ("done", "f1", 0.6, 0.65)
    assert (row.elapsed_s, row.steps, row.tokens, row.tokens_per_s) == (20.0, 123, 40_000, 2000.0)
    assert (row.energy_j, row.progress, row.eta_s, row.budget_spent) == (55.0, 0.8, None, 20.0)


@pytest.mark.parametrize("status", ["done", "stopped", "diverged", "failed", "running"])
def test_the_status_is_the_stores(tmp_path, status):
    folder = make_run(tmp_path, "a", [header()], status=status)
    assert row_of(tmp_path).status == folder.status() == status


def test_a_run_without_a_heartbeat_is_dead_and_comes_back(tmp_path):
    folder = make_run(tmp_path, "a", [header(), step(0)])
    index = RunsIndex(tmp_path)
    assert index.refresh()[0].status == "running"
    long_ago = time.time() - DEAD_AFTER_S - 5
    os.utime(folder.events, (long_ago, long_ago))
    row = index.refresh()[0]
    assert (row.status, row.eta_s) == ("dead", None) == (folder.status(), None)
    os.utime(folder.events)
    assert index.refresh()[0].status == "running"


def test_time_alone_makes_a_run_dead(tmp_path, monkeypatch):
    make_run(tmp_path, "a", [header(), step(0)])
    index = RunsIndex(tmp_path)
    assert index.refresh()[0].status == "running"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + DEAD_AFTER_S + 1)
    assert index.refresh()[0].status == "dead"


def test_a_run_without_a_result_is_described_by_its_log(tmp_path):
    make_run(tmp_path, "a", [header(), step(0)], result=False)
    row = row_of(tmp_path)
    assert (row.status, row.method, row.model, row.dataset) == (
        "no result",
        "iw_lora",
        "embedded/deberta-tiny",
        "embedded-nli",
    )
    assert (row.stand_in, row.seed, row.budget_limit) == (True, 7, 100.0)


@pytest.mark.parametrize("result", [True, False])
def test_no_name_of_a_model_or_dataset_steers_the_terminal(tmp_path, result):
    odd = "\x1b[2Jmodel"
    config = {"method": odd, "model": {"name": odd}, "dataset": {"name": odd}, "training": {"seed": 1}}
    more = {"method": odd, "model": odd, "dataset": odd} if result else {}
    make_run(tmp_path, "a", [header(config=config), step(0)], result=result, **more)
    row = row_of(tmp_path)
    assert {row.method, row.model, row.dataset} == {"model"}


@pytest.mark.parametrize("log", [None, [], [header()]])
def test_a_run_that_has_not_begun(tmp_path, log):
    make_run(tmp_path, "a", log)
    row = row_of(tmp_path)
    assert (row.status, row.last_loss, row.sparkline, row.tokens_per_s, row.metric) == ("running", None, (), None, None)


@pytest.mark.parametrize("text", ["", "{", "null", '{"status": 3}', "\0"])
def test_broken_files_are_shown_as_far_as_they_go(tmp_path, text):
    folder = make_run(tmp_path, "a", [step(0)])
    folder.result.write_text(text)
    assert row_of(tmp_path).status == "no result"
    folder.events.write_bytes(text.encode() + b"\n" + lines([step(1, loss=float("nan"))]) + b'{"type":"st')
    row = row_of(tmp_path)
    assert math.isnan(row.last_loss)
    assert row.sparkline == ()


def test_results_with_numbers_that_are_not_finite(tmp_path):
    make_run(tmp_path, "a", [step(0)], status="diverged", metric={"name": "accuracy", "value": "nan"}, elapsed_s=0.0)
    row = row_of(tmp_path)
    assert math.isnan(row.metric)


def test_order_groups_and_deletion(tmp_path):
    for i, (name, group) in enumerate([("c", None), ("b-seed1", "b"), ("b-seed0", "b")]):
        folder = make_run(tmp_path, name, [header()], group=group)
        os.utime(folder.config, (1000 + i, 1000 + i))
    index = RunsIndex(tmp_path)
    rows = index.refresh()
    assert [row.name for row in rows] == ["c", "b-seed1", "b-seed0"]
    assert {key: [row.name for row in found] for key, found in groups(rows).items()} == {
        "c": ["c"],
        "b": ["b-seed1", "b-seed0"],
    }
    shutil.rmtree(tmp_path / "c")
    assert [row.name for row in index.refresh()] == ["b-seed1", "b-seed0"]
    make_run(tmp_path, "c", [header()])
    assert [row.name for row in index.refresh()] == ["b-seed1", "b-seed0", "c"]


def test_what_did_not_change_is_not_read_again(tmp_path, monkeypatch):
    folders = [make_run(tmp_path, f"r{i}", usual(50)) for i in range(5)]
    index, read = RunsIndex(tmp_path), []
    monkeypatch.setattr(RunFolder, "read_result", _counting(RunFolder.read_result, read))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: (read.append("log"), pread(*a))[1])
    index.refresh()
    assert {p for p in read if p != "log"} == {f.path.name for f in folders}
    read.clear()
    index.refresh()
    assert read == []
    with folders[2].events.open("ab") as file:
        file.write(lines([step(50, loss=0.25)]))
    rows = index.refresh()
    assert read == ["log"]
    assert rows[2].last_loss == 0.25
    assert rows[2].sparkline[-1] == 0.25
    folders[3].write_result(dataclasses.replace(folders[3].read_result(), status="done"))
    read.clear()
    assert index.refresh()[3].status == "done"
    assert read[0] == "r3"


def _counting(function, calls):
    def counted(self):
        calls.append(self.path.name)
        return function(self)

    return counted


def test_only_the_ends_of_a_long_log_are_read(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "a", usual(50_000))
    num, pread = [0], os.pread

    def counted(*args):
        data = pread(*args)
        num[0] += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    row = row_of(tmp_path)
    assert num[0] < 0.02 * folder.events.stat().st_size
    assert row.steps == 50_000
    assert len(row.sparkline) == SPARK_POINTS


def test_a_log_of_one_long_line_is_no_fault(tmp_path):
    folder = make_run(tmp_path, "a")
    folder.events.write_bytes(json.dumps(header(notes=["x" * (2 * runs.TAIL_BYTES)])).encode() + b"\n")
    assert row_of(tmp_path).last_loss is None


def test_rows_are_frozen(tmp_path):
    make_run(tmp_path, "a", [header()])
    with pytest.raises(dataclasses.FrozenInstanceError):
        row_of(tmp_path).name = "b"
