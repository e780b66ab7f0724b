"""A run in Weights & Biases.

Offline, W&B cannot continue a run: of two offline folders with one id, syncing the second erases the first
(wandb/wandb#5865). So a resume writes a new folder from the whole event log and removes the older ones.
Online, W&B reports the last row that it has, and later rows are sent. An evaluation that a resume repeats at fewer
steps than W&B has is not sent, because W&B accepts rows in ascending order only.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastpeft.atomic_write import write_atomically
from fastpeft.config.trackers import TRACKERS, WandbConfig
from fastpeft.runs.events import Event, number
from fastpeft.trackers.scalars import Row
from fastpeft.trackers.tracker import Tracker
from fastpeft.trackers.wandb_settings import wandb_mode, wandb_project

_SETTINGS: dict[str, Any] = {
    "console": "off",
    "silent": True,
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_meta": True,  # would name this process, not the trainer
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 2.0,
}
Mode = Literal["online", "offline", "shared"]
_NOT_CONFIG = ("overrides", "stand_in", "optuna", *TRACKERS.section_keys)
_EXIT_CODES = {"done": 0, "stopped": 255}
"""W&B shows 255 as `killed`, other numbers as `failed`."""


class WandbRun(Tracker):
    """`results/NAME/wandb/`, and where W&B is online its web page."""

    switches = "WANDB_MODE, WANDB_DISABLED and `wandb online`"

    def __init__(self, folder: Path, mode: Mode, project: str) -> None:
        self._folder, self._project = folder, project
        self._mode: Mode = mode
        self._next = 0

    @classmethod
    def settings(cls, section: WandbConfig, say: Callable[[str], None]) -> dict[str, str] | None:
        mode = wandb_mode(section.mode, say)
        return None if mode == "disabled" else {"mode": mode, "project": wandb_project(section.project)}

    def start(self) -> str:
        """Open the run. Returns where it can be seen. Raises whatever W&B raises."""
        import wandb

        known = wandb.Settings.model_fields
        self._run = wandb.init(
            id=self._id(),
            name=self._folder.name,
            project=self._project,
            dir=str(self._folder),
            mode=self._mode,
            resume="allow" if self._mode == "online" else None,
            settings=wandb.Settings(**{k: v for k, v in _SETTINGS.items() if k in known}),
        )
        self._next = self._run.starting_step
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step", step_sync=True)
        self._written = Path(self._run.settings.sync_dir)
        if self._mode == "online":
            return f"W&B: {self._run.url}"
        return f"W&B: offline; to send the run: wandb sync {shlex.quote(str(self._written))}"

    def describe(self, event: Event) -> None:
        """Send the run's settings, from its `run` event."""
        config = {key: value for key, value in event["config"].items() if key not in _NOT_CONFIG}
        config |= {key: event[key] for key in ("budget", "stand_in", "host") if key in event}
        self._run.config.update(config, allow_val_change=True)

    def add(self, row: Row) -> None:
        if row.order >= self._next:
            self._next = row.order + 1
            self._run.log(row.values, step=row.order, commit=True)

    def caught_up(self) -> None:
        """Remove earlier offline folders. All their rows have been added, and syncing them would erase this one."""
        for path in (self._folder / "wandb").glob("offline-run-*"):
            if path.name != self._written.name:
                shutil.rmtree(path, ignore_errors=True)

    def finish(self, end: Event | None) -> None:
        """Send the end's status and summary. `end` is None if the trainer was killed."""
        if end is not None:
            self._run.summary.update(_summary(end))
        self._run.finish(exit_code=_EXIT_CODES.get(end["status"], 1) if end else 1)

    def _id(self) -> str:
        """W&B's run id, the same for every process of a run."""
        path = self._folder / "wandb" / "run_id"
        path.parent.mkdir(exist_ok=True)
        try:
            stored = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            stored = ""
        if not stored:
            stored = secrets.token_hex(4)
            write_atomically(path, stored + "\n")
        return stored


def _summary(end: Event) -> dict[str, Any]:
    metric, best = end["metric"], end["best"]
    name = metric.get("name", "metric")
    summary = {"status": end["status"], "steps": end["step"], "elapsed_s": end["elapsed_s"]}
    if metric:
        summary[f"final/{name}"] = number(metric["value"])
    if best:
        summary |= {f"best/{name}": number(best["value"]), "best/step": best["step"]}
    if "error" in end:
        summary["error"] = end["error"]
    return summary
