"""Sweeps over a PostgreSQL server, where one can be started: two at once, as on two machines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpeft.sweep.space import identity
from fastpeft.sweep.study import best_of, counted, open_storage, open_study
from tests.support import network_hosts, postgres
from tests.support.network_hosts import Host
from tests.support.toy_sweep import STUDY, wanted

ROOT = Path(__file__).resolve().parents[2]
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WANTED = 24


def toy_sweep(folder: Path, url: str, *options: object) -> list[str]:
    return [sys.executable, "-m", "tests.support.toy_sweep", str(folder), url, *map(str, options)]


def trial_folders(*sweeps: Path) -> list[str]:
    return [path.name for sweep in sweeps for path in (sweep / "trials").glob("*/")]


def wait_for(condition: Callable[[], object], within_s: float, told: Callable[[], str]) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, told()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def url():
    reason = postgres.why_not()
    if reason:
        pytest.skip(reason)
    with postgres.server() as url:
        yield url


@pytest.mark.soak
def test_two_sweeps_at_once_and_one_killed_give_the_trials_that_were_asked_for(url, tmp_path):
    def start(name: str) -> subprocess.Popen:
        log = (tmp_path / f"{name}.log").open("a")
        command = toy_sweep(tmp_path / name, url, "--trials", WANTED)
        return subprocess.Popen(command, env=os.environ | ENV, stdout=log, stderr=log)

    run = wanted(WANTED, 0.3)
    study, is_new = open_study(open_storage(url, tmp_path), STUDY, run.optuna, identity(run))  # before the sweeps start
    assert is_new
    one, two = start("one"), start("two")
    wait_for(
        lambda: len(list((tmp_path / "one").glob("trials/*/pid"))) >= 3 or one.poll() is not None,
        120,
        lambda: (tmp_path / "one.log").read_text(),
    )
    assert one.poll() is None, (tmp_path / "one.log").read_text()
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
    folders = trial_folders(tmp_path / "one", tmp_path / "two")
    assert len(set(folders)) == len(folders), "two sweeps had one trial"


# ---- hosts of their own ----------------------------------------------------------------------

NUM_TRIALS, TRIAL_S, BEAT_S, DEAD_AFTER_S = 40, 4.0, 0.5, 12.0
SHORT_CUT_S, LONG_CUT_S = 3.0, 24.0
"""Shorter than the silence after which a host is taken for dead, and longer."""


class Hosts:
    """Two hosts that sweep over the database of a third, and what has become of their trials."""

    def __init__(self, folder: Path, url: str, address: str) -> None:
        self._folder, self._address = folder, address
        self._processes: list[subprocess.Popen] = []
        run = wanted(NUM_TRIALS, TRIAL_S)
        self.study, _ = open_study(open_storage(url, folder), STUDY, run.optuna, identity(run))

    def start(self, host: Host) -> subprocess.Popen:
        options = ("--trials", NUM_TRIALS, "--seconds", TRIAL_S, "--beat-s", BEAT_S, "--dead-after-s", DEAD_AFTER_S)
        command = toy_sweep(self._folder / host.name, self._address, *options)
        process = host.start(command, (self._folder / f"{host.name}.log").open("a"), ENV)
        self._processes.append(process)
        return process

    def states(self) -> Counter[str]:
        return Counter(trial.state.name for trial in self.study.get_trials(deepcopy=False))

    def num_ended(self, host: Host) -> int:
        """Trials of this host that came to their end."""
        mine = set(trial_folders(self._folder / host.name))
        return sum(f"{trial.number:04d}" in mine for trial in counted(self.study))

    def told(self) -> str:
        logs = [f"---- {path.name}\n{path.read_text()}" for path in self._folder.glob("*.log")]
        return "\n".join([*logs, str(self.states())])

    def wait_for_more(self, host: Host) -> None:
        before = self.num_ended(host)
        self.wait_for(lambda: self.num_ended(host) > before)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """While both sweeps run."""
        wait_for(lambda: condition() or self.has_ended(), 300, self.told)
        assert not self.has_ended(), self.told()

    def has_ended(self) -> bool:
        return any(process.poll() is not None for process in self._processes)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hosts_a_network_that_is_cut_and_a_host_that_dies(tmp_path):
    reason = postgres.why_not() or network_hosts.why_not()
    if reason:
        pytest.skip(reason)
    with network_hosts.hosts("db", "one", "two") as (db, one, two), postgres.server(db) as url:
        sweeps = Hosts(tmp_path, url, postgres.url_at(db))
        first, second = sweeps.start(one), sweeps.start(two)
        sweeps.wait_for_more(one)
        sweeps.wait_for_more(two)

        one.unplug()
        time.sleep(SHORT_CUT_S)
        one.plug_in()
        sweeps.wait_for_more(one)
        assert sweeps.states()["FAIL"] == 0, sweeps.told()
        print(f"a cut of {SHORT_CUT_S:g} s: {dict(sweeps.states())}")

        one.unplug()
        time.sleep(LONG_CUT_S)
        num_taken_for_dead = sweeps.states()["FAIL"]
        assert num_taken_for_dead >= 1, sweeps.told()
        one.plug_in()
        sweeps.wait_for_more(one)
        print(f"a cut of {LONG_CUT_S:g} s: {dict(sweeps.states())}")

        sweeps.wait_for(lambda: sweeps.states()["RUNNING"] == 4)
        network_hosts.switch_off(second)
        wait_for(lambda: not network_hosts.is_left(tmp_path / "two"), 30, sweeps.told)
        assert first.wait(900) == 0, sweeps.told()
        found = sweeps.states()
        print(f"a host switched off: {dict(found)}, best {best_of(sweeps.study)}")
        assert found["FAIL"] >= num_taken_for_dead + 1, sweeps.told()
        assert sweeps.start(two).wait(300) == 0, sweeps.told()
        assert sweeps.states() == found, "a host that comes back finds nothing left to do"

    assert found["RUNNING"] == 0
    assert NUM_TRIALS <= found["COMPLETE"] + found["PRUNED"] <= NUM_TRIALS + 1  # two may ask for the last one at once
    folders = trial_folders(tmp_path / "one", tmp_path / "two")
    assert len(set(folders)) == len(folders), "two hosts had one trial"
    ended = (tmp_path / "one.log").read_text() + (tmp_path / "two.log").read_text()
    told = Counter(re.findall(r"trial (\d+): (?:done|pruned)", ended))
    assert set(told.values()) == {1}, "a trial ended twice"
