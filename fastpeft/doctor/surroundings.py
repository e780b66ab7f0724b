"""Checks of the hub and its cache, W&B, the results folder and the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from fastpeft.doctor.check import Finding

HUB_TIMEOUT_S = 5.0
_LOW_DISK_BYTES = 2 * 2**30
_GIB = 2**30


def hub() -> list[Finding]:
    """Whether models and datasets can be fetched by name."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    where = _without_credentials(constants.ENDPOINT)
    login = "logged in" if get_token() else "not logged in, which only restricted models need"
    if constants.HF_HUB_OFFLINE:
        message = "HF_HUB_OFFLINE is set: only local folders, the cache and what ships with fastpeft are used"
        return [Finding("hub", "warning", message, f"unset HF_HUB_OFFLINE to reach {where}")]
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # connection, DNS, TLS, proxy: each HTTP library has its own classes
        message = (
            f"{where} cannot be reached ({type(error).__name__}): local folders, the cache and the presets' stand-in "
            "still work"
        )
        fix = "check the network and HTTPS_PROXY, or name a mirror in HF_ENDPOINT"
        return [Finding("hub", "warning", message, fix)]
    if answer.status_code >= 400:
        fix = "check HF_ENDPOINT, and the token if the hub refuses it"
        return [Finding("hub", "warning", f"{where} answers with error {answer.status_code} ({login})", fix)]
    return [Finding("hub", "ok", f"{where} answers; {login}")]


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def hub_cache() -> list[Finding]:
    """Models and datasets that can be used without the hub."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    where = constants.HF_HUB_CACHE
    try:
        cache = scan_cache_dir(where)
    except CacheNotFound:
        return [Finding("hub cache", "ok", f"{where}: nothing is cached yet")]
    kinds = [repo.repo_type for repo in cache.repos]
    message = (
        f"{where}: {kinds.count('model')} models and {kinds.count('dataset')} datasets, "
        f"{cache.size_on_disk / 1e9:.1f} GB"
    )
    if cache.warnings:
        fix = f"delete the damaged folders: {'; '.join(str(w) for w in cache.warnings[:3])}"
        return [Finding("hub cache", "warning", f"{message}; {len(cache.warnings)} damaged", fix)]
    return [Finding("hub cache", "ok", message)]


def wandb_key() -> list[Finding]:
    """Whether an API key is present. The key itself is never shown."""
    from fastpeft.trackers.wandb_settings import has_key

    if not has_key():
        fix = "wandb login, or set WANDB_API_KEY; nothing else needs it"
        return [Finding("W&B", "missing", "no key: wandb.mode auto does not go online", fix)]
    return [Finding("W&B", "ok", "a key is present")]


def results_folder(folder: Path) -> list[Finding]:
    """Whether a run's folder can be created in `folder`."""
    there = _nearest(folder)
    fix = "give another folder with --results-dir"
    if not there.is_dir():
        return [Finding("results", "missing", f"{folder}: {there} is no folder", fix, fatal=True)]
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as error:
        message = f"{folder} cannot be written: {there}: {error.strerror}"
        return [Finding("results", "missing", message, fix, fatal=True)]
    state = "can be written" if there == folder.absolute() else "can be made"
    return [Finding("results", "ok", f"{folder.absolute()} {state}")]


def disk(folder: Path) -> list[Finding]:
    there = _nearest(folder)
    usage = shutil.disk_usage(there)
    message = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free at {there}"
    if usage.free < _LOW_DISK_BYTES:
        return [Finding("disk", "warning", f"only {message}", "make room, or give another folder with --results-dir")]
    return [Finding("disk", "ok", message)]


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))
