"""What a sweep prints: each trial as it ends, the best so far, what is left."""

from __future__ import annotations

import io

from optuna.trial import create_trial
from rich.console import Console

from fastpeft.cli.sweep_console import SweepConsole
from fastpeft.runs.store import Result
from fastpeft.sweep.best import BestRun
from fastpeft.sweep.sweep import Outcome
from fastpeft.sweep.trial_rows import Standing, TrialRow
from tests.support.toy_trials import BATCH, RATE, toy_run


def printed(*, is_terminal: bool = False, **optuna) -> tuple[SweepConsole, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=130, force_terminal=is_terminal, color_system=None, highlight=False)
    return SweepConsole(toy_run(**optuna), console), out


def row(number: int, outcome: str, value: float | None, **more) -> TrialRow:
    params = {RATE: 1.23456e-4, BATCH: 32}
    return TrialRow(number, outcome, value, params, 12.34, more.get("energy_j"), counts=outcome in ("done", "pruned"))


def test_a_line_a_trial_and_a_failure_with_its_cause():
    console, out = printed()
    console.on_trial(row(0, "done", 0.5, energy_j=1234.0))
    console.on_trial(row(1, "pruned", 0.25))
    console.on_trial(row(2, "killed by [SIGKILL]", None))
    head, *lines = out.getvalue().splitlines()
    assert head.split() == ["trial", "outcome", "value", "seconds", "joules", RATE, BATCH]
    assert lines[0].split() == ["0", "done", "0.5000", "12.3", "1,234", "0.0001235", "32"]
    assert lines[1].split() == ["1", "pruned", "0.2500", "12.3", "-", "0.0001235", "32"]
    assert lines[2].split()[:3] == ["2", "failed", "-"]
    assert lines[3].strip() == "killed by [SIGKILL]; it is made again"


def standing(**values) -> Standing:
    best = create_trial(value=0.75)
    best.number = 7
    whole = {"counted": 3, "wanted": 40, "running": 2, "best": best, "spent_s": 100.0, "spent_j": None} | values
    return Standing(**whole)


def test_what_is_left_of_the_budget():
    console, out = printed(budget="10m")
    console.on_standing(standing())
    console.on_standing(standing(counted=4))  # too soon for another line in a file
    assert out.getvalue() == "3 of 40 trials, 2 running, best 0.7500 of trial 7, 100 s spent, 500 s left\n"
    console, out = printed(budget="2kJ")
    console.on_standing(standing(spent_j=1500.0, best=None))
    assert out.getvalue() == "3 of 40 trials, 2 running, 100 s, 1,500 J spent, 500 J left\n"


def test_in_a_terminal_the_standing_is_one_live_line():
    with printed(is_terminal=True)[0] as console:
        console.on_standing(standing())
        console.on_standing(standing(counted=5))
        console.say("\nthe best settings")
    console, out = printed(is_terminal=True)
    with console:
        console.on_standing(standing())
        console.on_trial(row(0, "done", 0.5))
    assert "0.5000" in out.getvalue()


def test_the_end_names_the_best_settings_and_their_full_trainings():
    console, out = printed()
    facts = {"run_id": "r", "status": "done", "method": "lora", "metric": {"name": "accuracy", "value": 0.8}}
    results = [Result(name=f"s-best0007-seed{seed}", seed=seed, **facts) for seed in (1, 2)]
    console.close(Outcome("done", 40, BestRun(7, 0.75, {RATE: 1e-3, BATCH: 32}, results), True, None))
    text = out.getvalue()
    assert "0.7500 of trial 7" in text
    assert "training.learning_rate  0.001" in text
    assert "0.8000 ± " in text
    assert "STAND-IN" in text
    console, out = printed()
    console.close(Outcome("stopped", 4, None, False, 2))
    assert out.getvalue() == ""
