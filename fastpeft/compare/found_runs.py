"""Finds the runs of a comparison. Those that cannot be counted are kept with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastpeft.errors import UserError
from fastpeft.runs.store import Result, RunFolder, list_runs

_NOTES = {
    "running": "is still running: its score is none of a whole budget",
    "dead": "crashed: it says that it is running, and has lost its heartbeat; continue it with --resume",
    "stopped": "was stopped before the end of its budget; continue it with --resume",
    "diverged": "diverged: 20 steps in a row were not finite",
    "failed": "failed",
    "no result": "ended while it was set up",
}


@dataclass(frozen=True)
class Found:
    name: str
    folder: RunFolder | None
    result: Result | None
    status: str
    """As RunFolder.status, or missing."""
    note: str = ""
    """Why the run does not count; empty if it does."""
    remark: str = ""
    """Remark on a run that counts, for readers of the comparison."""

    @property
    def counts(self) -> bool:
        """Whether the run is part of means and tests: it is done and has a score."""
        return not self.note


def find_runs(names: list[str], results_dir: Path, fetch: Callable[[str], Path] | None = None) -> list[Found]:
    """Find runs by name, group, path of their folder, or ENTITY/PROJECT/RUN of W&B. Without names, every run is found.
    Duplicates are removed.

    Args:
        fetch: downloads a W&B run and returns its run folder.

    Raises:
        UserError: none of the runs has a score.
    """
    there = [_found(folder) for folder in list_runs(results_dir)]
    chosen = [one for name in names for one in _named(name, there, results_dir, fetch)] if names else there
    found = list({one.folder.path.resolve() if one.folder else one.name: one for one in chosen}.values())
    if not any(one.result is not None and "value" in one.result.metric for one in found):
        said = "; ".join(f"{one.name}: {one.note}" for one in found if one.note)
        raise UserError(said or f"no run in {results_dir}: nothing has been evaluated yet")
    return found


def _named(name: str, there: list[Found], results_dir: Path, fetch: Callable[[str], Path] | None) -> Iterator[Found]:
    own = [one for one in there if one.name == name]
    own = own or [one for one in there if one.result is not None and one.result.group == name]
    folder = Path(name).expanduser()
    if own:
        yield from own
    elif (folder / "run.yaml").is_file():
        yield _found(RunFolder(folder))
    elif fetch is not None and is_wandb_path(name):
        yield _found(RunFolder(fetch(name)))
    else:
        groups = {one.result.group for one in there if one.result is not None and one.result.group}
        known = ", ".join(sorted({one.name for one in there} | groups)) or "none"
        yield Found(name, None, None, "missing", f"there is no such run or group in {results_dir}; there are: {known}")


def is_wandb_path(name: str) -> bool:
    """Whether `name` has the form ENTITY/PROJECT/RUN."""
    parts = name.split("/")
    return len(parts) == 3 and all(parts) and not name.startswith((".", "~"))


def _found(folder: RunFolder) -> Found:
    result, status = folder.read_result(), folder.status()
    note = "" if status == "done" else _NOTES.get(status, status)
    if not note and (result is None or "value" not in result.metric):
        note = "nothing has been evaluated yet"
    return Found(folder.path.name, folder, result, status, note)
