"""Where a run's model and data come from: a local path, the hub's cache, the hub, the stand-in.

Model and data resolve together: either both are the ones named, or both are the stand-in's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastpeft.config import RunConfig, apply_stand_in
from fastpeft.data import EMBEDDED, GLUE
from fastpeft.data.glue import REPOSITORY
from fastpeft.data.task import DataError
from fastpeft.errors import UnavailableError
from fastpeft.models.embedded import PATHS

EMBEDDED_PREFIX = "embedded/"
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Resolved:
    run: RunConfig
    stand_in: bool
    reason: str = ""
    """Why the stand-in is used, in words for the user."""


class _Unreachable(Exception):
    """The hub does not answer; nothing is known about the name."""


def resolve(run: RunConfig, allow_stand_in: bool = True) -> Resolved:
    """The run with names that can be loaded.

    Raises:
        DataError: a dataset.path that does not exist.
        UnavailableError: a name that exists nowhere, access denied, or no hub and no stand-in.
    """
    path = run.dataset.path
    if path is not None and not Path(path).expanduser().exists():
        raise DataError(f"dataset.path {path}: there is no such file or folder")
    generated = path is None and run.dataset.name == EMBEDDED
    shipped = embedded_path(run.model.name) is not None
    if (shipped or generated) and not allow_stand_in:
        raise UnavailableError(f"{run.model.name} on {run.dataset.name} is a stand-in, and --no-stand-in is given")
    try:
        if not shipped:
            _check_model(run.model.name, run.model.revision)
        if run.dataset.path is None and run.dataset.name in GLUE:
            _check_hub(REPOSITORY, "main", "dataset")
    except _Unreachable as error:
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


def embedded_path(name: str) -> Path | None:
    """Folder of a shipped model, None for other names. Raises UnavailableError for an unknown one."""
    if not name.startswith(EMBEDDED_PREFIX):
        return None
    names = {EMBEDDED_PREFIX + key.replace("_", "-"): path for key, path in PATHS.items()}
    if name not in names:
        raise UnavailableError(f"model.name {name!r}: shipped models are {', '.join(names)}")
    return names[name]


def _check_model(name: str, revision: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnavailableError(f"model.name {name}: the folder has no config.json, so it is no model")
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UnavailableError(f"model.name {name}: there is no such folder")
    _check_hub(name, revision, "model")


def _check_hub(name: str, revision: str, kind: str) -> None:
    """Return if the hub or its cache has `name`."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    if kind == "model" and isinstance(hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    if offline:
        raise _Unreachable(f"{kind} {name} is not in the local cache and HF_HUB_OFFLINE is set")
    look = hub.HfApi().model_info if kind == "model" else hub.HfApi().dataset_info
    try:
        look(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except errors.GatedRepoError:
        raise UnavailableError(f"{kind} {name}: access is restricted; log in with an account that has it") from None
    except errors.RepositoryNotFoundError:
        raise UnavailableError(f"{kind} {name}: the hub has no such {kind}, or it is private") from None
    except errors.RevisionNotFoundError:
        raise UnavailableError(f"{kind} {name}: it has no revision {revision!r}") from None
    except errors.HFValidationError:
        raise UnavailableError(f"{kind} {name!r}: is neither a folder nor a name on the hub") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500:
            raise _Unreachable(f"the hub answers with error {status}") from None
        raise UnavailableError(f"{kind} {name}: the hub answers with error {status}") from None
    except Exception as error:  # connection, DNS, TLS, proxy: each HTTP library has its own classes
        raise _Unreachable(f"the hub cannot be reached ({type(error).__name__})") from None
