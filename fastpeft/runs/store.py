"""The folder of a run: its names, its small JSON files, and the list of all runs."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastpeft.errors import UserError
from fastpeft.runs.events import finite

MAJORITY = "majority"
"""Among the further metrics of a score: what one and the same answer to every row would have scored, such as the share
of the commonest class."""

DEAD_AFTER_S = 30.0
"""A running trainer writes a heartbeat every two seconds."""

_OF_TRACKERS = ("wandb", "tensorboard")
"""Folders in a run's that others write: W&B links its log in the user's cache there."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunError(UserError):
    """A run's name or folder cannot be used as asked; the message says what to do."""


@dataclass(kw_only=True)
class Result:
    """What result.json holds. `metric` is of adapter/, `best` of adapter_best/; more is better."""

    run_id: str
    name: str
    status: str = "running"
    """running, done, stopped, pruned (by a sweep, after an evaluation), diverged or failed."""
    metric: dict[str, Any] = field(default_factory=dict)
    """{name, value} of the weights in adapter/; and {more: {name: value}} where a task has further metrics, {groups:
    {part: {name: value}}} where it has metrics of parts of the data."""
    best: dict[str, Any] = field(default_factory=dict)
    """{value, step} of the weights in adapter_best/; and more, as in `metric`."""
    test: dict[str, Any] = field(default_factory=dict)
    """{name, value, num, more, weights, step} of the test split, scored once with the `best` or the `last` weights;
    empty where there is none."""
    auc: dict[str, Any] = field(default_factory=dict)
    """{seconds, joules}: the metric's mean over the budget (`runs.curves`); joules None without a meter."""
    budget: dict[str, Any] = field(default_factory=dict)
    """{kind, limit, spent} in the kind's unit."""
    elapsed_s: float = 0.0
    """The budget clock: calibration, training, evaluation, checkpoints and the final save."""
    setup_s: float = 0.0
    """Imports, data, model loading; outside the budget."""
    energy_j: float | None = None
    energy_method: str = "none"
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    steps: int = 0
    stand_in: bool = False
    seed: int = 0
    group: str | None = None
    """What the runs of `--seeds` share: their folders' name before -seed<N>."""
    method: str = ""
    model: str = ""
    dataset: str = ""
    kind: str = ""
    """Of task, as in dataset.task."""
    labels: list[str] = field(default_factory=list)
    """Label names in the order of their numbers, where the task has them."""
    data: dict[str, Any] = field(default_factory=dict)
    """{sha256, splits: {name: {rows, and hashes of them}}}: what the run was trained and scored on, as it was read."""
    adapter_facts: dict[str, Any] = field(default_factory=dict)
    """What a method measures of its adapter: extra_flops, a share of the model's own, and active_atoms a token."""
    adapter_mb: float | None = None
    peak_memory_mb: float | None = None
    git: str | None = None


_RESULT_TYPES = {
    key: hint | int
    if hint in (float, float | None)
    else typing.get_origin(hint)
    if isinstance(hint, types.GenericAlias)
    else hint
    for key, hint in typing.get_type_hints(Result).items()
}


