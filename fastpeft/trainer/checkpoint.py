"""Checkpoints that are whole or absent: safetensors and JSON in a folder that appears by a rename.

    checkpoints/step-00000120/  state.safetensors  state.json  manifest.json

The manifest holds the size and SHA-256 of the other files and is written last. The newest two are kept.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastpeft.runs.store import read_json, write_json

KEEP = 2
_TENSORS, _VALUES, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write atomically under `folder`, then drop all but this one and the one before it."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover)
    temporary = folder / f".writing-{step:08d}"
    temporary.mkdir()
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    save_file(tensors, temporary / _TENSORS)
    _fsync(temporary / _TENSORS)
    write_json(temporary / _VALUES, checkpoint.values)
    manifest = {name: _fingerprint(temporary / name) for name in (_TENSORS, _VALUES)}
    write_json(temporary / _MANIFEST, manifest)
    _fsync(temporary)
    final = folder / f"step-{step:08d}"
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(folder)
    folders = _folders(folder)
    this = folders.index(final)
    for old in folders[:this] + folders[this + KEEP :]:  # a resume passed over the newer ones: they are broken
        shutil.rmtree(old)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and why each newer one was passed over."""
    skipped = []
    for path in _folders(folder):
        fault = _fault(path)
        if fault is None:
            try:
                tensors = load_file(path / _TENSORS)
            except (OSError, SafetensorError) as error:
                fault = str(error)
            else:
                values = read_json(path / _VALUES)
                assert values is not None
                return Checkpoint(tensors, values), skipped
        skipped.append(f"{path.name}: {fault}")
    return None, skipped


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every global random generator, as tensors and JSON values."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    version, keys, gauss = random.getstate()
    kind, words, position, has_gauss, cached = np.random.get_state()
    values = {
        "python": [version, list(keys), gauss],
        "numpy": [kind, words.tolist(), position, has_gauss, cached],
    }
    return tensors, values


def set_rng_state(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), position, has_gauss, cached))


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
    return None


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
