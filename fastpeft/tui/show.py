"""Run the terminal UI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastpeft.errors import UserError
from fastpeft.tui.steer import Order, start


def show(results_dir: Path, order: Order | None = None) -> None:
    """Run the TUI until the user quits. With an order, start that trainer first and show its run.

    Raises:
        UserError: there is no terminal; the folder cannot be read; the trainer cannot be started.
    """
    in_browser = "TEXTUAL_DRIVER" in os.environ  # textual serve
    if not in_browser and not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UserError("the terminal UI needs a terminal; `fastpeft runs ls` prints the runs anywhere")
    try:
        os.scandir(results_dir).close()
    except FileNotFoundError:
        pass  # it may be created later
    except OSError as error:
        raise UserError(f"{results_dir} cannot be read: {error.strerror}") from None
    from fastpeft.tui.program import FastpeftApp

    launch = None if order is None else start(order, results_dir)
    app = FastpeftApp(results_dir, launch)
    app.run()
    if app.return_code:
        raise SystemExit(app.return_code)
