"""What an export is to do, checked before torch is loaded: which run, which weights, which target."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastpeft.config import RunConfig, load_run
from fastpeft.config.methods import METHODS
from fastpeft.errors import UserError
from fastpeft.export.readers import PEFT, Reader, find_reader
from fastpeft.runs.store import Result, RunFolder, list_runs

Weights = Literal["best", "last"]

_SAVED_AS = ("adapter", "model")
"""Weights -> the folder of an adapter, and that of a fully fine-tuned model."""


class ExportError(UserError):
    """An export that cannot be made as asked; the message says what to do."""


class CheckError(ExportError):
    """The export does not load, or answers otherwise than the trained model. Nothing was written."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    folder: RunFolder
    run: RunConfig
    """As stored, without its stand-in: the weights belong to the model that the run names."""
    result: Result | None
    status: str
    weights: Weights
    source: Path
    full: bool
    """The source is a whole model, not an adapter."""
    target: Path
    merge: bool
    trim: float | None
    reader: Reader | None = None
    """Who is to read it; None for PEFT and transformers."""

    @property
    def metric(self) -> dict:
        """{name, value, step} that the run logged for these weights; empty where there is none."""
        if self.result is None or not self.result.metric:
            return {}
        name = self.result.metric.get("name", "metric")
        if self.weights == "best":
            return {"name": name, **self.result.best} if self.result.best else {}
        return self.result.metric | {"step": self.result.steps}


def make_plan(
    run: str,
    *,
    results_dir: Path = Path("results"),
    to: Path | None = None,
    merge: bool = False,
    trim: float | None = None,
    weights: Weights | None = None,
    reader: str = PEFT,
    approximate: bool = False,
) -> Plan:
    """Check what is asked for.

    Args:
        run: a run's name under `results_dir`, or the path of a run's folder.
        to: the folder to write; RUN/export when absent. It must be empty or not there.
        merge: write a whole model instead of an adapter.
        trim: share of each update's energy to keep, over 0 and at most 1.
        weights: best or last; the best, if there are any, when absent.
        reader: peft, or a name in READERS: who is to read it.
        approximate: the update may be another one, as fastpeft.export.approximate makes it.

    Raises:
        UserError: no such run, no weights, a target in the way, a share out of bounds, no such reader.
    """
    found = find_reader(reader)
    if trim is not None and not (math.isfinite(trim) and 0 < trim <= 1):
        raise ExportError(f"--trim {trim:g}: give the share of each update's energy to keep, over 0 and at most 1")
    plan = plan_reading(find_run(run, results_dir), weights)
    if plan.full and trim is not None:
        raise ExportError(f"{plan.source}: a fully fine-tuned model has no low-rank update to trim; leave --trim out")
    if plan.full and not merge:
        raise ExportError(f"{plan.source} is a fully fine-tuned model, not an adapter; add --merge to export it whole")
    _check_routed(plan.run, plan.source, approximate, merge or trim is not None or found is not None)
    target = plan.target if to is None else to.expanduser()
    _check_target(target)
    return replace(plan, target=target, merge=merge, trim=trim, reader=found)


def plan_reading(folder: RunFolder, weights: Weights | None) -> Plan:
    """A run's weights, to be read as they are; the target is RUN/export.

    Raises:
        UserError: no weights.
    """
    weights, source, full = _find_weights(folder, weights)
    return Plan(
        folder=folder,
        run=replace(load_run(folder.config), stand_in=None),
        result=folder.read_result(),
        status=folder.status(),
        weights=weights,
        source=source,
        full=full,
        target=folder.path / "export",
        merge=full,
        trim=None,
    )


def _check_routed(run: RunConfig, source: Path, approximate: bool, otherwise: bool) -> None:
    """Raises ExportError for an update that depends on the token, unless it may be approximated."""
    if not METHODS[run.method].routes:
        if approximate:
            raise ExportError(f"--approximate: the update of method {run.method} is exported as it is; leave it out")
        return
    if approximate and otherwise:
        raise ExportError("--approximate writes a PEFT LoRA: leave out --merge, --trim and --for")
    if not approximate:
        ways = " --approximate RANK writes the update under mean gates as a PEFT LoRA, and says what that costs"
        exact = f"The exact adapter is the run's own file in {source}"
        if run.method == "unihyperlora":
            exact += ", which fastpeft.load_adapter(model, path) puts onto any supported host;"
        raise ExportError(
            f"{source}: which atoms a token uses depends on the token, so that no plain LoRA and no merged model holds "
            f"the adapter exactly. {exact}{ways if run.method == 'unihyperlora' else ''}"
        )


def find_run(run: str, results_dir: Path) -> RunFolder:
    """By its name under `results_dir`, or by its folder's path.

    Raises:
        UserError: there is none, or it has a link that leads out of it.
    """
    for path in (results_dir / run, Path(run).expanduser()):
        try:
            is_run = bool(run) and (path / "run.yaml").is_file()
        except OSError:  # a name that is too long for a path
            continue
        if is_run:
            folder = RunFolder(path)
            folder.check_links()
            return folder
    names = ", ".join(folder.path.name for folder in list_runs(results_dir))
    raise ExportError(
        f"{run!r} is neither a run in {results_dir} nor the path of a run's folder; runs there: {names or 'none'}"
    )


def _find_weights(folder: RunFolder, asked: Weights | None) -> tuple[Weights, Path, bool]:
    """Which weights, their folder, and whether they are a whole model."""
    for weights in (asked,) if asked else ("best", "last"):
        for saved_as in _SAVED_AS:
            path = folder.weights(saved_as, best=weights == "best")
            if path.is_dir():
                return weights, path, saved_as == "model"
    others = [w for w in ("best", "last") if any(folder.weights(s, best=w == "best").is_dir() for s in _SAVED_AS)]
    if others:
        raise ExportError(f"{folder.path} has no {asked} weights; it has the {others[0]}: use --{others[0]}")
    raise ExportError(
        f"{folder.path} has no adapter yet: a run saves one at its first evaluation and at its end. Continue it with "
        f"fastpeft train --resume --name {folder.path.name} --results-dir {folder.path.parent}"
    )


def _check_target(target: Path) -> None:
    if target.is_dir():
        if any(target.iterdir()):
            raise ExportError(f"{target} exists and is not empty: remove it, or choose another folder with --to")
    elif os.path.lexists(target):
        raise ExportError(f"{target} is a file: choose a folder with --to")
