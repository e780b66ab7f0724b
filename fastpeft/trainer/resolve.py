"""Where a run's model and data come from: a local path, the hub's cache, the hub or the stand-in.

Model and data resolve together: either both are the named ones, or both are the stand-in's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastpeft import hub
from fastpeft.config import RunConfig, apply_stand_in
from fastpeft.config.schema import ModelConfig
from fastpeft.data.hub_datasets import hub_dataset, is_cached
from fastpeft.data.rows import DataError
from fastpeft.errors import UnavailableError
from fastpeft.models.files import CONFIG, cached_model
from fastpeft.standins import embedded_path
from fastpeft.tasks import find_known, is_generated, known_names


@dataclass(frozen=True)
class Resolved:
    run: RunConfig
    stand_in: bool
    reason: str = ""
    """Why the stand-in is used, in words for the user."""


def resolve(run: RunConfig, allow_stand_in: bool = True) -> Resolved:
    """The run with names that can be loaded.

    Raises:
        DataError: a dataset.path that does not exist.
        UnavailableError: a name that exists nowhere, access denied, or no hub and no stand-in.
    """
    path = run.dataset.path
    if path is not None and not Path(path).expanduser().exists():
        raise DataError(f"dataset.path {path}: there is no such file or folder")
    known = find_known(run.dataset)
    generated = is_generated(run.dataset, known)
    source = None
    if not generated and path is None:
        source = hub_dataset(run.dataset, known.dataset if known else None, known_names())
    shipped = embedded_path(run.model.name) is not None
    if (shipped or generated) and not allow_stand_in:
        raise UnavailableError(f"{run.model.name} on {run.dataset.name} is a stand-in, and --no-stand-in is given")
    try:
        if not shipped:
            _check_model(run.model.name, run.model.revision)
        if source is not None and not is_cached(source):
            hub.look_up("dataset", source.repository, source.revision)
    except hub.Unreachable as error:
        if allow_stand_in and run.stand_in is not None:
            return Resolved(apply_stand_in(run), stand_in=True, reason=str(error))
        why = (
            "--no-stand-in is given"
            if run.stand_in is not None
            else ("the run has no stand-in, or its model or dataset were overridden")
        )
        raise UnavailableError(
            f"{error}, and {why}. Give local folders as model.name and dataset.path, or connect"
        ) from None
    return Resolved(run, stand_in=shipped or generated, reason="the run itself names it")


def check_model(config: ModelConfig) -> None:
    """Raise UnavailableError for a model that cannot be reached. The data are not looked at."""
    try:
        if embedded_path(config.name) is None:
            _check_model(config.name, config.revision)
    except hub.Unreachable as error:
        raise UnavailableError(f"{error}. Give a local folder as model.name, or connect") from None


def _check_model(name: str, revision: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UnavailableError(f"model.name {name}: the folder has no config.json, so it is no model")
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UnavailableError(f"model.name {name}: there is no such folder")
    if cached_model(name, revision) is None:
        hub.look_up("model", name, revision)
