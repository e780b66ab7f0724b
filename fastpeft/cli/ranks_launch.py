"""`fastpeft train` on several ranks: starting them, and running as one of them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from fastpeft.cli.ctrl_c import ctrl_c_ends_at_once
from fastpeft.errors import UserError
from fastpeft.launched import place
from fastpeft.runs.store import RunFolder

if TYPE_CHECKING:
    from fastpeft.tui.steer import Order


def refuse_with_ranks(ranks: int | None, max_restarts: int, options: Mapping[str, bool]) -> None:
    """Check the options about ranks.

    Args:
        options: option that is incompatible with several ranks -> whether it was given.

    Raises:
        UserError: the options are incompatible.
    """
    launched = place()
    if launched.size > 1 and ranks is not None:
        raise UserError("--ranks under torchrun: the ranks are there already; leave --ranks out")
    if max_restarts and ranks in (None, 1):
        raise UserError("--max-restarts needs --ranks: a single process is resumed with --resume")
    given = [option for option, is_given in options.items() if is_given]
    if given and (launched.size > 1 or (ranks or 1) > 1):
        raise UserError(f"{given[0]} does not go with several ranks: leave it out, or train on one rank")


def launch_ranks(order: Order, ranks: int, max_restarts: int, results_dir: Path) -> int:
    """Train on `ranks` processes of this host. Returns the exit code."""
    if not order.resume:
        RunFolder.at(results_dir, order.name).check_free()
    with ctrl_c_ends_at_once():
        typer.secho(f"loading torch in {ranks} ranks", dim=True)
        from fastpeft.trainer.launching import launch

    return launch(order.arguments(results_dir), ranks, max_restarts, order.name)


def resumes_by_itself(results_dir: Path, name: str | None) -> bool:
    """Whether the launcher has restarted this rank, and the previous attempt left a run to resume.

    Raises:
        UserError: restarts are on without --name, so that none could find the run.
    """
    launched = place()
    if launched.max_restarts and name is None:
        raise UserError(
            "--max-restarts of torchrun needs --name: a restart could not find the run that it is to resume"
        )
    return launched.restarts > 0 and name is not None and RunFolder.at(results_dir, name).config.is_file()


def end_rank(error: Exception) -> NoReturn:
    """End this process, one of several ranks. Only the rank that failed first reports its error, and all ranks exit
    with its code. Nothing is waited for, since a pending collective may never end."""
    from fastpeft.ranks import fails_first

    is_first, code = fails_first(error.exit_code if isinstance(error, UserError) else 1)
    if is_first and isinstance(error, UserError):
        print(f"fastpeft: {error}", file=sys.stderr)
    elif is_first:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
