"""The files of a hub model: which ones a run needs, whether they are cached, and their download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpeft import hub
from fastpeft.errors import UnavailableError, UserError
from fastpeft.runs.store import read_json

CONFIG = "config.json"
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Weight files: a single file, or the index of several. The first that exists is used."""
_ATTENTION = "attn_implementation"
_SMALL = (".json", ".txt", ".model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")


def cached_model(name: str, revision: str) -> Path | None:
    """The snapshot in the hub's cache if it holds all files that a run needs; else None."""
    commit = hub.cached_commit("model", name, revision)
    if commit is None:
        return None
    folder = hub.snapshot("model", name, commit)
    return folder if _is_whole(folder) else None


def fetch_model(name: str, revision: str) -> Path:
    """The snapshot in the hub's cache, downloaded if needed, weights last.

    Raises:
        UnavailableError: unknown name, no access, no usable files, or an interrupted download.
    """
    folder = cached_model(name, revision)
    if folder is not None:
        return folder
    try:
        there = hub.look_up("model", name, revision).files
    except hub.Unreachable as error:
        raise UnavailableError(str(error)) from None
    needed = _needed(name, there)
    folder = hub.download("model", name, CONFIG, revision).parent  # records the commit of `revision` in the cache
    for file in needed:
        hub.download("model", name, file, folder.name)
    return folder


def refuse_hub_code(folder: Path, name: str) -> None:
    """Refuse a config with an attention implementation from the hub, such as kernels-community/flash-attn: transformers
    would download and run that repository's code if the package `kernels` is installed.

    Raises:
        UserError: the config has such a key; the message gives the key and the repository.
    """
    for key, value in _settings(read_json(folder / CONFIG) or {}):
        if key.endswith(_ATTENTION) and isinstance(value, str) and "/" in value:
            raise UserError(
                f"model.name {name}: its {CONFIG} asks for {key} {value!r}, which is code of a repository, and none is "
                "run. Remove the key there"
            )


def _settings(values: dict[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a mapping, at any depth, with its key. In a mapping of attention implementations the keys
    are parts of the model, so that the mapping's own key is used."""
    for name, value in values.items():
        inner = key if key.endswith(_ATTENTION) else name
        if isinstance(value, dict):
            yield from _settings(value, inner)
        else:
            yield inner, value


def _needed(name: str, there: tuple[str, ...]) -> list[str]:
    """The files to download, weights last."""
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
