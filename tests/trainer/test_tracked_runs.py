"""Real runs with the real W&B, killed and resumed; and with a W&B that fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import fastpeft
from fastpeft.errors import UserError
from fastpeft.runs.events import Event
from fastpeft.trackers import process
from tests.support.tiers import some
from tests.support.tiny_runs import (
    Child,
    Listener,
    assert_same_weights,
    has_event,
    steps_logged,
    strict_events,
    tiny_run,
    weights,
    write_run,
)
from tests.support.wandb_server import KEY, WandbServer, files_with

NUM_STEPS = 40


def assert_has_all_once(online_wandb: WandbServer, events: list[Event]) -> None:
    """W&B's history is the log's: every step, evaluation and importance, each once."""
    assert sorted(online_wandb.lines) == list(range(len(online_wandb.lines)))
    of_type = {kind: [e for e in events if e["type"] == kind] for kind in ("step", "eval", "importance")}
    orders = [line["_step"] for _, line in sorted(online_wandb.lines.items())]
    assert orders == sorted(set(orders))
    steps = online_wandb.rows("train/loss")
    assert [row["step"] for row in steps] == [e["step"] + 1 for e in of_type["step"]]
    for key in ("loss", "penalty", "lr", "grad_norm", "tokens"):
        assert [row[f"train/{key}"] for row in steps] == pytest.approx([e[key] for e in of_type["step"]])
    evals = online_wandb.rows("eval/accuracy")
    assert [(row["step"], row["eval/accuracy"]) for row in evals] == [(e["step"], e["value"]) for e in of_type["eval"]]
    importance = online_wandb.rows(f"importance/{of_type['importance'][0]['names'][0]}")
    assert [row["step"] for row in importance] == [e["step"] for e in of_type["importance"]]
    assert len(online_wandb.lines) == len(steps) + len(evals) + len(importance)


@pytest.mark.soak
def test_an_offline_run_that_is_killed_and_resumed_is_sent_whole_and_once(
    tmp_path: Path, online_wandb: WandbServer
) -> None:
    path, folder = write_run(tmp_path), tmp_path / "r"
    more = [f"budget={NUM_STEPS}steps", "training.checkpoint_steps=10", "wandb.mode=offline", "training.batch_size=64"]
    place = ["--name", "r", "--results-dir", str(tmp_path)]
    with Child(tmp_path / "0.log", "train", "--run", str(path), *place, *more) as child:
        child.wait_until(lambda: has_event(folder, lambda e: e["type"] == "step" and e["step"] > 13))
        child.process.kill()
        child.end()
    with Child(tmp_path / "1.log", "train", "--resume", *place) as child:
        assert child.end() == 0, child.output()

    assert steps_logged(folder) == list(range(NUM_STEPS))
    offline = list((folder / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    assert f"wandb sync {offline[0]}" in child.output()
    assert not (tmp_path / "wandb").exists()
    for _ in range(2):  # sending it again changes nothing
        online_wandb.sync(*offline)
        assert_has_all_once(online_wandb, strict_events(folder))
    result = json.loads((folder / "result.json").read_text())
    assert online_wandb.summary["final/accuracy"] == result["metric"]["value"]
    assert (online_wandb.summary["best/accuracy"], online_wandb.summary["best/step"]) == (
        result["best"]["value"],
        result["best"]["step"],
    )
    assert online_wandb.config["training"]["value"]["batch_size"] == 64
    assert online_wandb.exit_code == 0
    assert any(online_wandb.keys)  # the key was used, and is in no file of the run
    assert files_with(KEY, tmp_path) == []
    assert json.loads((folder / "environment.json").read_text())["packages"]["wandb"]


# ---- a W&B that fails ------------------------------------------------------------------------


def fake_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A package `wandb` for child processes, in which `log` has the fault."""
    package = folder / "fake" / "wandb"
    package.mkdir(parents=True)
    code = (
        "import os, time\n"
        "from types import SimpleNamespace as S\n"
        "class Settings:\n"
        "    model_fields = {}\n"
        "def init(dir, **_):\n"
        "    return S(starting_step=0, settings=S(sync_dir=dir), define_metric=lambda *a, **k: None,\n"
        "             config={}, summary={}, log=log, finish=lambda exit_code: None)\n"
        f"def log(*a, **k):\n    {fault}\n"
    )
    (package / "__init__.py").write_text(code.replace("config={}", "config=S(update=lambda *a, **k: None)"))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.parametrize(
    ("fault", "said"),
    some([("raise OSError('no such host')", "OSError: no such host"), ("time.sleep(99)", "not finished")], unpack=True),
)
def test_a_failing_tracker_changes_nothing_of_the_run(
    fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "FINISH_S", 0.5)
    plain = fastpeft.train(tiny_run(tmp_path), results_dir=tmp_path, name="plain")
    fake_wandb(tmp_path, monkeypatch, fault)

    def slow(event: Event) -> None:  # the run must outlast the tracker's start for its warning to be in the log
        if "raise" in fault and event["type"] == "eval" and event["step"] == 10:
            time.sleep(2.0)

    listener = Listener(slow)
    tracked = fastpeft.train(tiny_run(tmp_path), results_dir=tmp_path, name="tracked", reporter=listener)
    assert (tracked.status, tracked.metric) == (plain.status, plain.metric)
    assert_same_weights(weights(tmp_path / "tracked"), weights(tmp_path / "plain"))
    assert tracked.elapsed_s < 20
    events = strict_events(tmp_path / "tracked")
    assert events[-1]["type"] == "end"
    told = [text for text in [*listener.said, *listener.warnings()] if said in text]
    assert len(told) == 1
    assert f"python -m fastpeft.trackers {tmp_path / 'tracked'}" in told[0]
    logged = [e for e in events if e["type"] == "warning" and "W&B stopped" in e["message"]]
    assert len(logged) == ("raise" in fault)


# ---- before anything starts ------------------------------------------------------------------


def refused(tmp_path: Path, **settings: Any) -> str:
    run = tiny_run(tmp_path, **settings)
    with pytest.raises(UserError) as caught:
        fastpeft.train(run, results_dir=tmp_path, name="r")
    assert not (tmp_path / "r").exists()
    return str(caught.value)


def test_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert "set WANDB_API_KEY, run `wandb login`" in refused(tmp_path, wandb={"mode": "online"})


def test_a_resume_may_ask_for_other_tracking(tmp_path: Path) -> None:
    fastpeft.train(tiny_run(tmp_path), results_dir=tmp_path, name="r")
    folder = tmp_path / "r"
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "stopped"}))
    again = tiny_run(tmp_path, wandb={"mode": "disabled"})
    fastpeft.train(again, results_dir=tmp_path, name="r", resume=True)
    assert fastpeft.load_run(folder / "run.yaml").wandb.mode == "disabled"
