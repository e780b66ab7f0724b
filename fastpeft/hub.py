"""The Hugging Face hub and its cache: look-ups, downloads of single files, and errors in the user's words."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastpeft.errors import UnavailableError, first_line

CHECK_S = 5.0
"""Timeout of a look-up. After it the hub counts as unreachable."""

CARD = "README.md"

Kind = Literal["model", "dataset"]

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Unreachable(Exception):
    """The hub does not answer; nothing is known about the name."""


@dataclass(frozen=True)
class Repository:
    commit: str
    files: tuple[str, ...]


def look_up(kind: Kind, name: str, revision: str) -> Repository:
    """Commit and files of `name` at `revision` on the hub. Takes CHECK_S at most.

    Raises:
        UnavailableError: the hub refuses: no such name, no such revision, no access.
        Unreachable: the hub does not answer, or answers with a server error.
    """
    import huggingface_hub as hub

    if hub.constants.is_offline_mode():
        raise Unreachable(f"{kind} {name} is not in the local cache and HF_HUB_OFFLINE is set")
    ask = hub.HfApi().model_info if kind == "model" else hub.HfApi().dataset_info
    try:
        found = _within(CHECK_S, lambda: ask(name, revision=revision, timeout=CHECK_S))
    except Exception as error:  # connection, DNS, TLS, proxy: each HTTP library has its own classes
        said = _refusal(kind, name, revision, error)
        if said is not None:
            raise UnavailableError(said) from None
        status = _status(error)
        how = f"answers with error {status}" if status else f"cannot be reached ({type(error).__name__})"
        raise Unreachable(f"{kind} {name} is not in the local cache and the hub {how}") from None
    return Repository(found.sha, tuple(sibling.rfilename for sibling in found.siblings or ()))


def cached_commit(kind: Kind, name: str, revision: str) -> str | None:
    """The commit that the cache holds for a branch, tag or commit; None if it holds none."""
    folder = _cache(kind, name)
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision if (folder / "snapshots" / revision).is_dir() else None
    reference = folder / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def note_revision(kind: Kind, name: str, revision: str) -> str | None:
    """Record in the cache which commit `revision` is now, and return it. The hub's answer for any file names it."""
    import huggingface_hub as hub

    try:
        hub.hf_hub_download(name, CARD, repo_type=kind, revision=revision)
    except hub.errors.RemoteEntryNotFoundError:
        pass  # the 404 answer names the commit as well
    except Exception as error:
        raise download_error(kind, name, revision, error, CARD) from error
    return cached_commit(kind, name, revision)


def snapshot(kind: Kind, name: str, commit: str) -> Path:
    """The cache's folder for the files of a commit, of which some may be missing."""
    return _cache(kind, name) / "snapshots" / commit


def download(kind: Kind, name: str, file: str, revision: str) -> Path:
    """The path of one file of a repository, from the cache or the hub. The cache holds complete files only.

    Raises:
        UnavailableError: no access, no such file, or the download failed.
    """
    import huggingface_hub as hub

    try:
        with progress_bars(hub.utils):
            return Path(hub.hf_hub_download(name, file, repo_type=kind, revision=revision))
    except Exception as error:
        raise download_error(kind, name, revision, error, file) from error


def download_error(kind: Kind, name: str, revision: str, error: Exception, file: str | None = None) -> UnavailableError:
    """The error for a download that failed after the hub had answered."""
    chain = _chain(error)
    said = next((text for e in chain if (text := _refusal(kind, name, revision, e))), None)
    if said is not None:
        return UnavailableError(said)
    what = file or next((path for e in chain if (path := _requested(e))), "a file")
    cause = chain[-1]
    reason = first_line(cause)
    return UnavailableError(
        f"{kind} {name}: the download of {what} broke off ({type(cause).__name__}{': ' * bool(reason)}{reason}). "
        "Run the same again to go on: the files that are complete are kept"
    )


def is_network_error(error: Exception) -> bool:
    """Whether the transfer failed, rather than the processing of its data."""
    import huggingface_hub as hub

    return any(
        type(e).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
        or isinstance(e, (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, ConnectionError, TimeoutError))
        or "Consistency check failed" in str(e)
        for e in _chain(error)
    )


@contextmanager
def progress_bars(library: Any) -> Iterator[None]:
    """Show the progress bars of `library`, `huggingface_hub.utils` or `datasets`, only if stderr is a terminal."""
    if sys.stderr.isatty() or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


def _cache(kind: Kind, name: str) -> Path:
    import huggingface_hub as hub

    return Path(hub.constants.HF_HUB_CACHE).expanduser() / f"{kind}s--{name.replace('/', '--')}"


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns, within `seconds`. A socket's timeout bounds neither DNS resolution nor a slow answer."""
    answer: list[Any] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="fastpeft-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError
    return answer[0]


def _refusal(kind: Kind, name: str, revision: str, error: BaseException) -> str | None:
    """The message for an error by which the hub refuses a request; None for other errors."""
    from huggingface_hub import constants, errors

    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
        return f"{kind} {name}: access is restricted. Ask for it at {page}, then {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{kind} {name}: it has no revision {revision!r}; {kind}.revision takes a branch, a tag or a commit"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{kind} {name}: a file is missing there: {_requested(error) or error}"
    if isinstance(error, errors.HFValidationError):
        return f"{kind} {name!r}: is neither a folder nor a name on the hub"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        code = f" (error {status})" if status else ""
        return f"{kind} {name}: the hub has no such {kind}, or it is private{code}. Check the name, or {_LOG_IN}"
    if status == 403:
        return f"{kind} {name}: the hub answers with error 403: this account, or this network, may not read it"
    if status is not None and status < 500:
        return f"{kind} {name}: the hub answers with error {status}"
    return None


def _status(error: BaseException) -> int | None:
    """The status code of an HTTP error; None for other errors."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _requested(error: BaseException) -> str | None:
    """Path in the repository of the file that a failed request asked for."""
    try:
        url = str(error.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return None
    path = url.partition("?")[0]
    return "/".join(path.split("/resolve/", 1)[1].split("/")[1:]) if "/resolve/" in path else None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, latest first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain
