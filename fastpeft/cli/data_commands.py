"""The `fastpeft data` commands. Imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from fastpeft.errors import UserError

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at what a run reads.")

OPENS, CLOSES = "\u27e6", "\u27e7"
"""Brackets around trained tokens, if there are no colours."""


@data.callback()
def _group() -> None: ...


@data.command("show")
def data_show(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's, such as dataset.path=FILE."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="A preset's name, or the path of a YAML file.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="So many of the first training rows.")] = 1,
) -> None:
    """The first training rows as the model reads them, with what is learned marked. No model is loaded."""
    if run is None:
        raise UserError("data show needs --run: a YAML file, or a preset's name")
    from rich.text import Text

    from fastpeft.cli.safe_console import SafeConsole, shown
    from fastpeft.config import load_run

    config = load_run(run, overrides or [])
    from fastpeft.models.backbone import load_tokenizer
    from fastpeft.tasks import load_task
    from fastpeft.trainer.resolve import resolve

    console = SafeConsole(highlight=False, soft_wrap=True)
    resolved = resolve(config)
    if resolved.stand_in:
        console.print(f"STAND-IN: {resolved.run.model.name} on {resolved.run.dataset.name} ({resolved.reason})")
    task = load_task(resolved.run.dataset, resolved.run.evaluation, resolved.run.training.seed)
    for note in task.notes:
        console.print(f"note: {note}", markup=False)
    first = task.first_rows(load_tokenizer(resolved.run.model), resolved.run.model.name, rows)
    for note in first.notes:
        console.print(f"note: of the rows below: {note}", markup=False)
    marks = ("", "") if console.is_terminal else (OPENS, CLOSES)
    how = "dim is read, bright is learned" if console.is_terminal else f"what is learned stands in {OPENS} {CLOSES}"
    for number, pieces in enumerate(first.rows, 1):
        console.print(f"\nrow {number}: {how}", style="bold")
        parts = (
            (f"{marks[0]}{shown(text)}{marks[1]}", "bold bright_green") if is_learned else (shown(text), "dim")
            for text, is_learned in pieces
        )
        console.print(Text.assemble(*parts))
