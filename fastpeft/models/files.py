"""A hub model's files: which of them a run needs, whether the cache has them, and fetching them."""

from __future__ import annotations

from pathlib import Path

from fastpeft import hub
from fastpeft.errors import UnavailableError
from fastpeft.runs.store import read_json

CONFIG = "config.json"
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""In one file, or the index of several. The first that is there is taken."""
_SMALL = (".json", ".txt", ".model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")


def cached_model(name: str, revision: str) -> Path | None:
    """The snapshot in the hub's cache, if it holds all that a run needs."""
    commit = hub.cached_commit("model", name, revision)
    if commit is None:
        return None
    folder = hub.snapshot("model", name, commit)
    return folder if _is_whole(folder) else None


def fetch_model(name: str, revision: str) -> Path:
    """The snapshot in the hub's cache, downloaded if need be; the weights come last.

    Raises:
        UnavailableError: no such name, no access, no usable files, or a download that broke off.
    """
    folder = cached_model(name, revision)
    if folder is not None:
        return folder
    try:
        there = hub.look_up("model", name, revision).files
    except hub.Unreachable as error:
        raise UnavailableError(str(error)) from None
    needed = _needed(name, there)
    folder = hub.download("model", name, CONFIG, revision).parent  # the cache notes what `revision` means
    for file in needed:
        hub.download("model", name, file, folder.name)
    return folder


def _needed(name: str, there: tuple[str, ...]) -> list[str]:
    """Files to download, weights last."""
    if CONFIG not in there:
        raise UnavailableError(f"model {name}: the repository has no {CONFIG}, so it is no model of transformers")
    small = [file for file in there if "/" not in file and file.endswith(_SMALL) and not file.endswith(".index.json")]
    for single, index in _WEIGHTS:
        if single in there:
            return [*small, single]
        if index in there:
            stem, suffix = single.split(".")
            shards = [file for file in there if file.startswith(f"{stem}-") and file.endswith(f".{suffix}")]
            return [*small, index, *shards]
    raise UnavailableError(f"model {name}: the repository has neither {' nor '.join(single for single, _ in _WEIGHTS)}")


def _is_whole(folder: Path) -> bool:
    have = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if CONFIG not in have or not any(file in _VOCABULARIES or file.endswith(".model") for file in have):
        return False
    for single, index in _WEIGHTS:
        if single in have:
            return True
        if index in have:
            shards = (read_json(folder / index) or {}).get("weight_map")
            return isinstance(shards, dict) and set(shards.values()) <= have
    return False