class RunFolder:
    """`results/<name>/`. Holds an exclusive lock while a trainer owns it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = path / "events.jsonl"
        self.config = path / "run.yaml"
        self.result = path / "result.json"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self._lock: IO | None = None

    @classmethod
    def at(cls, results_dir: Path, name: str) -> RunFolder:
        """Raises RunError for a name that is no plain folder name."""
        if not _NAME.fullmatch(name):
            raise RunError(
                f"{name!r} cannot name a run: write letters, digits, '.', '_' and '-', at most 128 of them, "
                "and a letter or a digit first"
            )
        return cls(Path(results_dir) / name)

    def weights(self, saved_as: str, best: bool = False) -> Path:
        """Of the last or the best weights: adapter/, adapter_best/; of a full fine-tune model/, model_best/."""
        return self.path / (f"{saved_as}_best" if best else saved_as)

    def predictions(self, which: str) -> Path:
        """What was answered to each row by the `last` or the `best` weights on validation, or on `test`."""
        return self.path / "predictions" / f"{which}.jsonl"

    def check_links(self) -> None:
        """Raises RunError for a link that leads out of the folder: nobody reads or writes what it leads to, in a folder
        that came from somebody else."""
        inside = os.path.realpath(self.path)
        for parent, folders, files in os.walk(self.path):  # goes through no link to a folder
            for name in (*folders, *files):
                path = os.path.join(parent, name)
                to = os.path.realpath(path)
                if os.path.islink(path) and not Path(to).is_relative_to(inside):
                    raise RunError(
                        f"{path} is a link that leads out of the run's folder, to {to}, and is not followed. Put what "
                        "it leads to in its place, or remove it"
                    )
            if Path(parent) == self.path:
                folders[:] = [name for name in folders if name not in _OF_TRACKERS]

    def check_free(self) -> None:
        """Raises RunError if the name is taken."""
        if os.path.lexists(self.path) and not self._is_remains():
            what = "has this name" if self.config.is_file() else "is in the way"
            raise RunError(f"{self.path} {what}: choose another --name, or continue it with --resume")

    def create(self) -> None:
        """Make the folder and lock it. Raises RunError if the name is taken."""
        if not self._is_remains(remove=True):
            self.check_free()
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error.strerror}") from None
        self.lock()

    def _is_remains(self, remove: bool = False) -> bool:
        """Whether a run that was killed while it was set up left this: a log, no settings, and a lock that is free."""
        lock = self.path / ".lock"
        if self.config.exists() or not self.events.is_file():
            return False
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    return False  # another process was quicker, and this is its run
                if remove:
                    shutil.rmtree(self.path)
        except OSError:
            return False
        return True

    def lock(self) -> None:
        """Raises RunError while another process trains this run."""
        file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise RunError(f"{self.path} is being trained by another process") from None
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def status(self) -> str:
        """As result.json has it, but `dead` for a run that says it is running and has lost its heartbeat."""
        result = self.read_result()
        if result is None or result.status != "running":
            return result.status if result else "no result"
        written = (self.events if self.events.exists() else self.result).stat().st_mtime
        return "dead" if time.time() - written > DEAD_AFTER_S else "running"

    def write_result(self, result: Result) -> None:
        write_json(self.result, dataclasses.asdict(result))

    def read_result(self) -> Result | None:
        """None where there is none yet, or it is unreadable."""
        values = read_json(self.result)
        if values is None:
            return None
        known = {k: v for k, v in values.items() if k in _RESULT_TYPES}
        if not all(isinstance(value, _RESULT_TYPES[key]) for key, value in known.items()):
            return None
        try:
            return Result(**known)
        except TypeError:
            return None


def default_name(run_id: str) -> str:
    """RUN-YYYYmmdd-HHMMSScc, with hundredths of a second: a shell's loop starts several runs in one."""
    now = time.time()
    return f"{run_id}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}{int(now * 100) % 100:02d}"


def list_runs(results_dir: Path) -> Iterator[RunFolder]:
    """Every run folder with a name that a terminal can show, oldest first."""
    folders = [p.parent for p in Path(results_dir).glob("*/run.yaml") if p.parent.name.isprintable()]
    for path in sorted(folders, key=lambda p: ((p / "run.yaml").stat().st_mtime, p.name)):
        yield RunFolder(path)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `target`. A kill leaves the old one or the new one, whole;
    between the two `recover_folder` puts the old one back."""
    temporary, old = _beside(target, "writing"), _beside(target, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def write_json(path: Path, values: Any) -> None:
    """Atomically: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(finite(values), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where the file is missing or is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last of ten thousand brackets
        return None
    return values if isinstance(values, dict) else None
