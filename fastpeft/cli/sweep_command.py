"""`fastpeft sweep`. Imports are inside, so that --help answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpeft.cli.run_options import results_option
from fastpeft.cli.runs_commands import ResultsDir
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from fastpeft.config import RunConfig
    from fastpeft.sweep.sweep import Outcome, Plan

EXIT_DIVERGED = 4


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's, such as optuna.seeds=0,1,2."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="A preset's name, or the path of a YAML file.")] = None,
    trials: Annotated[
        int | None, typer.Option(help="Same as optuna.trials=N: so many that end or are pruned.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Trials side by side, a process each.")] = 1,
    budget: Annotated[
        str | None, typer.Option(help="What all trials together may spend: 2h or 50kJ. Same as optuna.budget.")
    ] = None,
    trial_budget: Annotated[
        str | None, typer.Option(help="What one trial may spend, as train's --budget. Same as optuna.trial_budget.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="An Optuna URL, such as postgresql://...; a journal in the folder when absent.")
    ] = None,
    mode: Annotated[str, typer.Option(help="full, or trial: two trials of two steps, then the best one.")] = "full",
    results_dir: ResultsDir = Path("results"),
    name: Annotated[
        str | None, typer.Option(help="The sweep's folder and study; RUN-sweep when absent. One that is there goes on.")
    ] = None,
    trials_only: Annotated[
        bool, typer.Option("--trials-only", help="Do not train the best settings in full afterwards.")
    ] = False,
    no_stand_in: Annotated[
        bool, typer.Option("--no-stand-in", help="Fail where model or data cannot be reached.")
    ] = False,
) -> None:
    """Search a run's optuna.space, then train the best settings in full. The same command goes on with a sweep."""
    config = _load(run, overrides or [], trials, budget, trial_budget, mode)
    from fastpeft.cli.sweep_console import SweepConsole
    from fastpeft.sweep.sweep import Plan, StopSignals
    from fastpeft.sweep.sweep import sweep as run_sweep

    plan = Plan(
        run=config,
        name=name or f"{config.run_id}-sweep",
        results_dir=results_dir,
        storage=storage,
        num_workers=workers,
        allow_stand_in=not no_stand_in,
        trains_best=not trials_only,
    )
    with SweepConsole(config) as console:
        outcome = run_sweep(plan, console, StopSignals())
        console.close(outcome)
    _end(plan, outcome)


def _load(
    run: str | None, overrides: list[str], trials: int | None, budget: str | None, trial_budget: str | None, mode: str
) -> RunConfig:
    from fastpeft.config import load_run, preset_names, trial_run, with_values

    if mode not in ("trial", "full"):
        raise UserError(f"--mode {mode!r}: expected trial or full")
    if run is None:
        raise UserError(f"sweep needs --run: a YAML file or one of {', '.join(preset_names())}")
    options: dict[str, Any] = {"trials": trials, "budget": budget, "trial_budget": trial_budget}
    given = [f"optuna.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    config = load_run(run, [*overrides, *given])
    if mode == "full":
        return config
    return with_values(trial_run(config), {"optuna.trials": 2, "optuna.trial_budget": None})


def _end(plan: Plan, outcome: Outcome) -> None:
    """Print where the results are, and exit with the code if it is not 0."""
    print(f"\nwritten      {plan.folder}: sweep.json, trials.csv, best.yaml, figures")
    if outcome.status == "stopped":
        print(f"go on with   {shlex.join(['fastpeft', *sys.argv[1:]])}")
        raise typer.Exit(128 + (outcome.signal or 0))
    results = outcome.best.results if outcome.best else []
    if results:
        print(f"look again   fastpeft runs ls{results_option(plan.results_dir)}")
    if any(result.status == "diverged" for result in results):
        raise typer.Exit(EXIT_DIVERGED)
