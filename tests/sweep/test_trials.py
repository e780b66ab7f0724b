"""As many trials as were asked for are there, whatever happens to their processes and to the sweep."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from fastpeft.config import RunConfig
from fastpeft.sweep.lease import HEARTBEAT, LEASE, Lease
from fastpeft.sweep.space import identity
from fastpeft.sweep.study import best_of, counted, open_storage, open_study
from fastpeft.sweep.trial_rows import DURATION_S, OUTCOME, PAUSED, Standing, TrialRow, rows_of
from fastpeft.sweep.trials import SweepError, Trials
from tests.support import toy_trials
from tests.support.toy_trials import BATCH, BEST_BATCH, BEST_RATE, RATE, toy_run

ROOT = Path(__file__).resolve().parents[2]


class Heard:
    """A Listener that keeps everything."""

    def __init__(self, on_trial: Callable[[TrialRow], None] = lambda _: None) -> None:
        self.said: list[str] = []
        self.rows: list[TrialRow] = []
        self.standings: list[Standing] = []
        self._on_trial = on_trial

    def say(self, message: str) -> None:
        self.said.append(message)

    def on_trial(self, row: TrialRow) -> None:
        self.rows.append(row)
        self._on_trial(row)

    def on_standing(self, standing: Standing) -> None:
        self.standings.append(standing)


def prepared(
    folder: Path, run: RunConfig, heard: Heard | None = None, target: str = toy_trials.QUADRATIC, **options: Any
) -> Trials:
    """Trials of `run`, over the journal in `folder`."""
    folder.mkdir(exist_ok=True)
    study, _ = open_study(open_storage(None, folder), "toy", run.optuna, identity(run))
    options = {"num_workers": 2, "target": target} | options
    return Trials(run, study, folder, heard or Heard(), **options)


def states(study: optuna.Study) -> Counter[str]:
    return Counter(trial.state.name for trial in study.trials)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# ---- searching -----------------------------------------------------------------------------


def test_40_trials_find_the_optimum_and_the_bad_ones_are_pruned(tmp_path):
    heard = Heard()
    trials = prepared(tmp_path, toy_run(), heard)
    assert trials.run_all() == "done"
    best = best_of(trials.study)
    assert best is not None
    assert best.value > 0.99  # 1 at the optimum; of 40 random ones the median best is 0.98
    assert best.params[BATCH] == BEST_BATCH
    assert BEST_RATE / 2 < best.params[RATE] < BEST_RATE * 2
    found = states(trials.study)
    assert found["COMPLETE"] + found["PRUNED"] == 40
    assert found["PRUNED"] >= 10
    assert set(found) == {"COMPLETE", "PRUNED"}
    assert {row.outcome for row in heard.rows} == {"done", "pruned"}
    assert sorted(row.number for row in heard.rows) == list(range(40))
    assert not list((tmp_path / "trials").glob("*/adapter")), "a trial's weights take room that nobody needs"
    assert list(rows_of(trials.study)) == sorted(heard.rows, key=lambda row: row.number)


def test_one_worker_draws_the_same_again(tmp_path):
    """Interrupted after 5 trials or not."""
    drawn = []
    for name, parts in (("a", (12,)), ("b", (5, 12))):
        for wanted in parts:
            trials = prepared(tmp_path / name, toy_run(trials=wanted, startup_trials=4), num_workers=1)
            assert trials.run_all() == "done"
        drawn.append([trial.params for trial in trials.study.trials])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12


# ---- failures ------------------------------------------------------------------------------


def test_trials_that_fail_are_made_again_and_their_output_stays(tmp_path):
    heard = Heard()
    trials = prepared(tmp_path, toy_run(trials=12), heard, toy_trials.CRASH)
    assert trials.run_all() == "done"
    found = states(trials.study)
    assert found["COMPLETE"] + found["PRUNED"] == 12
    failed = {row.number: row.outcome for row in heard.rows if not row.counts}
    assert failed[1] == "RuntimeError: out of luck"
    assert failed[4] == "killed by SIGKILL"
    assert failed[7] == "ended with exit code 3"
    assert 'raise RuntimeError("out of luck")' in (tmp_path / "trials" / "0001.log").read_text()


def test_failures_one_after_another_end_the_sweep(tmp_path):
    trials = prepared(tmp_path, toy_run(max_failures=3), target=toy_trials.ALWAYS_CRASH)
    with pytest.raises(SweepError, match=r"3 trials failed one after another .*: RuntimeError: out of luck") as caught:
        trials.run_all()
    assert caught.value.exit_code == 1
    assert set(states(trials.study)) == {"FAIL"}  # none is left RUNNING


def test_settings_that_no_run_can_have_together_fail_by_name(tmp_path):
    space = {"adalora.initial_rank": {"type": "int", "low": 9, "high": 10}} | {
        "adalora.target_rank": {"type": "int", "low": 8, "high": 12}
    }
    heard = Heard()
    run = toy_run(trials=40, space=toy_trials.SPACE | space, startup_trials=40, max_failures=40)
    run = type(run)(**{**vars(run), "method": "adalora"})
    prepared(tmp_path, run, heard).run_all()
    refused = [row.outcome for row in heard.rows if not row.counts]
    assert refused
    assert all("leaves nothing to prune" in outcome for outcome in refused)


def test_a_value_that_is_not_finite_cannot_win(tmp_path):
    trials = prepared(tmp_path, toy_run(trials=6, direction="minimize"), target=toy_trials.INFINITE)
    trials.run_all()
    assert states(trials.study) == {"COMPLETE": 3, "PRUNED": 3}
    assert best_of(trials.study).value == 0.5


# ---- kill -9 -------------------------------------------------------------------------------


def test_4_workers_and_random_kills_give_40_trials_none_twice(tmp_path, seed):
    """Of processes, at random moments."""
    rng, over = random.Random(seed), threading.Event()
    trials = prepared(tmp_path, toy_run(0.1, max_failures=100), num_workers=4)

    def kill_some() -> None:
        while not over.wait(rng.uniform(0.05, 0.6)):
            for one in rng.sample(list(trials._running), min(1, len(trials._running))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        assert trials.run_all() == "done"
    finally:
        over.set()
        killer.join()
    found = states(trials.study)
    assert found["COMPLETE"] + found["PRUNED"] == 40
    assert found["FAIL"] > 0
    assert found["RUNNING"] == 0
    rows = list(rows_of(trials.study))
    assert len({tuple(row.params.values()) for row in rows if row.counts}) == 40
    assert {row.outcome for row in rows if not row.counts} == {"killed by SIGKILL"}


SWEEP = """
import sys
from pathlib import Path
if __name__ == "__main__":
    from tests.sweep.test_trials import prepared
    from tests.support.toy_trials import toy_run
    from fastpeft.sweep import worker
    worker.PRELOADED = []
    print(prepared(Path(sys.argv[1]), toy_run(0.4, trials=20), num_workers=4).run_all())
