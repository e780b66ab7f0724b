"""Checkpoints on disk, whole or absent: safetensors and JSON in a folder that appears by a rename.

    checkpoints/step-00000120/  state.safetensors  state.json  manifest.json

The manifest holds the format's version, and the size and SHA-256 of the other files; it is written last. The newest two
are kept. A checkpoint of another version is refused, and stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastpeft.errors import UserError
from fastpeft.runs.store import read_json, write_json

FORMAT = 3
"""Version of a checkpoint's content. Raise it whenever the form of a part's state changes. Version 1 was unnumbered."""
KEEP = 2
_TENSORS, _VALUES, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_SEPARATOR = "/"

State = dict[str, Any]
"""Name -> tensor, JSON value or nested State."""


class CheckpointError(UserError):
    """A checkpoint that this version cannot read."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    events_bytes: int
    """Size of the event log when it was saved."""
    parts: dict[str, State]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write atomically under `folder`, then delete all checkpoints but this one and the one before it."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover)
    temporary = folder / f".writing-{checkpoint.step:08d}"
    temporary.mkdir()
    tensors, parts = split(checkpoint.parts)
    save_file(tensors, temporary / _TENSORS)
    _fsync(temporary / _TENSORS)
    header = {"format": FORMAT, "step": checkpoint.step, "events_bytes": checkpoint.events_bytes}
    write_json(temporary / _VALUES, header | {"parts": parts})
    fingerprints = {name: _fingerprint(temporary / name) for name in (_TENSORS, _VALUES)}
    write_json(temporary / _MANIFEST, {"format": FORMAT} | fingerprints)
    _fsync(temporary)
    final = folder / f"step-{checkpoint.step:08d}"
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(folder)
    folders = _folders(folder)
    this = folders.index(final)
    for old in folders[:this] + folders[this + KEEP :]:  # newer ones are broken: the resume skipped them
        shutil.rmtree(old)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and why each newer one was skipped.

    Raises:
        CheckpointError: the newest valid one is of another version.
    """
    skipped: list[str] = []
    for path in _folders(folder):
        fault = _fault(path)
        if fault is None:
            _refuse_other_formats(path)
            try:
                tensors = load_file(path / _TENSORS)
            except (OSError, SafetensorError) as error:
                fault = str(error)
            else:
                values = read_json(path / _VALUES)
                assert values is not None
                return Checkpoint(values["step"], values["events_bytes"], joined(tensors, values["parts"])), skipped
        skipped.append(f"{path.name}: {fault}")
    return None, skipped


def split(state: State, prefix: str = "") -> tuple[dict[str, torch.Tensor], State]:
    """(tensors by their paths, the other values in their nesting)."""
    tensors: dict[str, torch.Tensor] = {}
    values: State = {}
    for name, value in state.items():
        if _SEPARATOR in name:
            raise ValueError(f"a checkpoint's state is named {name!r}: {_SEPARATOR} may not be in a name")
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.detach().cpu().contiguous()
        elif isinstance(value, dict):
            inner, values[name] = split(value, f"{prefix}{name}{_SEPARATOR}")
            tensors |= inner
        else:
            values[name] = value
    return tensors, values


def joined(tensors: dict[str, torch.Tensor], values: State) -> State:
    """The inverse of `split`; changes `values`."""
    for path, tensor in tensors.items():
        *parents, name = path.split(_SEPARATOR)
        state = values
        for parent in parents:
            state = state[parent]
        state[name] = tensor
    return values


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _fault(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted; None if it can."""
    manifest = read_json(path / _MANIFEST)
    if manifest is None:
        return f"{_MANIFEST} is missing or unreadable"
    for name in (_TENSORS, _VALUES):
        if not (path / name).is_file():
            return f"{name} is missing"
        if manifest.get(name) != _fingerprint(path / name):
            return f"{name} is not what was written"
    if _format(manifest) != _format(read_json(path / _VALUES) or {}):
        return f"{_MANIFEST} is not what was written"
    return None


def _format(values: State) -> Any:
    return values.get("format", 1)


def _refuse_other_formats(path: Path) -> None:
    found = _format(read_json(path / _MANIFEST) or {})
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {found}, and this version of fastpeft reads format {FORMAT}. Resume the "
            "run with the version that began it, which its result.json names as git, or begin anew under another --name"
        )


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
