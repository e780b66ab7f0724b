"""The `fastpeft runs` commands. Imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastpeft.errors import UserError

runs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at runs and run files.")

ResultsDir = Annotated[Path, typer.Option(help="Where the runs' folders are.")]
Best = Annotated[
    bool | None, typer.Option("--best/--last", help="Which weights; the best, if there are any, when absent.")
]


def which_weights(best: bool | None) -> Literal["best", "last"] | None:
    """The weights that the option `Best` selects; None if it is absent."""
    return None if best is None else ("best" if best else "last")


@runs.command("ls")
def runs_ls(results_dir: ResultsDir = Path("results")) -> None:
    """Every run under the results folder."""
    from fastpeft.cli.result_tables import runs_table
    from fastpeft.cli.safe_console import SafeConsole
    from fastpeft.runs.store import list_runs

    folders = list(list_runs(results_dir))
    if not folders:
        print(f"no runs in {results_dir}")
        return
    width = None if sys.stdout.isatty() else 250  # do not fold names in a file
    SafeConsole(highlight=False, width=width).print(runs_table(folders))


@runs.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="A run's name, or a preset.")],
    results_dir: ResultsDir = Path("results"),
) -> None:
    """A run's result and settings, or a preset with its defaults spelt out."""
    import yaml

    from fastpeft.cli.result_tables import closing
    from fastpeft.cli.safe_console import SafeConsole, shown
    from fastpeft.config import load_run, preset_names, run_values
    from fastpeft.runs.store import RunFolder

    folder = RunFolder.at(results_dir, run)
    if folder.config.is_file():
        result = folder.read_result()
        if result is not None:
            SafeConsole(highlight=False).print(closing(result, folder))
            print()
        print(shown(folder.config.read_text(errors="replace")), end="")
    elif run in preset_names():
        print(yaml.safe_dump(run_values(load_run(run)), sort_keys=False), end="")
    else:
        names = sorted(p.parent.name for p in results_dir.glob("*/run.yaml"))
        raise UserError(
            f"{run}: no run in {results_dir} and no preset has this name; "
            f"runs: {', '.join(names) or 'none'}; presets: {', '.join(preset_names())}"
        )


@runs.command("validate")
def runs_validate(
    file: Annotated[str, typer.Argument(help="A YAML file or a preset's name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Check a run file without training."""
    from fastpeft.config import load_run

    run = load_run(file, overrides or [])
    print(f"{file}: valid ({run.method} on {run.model.name}, {run.dataset.name})")


@runs.command("schema")
def runs_schema() -> None:
    """JSON schema of a run file, for editors."""
    from fastpeft.config.load import json_schema

    print(json.dumps(json_schema(), indent=2))