"""


def test_a_sweep_that_is_killed_goes_on_and_its_trials_die_with_it(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    folder = tmp_path / "s"
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen([sys.executable, str(script), str(folder)], env=env, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("trials/*/pid"))) < 7:
        assert process.poll() is None, (tmp_path / "out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    pids = [int(path.read_text()) for path in folder.glob("trials/*/pid")]
    until = time.monotonic() + 10
    while not all(map(is_gone, pids)):
        assert time.monotonic() < until, "a trial trains on without its sweep"
        time.sleep(0.05)
    heard = Heard()
    trials = prepared(folder, toy_run(0.4, trials=20), heard, num_workers=4)
    before = states(trials.study)
    assert before["RUNNING"] > 0
    assert trials.run_all() == "done"
    after = states(trials.study)
    assert after["COMPLETE"] + after["PRUNED"] == 20
    assert after["FAIL"] == before["RUNNING"] + before["FAIL"]
    assert after["RUNNING"] == 0
    assert sum("was left by a sweep that is gone" in line for line in heard.said) == before["RUNNING"]


def test_a_trial_of_a_sweep_elsewhere_is_left_alone_while_its_heart_beats(tmp_path):
    run = toy_run(trials=4)
    trials = prepared(tmp_path, run)
    others = [trials.study.ask() for _ in range(2)]
    for other, beaten_s in zip(others, (time.time(), time.time() - 1000)):
        other.set_user_attr(LEASE, Lease("another host", 1, 0.0).to_json())
        other.set_user_attr(HEARTBEAT, beaten_s)

    def end_soon() -> None:
        while len(counted(trials.study)) < 3:
            time.sleep(0.02)
        trials.study.tell(others[0], 0.5)

    thread = threading.Thread(target=end_soon)
    thread.start()
    assert trials.run_all() == "done"  # one of the 4 is the other's, and was waited for
    thread.join()
    assert [trials.study.trials[other.number].state for other in others] == [TrialState.COMPLETE, TrialState.FAIL]
    assert len(counted(trials.study)) == 4


def test_a_trial_that_another_sweep_has_just_made_is_not_taken_for_dead(tmp_path, monkeypatch):
    """Between making a trial and saying whose it is, a sweep draws its values."""
    run = toy_run(trials=3)
    trials = prepared(tmp_path, run, is_shared=True)
    new, old = trials.study.ask(), trials.study.ask()
    trials._bury_dead()
    assert states(trials.study) == {"RUNNING": 2}
    new.set_user_attr(LEASE, Lease("another host", 1, 0.0).to_json())
    new.set_user_attr(HEARTBEAT, time.time())
    monkeypatch.setattr("fastpeft.sweep.lease.DEAD_AFTER_S", -1.0)
    monkeypatch.setattr("fastpeft.sweep.trials.is_alive", lambda attributes: LEASE in attributes)
    trials._bury_dead()
    assert [trial.state for trial in trials.study.trials] == [TrialState.RUNNING, TrialState.FAIL]
    assert old.number == 1
    alone = prepared(tmp_path / "alone", run)
    alone.study.ask()
    alone._bury_dead()
    assert states(alone.study) == {"FAIL": 1}


def test_a_trial_that_ends_after_another_sweep_took_it_for_dead_is_left_out(tmp_path):
    heard, taken = Heard(), []

    def take_the_first(row: TrialRow) -> None:
        if not taken:
            taken.append(next(t for t in trials.study.trials if t.state == TrialState.RUNNING))
            trials.study.tell(taken[0].number, state=TrialState.FAIL)

    heard._on_trial = take_the_first
    trials = prepared(tmp_path, toy_run(0.2, trials=6, pruner="none"), heard)
    assert trials.run_all() == "done"
    assert trials.study.trials[taken[0].number].state == TrialState.FAIL
    assert f"trial {taken[0].number} was taken for dead by another sweep: its result is left out" in heard.said
    assert len(counted(trials.study)) == 6


# ---- budgets and interruptions -------------------------------------------------------------


def test_no_trial_begins_that_would_outlast_the_sweeps_budget(tmp_path):
    run = toy_run(0.4, budget="4s", pruner="none")
    trials = prepared(tmp_path, run, num_workers=1)
    began = time.monotonic()
    assert trials.run_all() == "budget"
    took = [trial.user_attrs[DURATION_S] for trial in counted(trials.study)]
    assert 1 <= len(took) < 40
    assert time.monotonic() - began < 4 + max(took)
    assert states(trials.study).keys() == {"COMPLETE"}
    assert prepared(tmp_path, run, spent_s=4.0).run_all() == "budget"  # what was spent before counts
    assert len(counted(trials.study)) == len(took)


def test_joules_are_summed_over_the_trials(tmp_path):
    trials = prepared(tmp_path, toy_run(budget="35J"), target=toy_trials.TEN_JOULES, num_workers=1)
    assert trials.run_all() == "budget"
    assert len(counted(trials.study)) == 4


def test_a_trial_that_takes_too_many_joules_is_not_the_best(tmp_path):
    """The toy's energy is its batch size."""
    trials = prepared(tmp_path, toy_run(trials=30, max_trial_energy_j=20), target=toy_trials.COSTLY)
    assert trials.run_all() == "done"
    best = best_of(trials.study)
    assert best.params[BATCH] == 8
    assert any(trial.params[BATCH] == 32 and (trial.value or 0) > best.value for trial in trials.study.trials)


