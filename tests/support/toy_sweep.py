"""A sweep over trials that train nothing, as one of several machines runs it over a storage of their own:

    python -m tests.support.toy_sweep FOLDER URL [--trials 24] [--seconds 0.3] [--beat-s 20] [--dead-after-s 120]

Prints what the sweep says, and at the end why it was over. A study that is not there is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastpeft.config import RunConfig
from fastpeft.sweep import lease, trials, worker
from fastpeft.sweep.space import identity
from fastpeft.sweep.study import open_storage, open_study
from fastpeft.sweep.trial_rows import Standing, TrialRow
from tests.support.toy_trials import QUADRATIC, toy_run

STUDY = "toy"


class Printing:
    """A Listener."""

    def say(self, message: str) -> None:
        print(message, flush=True)

    def on_trial(self, row: TrialRow) -> None:
        print(f"trial {row.number}: {row.outcome}", flush=True)

    def on_standing(self, standing: Standing) -> None:
        pass


def wanted(num_trials: int, seconds: float) -> RunConfig:
    """Trials of so many seconds each."""
    return toy_run(seconds, trials=num_trials, max_failures=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("url")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--beat-s", type=float, default=lease.HEARTBEAT_EVERY_S)
    parser.add_argument("--dead-after-s", type=float, default=lease.DEAD_AFTER_S)
    given = parser.parse_args()
    worker.PRELOADED = []  # no trial needs torch
    trials.HEARTBEAT_EVERY_S, lease.DEAD_AFTER_S = given.beat_s, given.dead_after_s
    given.folder.mkdir(exist_ok=True)
    run = wanted(given.trials, given.seconds)
    study, _ = open_study(open_storage(given.url, given.folder), STUDY, run.optuna, identity(run))
    options = {"num_workers": 2, "target": QUADRATIC, "is_shared": True}
    print(trials.Trials(run, study, given.folder, Printing(), **options).run_all(), flush=True)


if __name__ == "__main__":
    main()
