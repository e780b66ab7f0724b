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

from fastpeft.atomic_write import write_atomically
from fastpeft.errors import UserError
from fastpeft.runs.events import finite

MAJORITY = "majority"
"""Name of a further metric: the score of one constant answer to every row, such as the share of the commonest class."""

DEAD_AFTER_S = 30.0
"""Seconds without a heartbeat after which a run counts as dead. A trainer writes one every two seconds."""

_OF_TRACKERS = ("wandb", "tensorboard")
"""Subfolders that trackers write. W&B makes links to its log in the user's cache there."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunError(UserError):
    """A run's name or folder cannot be used as asked; the message says what to do."""


@dataclass(kw_only=True)
class Result:
    """The content of result.json. Scores are better when larger."""

    run_id: str
    name: str
    status: str = "running"
    """running, done, stopped, pruned (by a sweep, after an evaluation), diverged or failed."""
    metric: dict[str, Any] = field(default_factory=dict)
    """{name, value} of the last weights, in adapter/. Also {more: {name: value}} if the task has further metrics,
    {groups: {part: {name: value}}} if it has metrics of parts of the data, and {num: rows} if only a sample was
    scored."""
    best: dict[str, Any] = field(default_factory=dict)
    """{value, step, loss} of the best weights, in adapter_best/; also more, groups and num, as in `metric`."""
    test: dict[str, Any] = field(default_factory=dict)
    """{name, value, num, more, weights, step} of the test split, scored once with the `best` weights; empty if there is
    none."""
    auc: dict[str, Any] = field(default_factory=dict)
    """{seconds, joules}: the metric's mean over the budget (`runs.curves`); joules is None without a meter."""
    budget: dict[str, Any] = field(default_factory=dict)
    """{kind, limit, spent} in the kind's unit."""
    elapsed_s: float = 0.0
    """Seconds on the budget clock: calibration, training, evaluation, checkpoints and the final save."""
    setup_s: float = 0.0
    """Seconds of imports, reading data and loading the model; outside the budget."""
    energy_j: float | None = None
    energy_method: str = "none"
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    steps: int = 0
    stand_in: bool = False
    seed: int = 0
    group: str | None = None
    """Group of related runs; for `--seeds` their folders' name before -seed<N>."""
    method: str = ""
    model: str = ""
    dataset: str = ""
    kind: str = ""
    """Kind of task, as in dataset.task."""
    labels: list[str] = field(default_factory=list)
    """Label names in the order of their numbers, if the task has labels."""
    data: dict[str, Any] = field(default_factory=dict)
    """{sha256, splits: {name: {rows, and hashes of them}}}: the data that the run was trained and scored on."""
    adapter_facts: dict[str, Any] = field(default_factory=dict)
    """Measurements of the adapter: extra_flops, as a share of the model's own, and active_atoms per token."""
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
        """The folder of the run `name`. Raises RunError for a name that is no plain folder name."""
        if not _NAME.fullmatch(name):
            raise RunError(
                f"{name!r} cannot name a run: write letters, digits, '.', '_' and '-', at most 128 of them, "
                "and a letter or a digit first"
            )
        return cls(Path(results_dir) / name)

    def weights(self, saved_as: str, best: bool = False) -> Path:
        """Folder of the last or best weights: adapter/, adapter_best/; for a full fine-tune model/, model_best/."""
        return self.path / (f"{saved_as}_best" if best else saved_as)

    def predictions(self, which: str) -> Path:
        """File of each row's prediction, by the `last` or `best` weights on the validation split, or on `test`."""
        return self.path / "predictions" / f"{which}.jsonl"

    def check_links(self) -> None:
        """Raise RunError for a link that leads out of the folder: a folder from somebody else must not make this
        process read or write elsewhere."""
        inside = os.path.realpath(self.path)
        for parent, folders, files in os.walk(self.path):  # follows no link to a folder
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
        """Raise RunError if the name is taken."""
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
        """Whether this folder is left over from a run killed in its set-up: a log, no settings, and a free lock."""
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
        """Take the run's lock. Raises RunError while another process trains this run."""
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
        """The status in result.json, or `dead` if that is running but the heartbeat has stopped."""
        result = self.read_result()
        if result is None or result.status != "running":
            return result.status if result else "no result"
        written = (self.events if self.events.exists() else self.result).stat().st_mtime
        return "dead" if time.time() - written > DEAD_AFTER_S else "running"

    def write_result(self, result: Result) -> None:
        write_json(self.result, dataclasses.asdict(result))

    def read_result(self) -> Result | None:
        """The result; None if it is missing or unreadable."""
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
    """RUN-YYYYmmdd-HHMMSScc, with hundredths of a second, since a shell loop may start several runs per second."""
    now = time.time()
    return f"{run_id}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}{int(now * 100) % 100:02d}"


def list_runs(results_dir: Path) -> Iterator[RunFolder]:
    """Every run folder with a printable name, oldest first."""
    folders = [p.parent for p in Path(results_dir).glob("*/run.yaml") if p.parent.name.isprintable()]
    for path in sorted(folders, key=lambda p: ((p / "run.yaml").stat().st_mtime, p.name)):
        yield RunFolder(path)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which replaces `target` on exit. After a kill, the old or the new folder is complete; if
    neither is in place, `recover_folder` restores the old one."""
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
    """Write atomically: a reader sees the old file or the new one, never a part."""
    write_atomically(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # RecursionError: ten thousand nested brackets
        return None
    return values if isinstance(values, dict) else None