def test_an_interrupted_trial_goes_on_where_it_was(tmp_path):
    """SIGTERM makes the toy leave a checkpoint of its evaluations."""
    stopped = False
    heard = Heard()
    trials = prepared(
        tmp_path, toy_run(1.2, trials=3, pruner="none"), heard, toy_trials.RESUMABLE, stop=lambda: stopped
    )

    def stop_soon() -> None:
        nonlocal stopped
        while not list(tmp_path.glob("trials/*/evaluations")):
            time.sleep(0.02)
        stopped = True

    thread = threading.Thread(target=stop_soon)
    thread.start()
    assert trials.run_all() == "stopped"
    thread.join()
    paused = [trial for trial in trials.study.trials if trial.user_attrs.get(PAUSED)]
    assert paused
    assert all(trial.state is TrialState.RUNNING for trial in paused)
    again = prepared(tmp_path, toy_run(1.2, trials=3, pruner="none"), heard, toy_trials.RESUMABLE)
    assert again.run_all() == "done"
    assert states(again.study) == {"COMPLETE": 3}
    for trial in paused:
        log = (tmp_path / "trials" / f"{trial.number:04d}.log").read_text().split()
        assert log == ["1", "2", "3", "4"], "each evaluation is made once"
        assert again.study.trials[trial.number].user_attrs[OUTCOME] == "done"
