"""Sweeps over a PostgreSQL server, where one can be started: two at once, as on two machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from fastpeft.sweep.space import identity
from fastpeft.sweep.study import best_of, open_storage, open_study
from tests.support import postgres
from tests.support.toy_trials import toy_run

ROOT = Path(__file__).resolve().parents[2]
WANTED = 24
SWEEP = f"""
import sys
from pathlib import Path
if __name__ == "__main__":
    from fastpeft.sweep import worker
    from fastpeft.sweep.space import identity
    from fastpeft.sweep.study import open_storage, open_study
    from fastpeft.sweep.trials import Trials
    from tests.support.toy_trials import QUADRATIC, toy_run
    from tests.sweep.test_trials import Heard

    worker.PRELOADED = []
    folder, url = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(exist_ok=True)
    run = toy_run(0.3, trials={WANTED}, max_failures=100)
    study, _ = open_study(open_storage(url, folder), "toy", run.optuna, identity(run))
    print(Trials(run, study, folder, Heard(), num_workers=2, target=QUADRATIC).run_all(), flush=True)
"""


@pytest.fixture(scope="module")
def url():
    reason = postgres.why_not()
    if reason:
        pytest.skip(reason)
    with postgres.server() as url:
        yield url


@pytest.mark.soak
def test_two_sweeps_at_once_and_one_killed_give_the_trials_that_were_asked_for(url, tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)

    def start(name: str) -> subprocess.Popen:
        log = (tmp_path / f"{name}.log").open("a")
        command = [sys.executable, str(script), str(tmp_path / name), url]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)

    run = toy_run(0.3, trials=WANTED, max_failures=100)
    study, is_new = open_study(open_storage(url, tmp_path), "toy", run.optuna, identity(run))  # before the sweeps start
    assert is_new
    one, two = start("one"), start("two")
    until = time.monotonic() + 120
    while len(list((tmp_path / "one").glob("trials/*/pid"))) < 3:
        assert one.poll() is None, (tmp_path / "one.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert two.wait(120) == 0, (tmp_path / "two.log").read_text()
    again = start("one")
    assert again.wait(120) == 0, (tmp_path / "one.log").read_text()
    found = Counter(trial.state.name for trial in study.get_trials(deepcopy=False))
    print(f"PostgreSQL: {dict(found)}, best {best_of(study)}")
    assert found["COMPLETE"] + found["PRUNED"] >= WANTED
    assert found["RUNNING"] == 0
    assert found["FAIL"] >= 1
    folders = [path.name for name in ("one", "two") for path in (tmp_path / name / "trials").glob("*/")]
    assert len(set(folders)) == len(folders), "two sweeps had one trial"
