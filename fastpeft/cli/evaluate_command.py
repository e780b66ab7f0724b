"""The `fastpeft evaluate` command. Imports are inside it, so that --help answers at once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.cli.runs_commands import ResultsDir
from fastpeft.compare.found_runs import Found
from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder


def evaluate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs, groups, or ENTITY/PROJECT/RUN of W&B; all runs when absent."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The method that the others are compared with; lora when absent.", show_default=False),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Say when each run reached this metric, at most 1.", show_default=False)
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Load each run's weights with PEFT alone, and score them again first.")
    ] = False,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Score the run's weights on this set of word problems; repeatable."),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="--on, --rescore: the last weights, not the best.")] = False,
    pass_at: Annotated[
        int | None,
        typer.Option(help="--on: also pass@k for this k; 0: none; when absent what the run has.", show_default=False),
    ] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Figures and metrics of runs, and a report that compares them: means over seeds, tests, effect sizes.

    With --on the scores of one run on several sets.
    """
    from fastpeft.cli.safe_console import SafeConsole

    console = SafeConsole(highlight=False, width=None if sys.stdout.isatty() else 250)
    if on:
        if len(runs or []) != 1:
            raise UserError("--on scores one run: name it")
        others = {"--target": target is not None, "--baseline": baseline is not None, "--rescore": rescore}
        if given := [name for name, is_given in others.items() if is_given]:
            raise UserError(f"--on scores the weights of a run, and compares none: leave {', '.join(given)} out")
        _evaluate_on(console, (runs or [])[0], on, results_dir, last, pass_at)
        return
    if pass_at is not None or (last and not rescore):
        raise UserError("--last and --pass-at go with --on PATH: which sets are to be scored?")
    from fastpeft.compare.found_runs import find_runs

    found = find_runs(runs or [], results_dir, lambda path: _fetch(path, results_dir))
    if rescore:
        _rescore([one.folder for one in found if one.folder is not None], last)
    _report(console, found, results_dir, target, baseline)


def _fetch(path: str, results_dir: Path) -> Path:
    from fastpeft.trackers.wandb_history import fetch_run

    print(f"reading {path} from W&B")
    return fetch_run(path, results_dir / "comparison" / "wandb")


def _rescore(folders: list[RunFolder], last: bool) -> None:
    """Score runs again. A run that fails is reported, and the others continue."""
    from fastpeft.export.rescore import rescore

    for folder in folders:
        try:
            print(f"{folder.path.name}: {rescore(folder, print, 'last' if last else None)}")
        except UserError as error:
            print(f"{folder.path.name}: not scored again: {error}", file=sys.stderr)


def _report(console: Any, found: list[Found], results_dir: Path, target: float | None, baseline: str | None) -> None:
    from fastpeft.cli.result_tables import comparison_table, left_out_table
    from fastpeft.compare.report import report

    made = report(found, results_dir, target, baseline)
    console.print(comparison_table(made.comparison))
    left_out = [one for one in made.found if not one.counts]
    if left_out:
        console.print("", left_out_table(left_out), sep="\n")
    print(f"\nwritten      {made.folder}, and metrics.json and figures/ in each run's folder")
    print(f"read         {made.folder / 'report.html'}")


def _evaluate_on(console: Any, run: str, on: list[str], results_dir: Path, last: bool, pass_at: int | None) -> None:
    from fastpeft.cli.result_tables import sets_table
    from fastpeft.compare.problem_sets import SETS, make_plan, score_sets

    plan = make_plan(run, on, results_dir, last, pass_at)
    try:
        scores = score_sets(plan, print)
    except KeyboardInterrupt:
        print("interrupted; the sets that were scored are kept", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    console.print(sets_table(scores))
    step = "" if plan.step is None else f", of step {plan.step:,}"
    print(f"\nwritten      {plan.folder.path / SETS}: {plan.which} weights{step}")
