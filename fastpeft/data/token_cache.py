"""Tokens on disk, by what they come from: rows, tokenizer, settings, code and versions, hashed.

An entry is a folder of .npy files and a list of their hashes. It is written beside its place and renamed into it, so
that there is none or a whole one; one that is damaged all the same is made anew. What is read is mapped: its pages are
the kernel's to drop and read again, and runs side by side share them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft._version import __version__

FORMAT = 1
LIMIT_BYTES = 8 * 2**30
"""Of all entries. Those that were read longest ago go first."""

Arrays = dict[str, np.ndarray]

_LIST = "entry.json"
_MAPPED_BYTES = 1 << 16
"""An array of fewer is read."""
_STALE_S = 24 * 3600
"""After so long without a change a folder that was never renamed is a killed run's."""


class _Use:
    """Of the cache, by one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []


_use: ContextVar[_Use | None] = ContextVar("token_cache", default=None)


@contextmanager
def in_use(is_on: bool, folder: Path | None = None) -> Iterator[list[str]]:
    """Inside, `cached` keeps what it makes. The list fills with what the user should know.

    Args:
        folder: fastpeft/tokens in the user's cache when absent.
    """
    folder = folder or cache_folder()
    use = _Use(folder) if is_on and folder is not None else None
    token = _use.set(use)
    notes = use.notes if use is not None else []
    if is_on and folder is None:
        notes.append("tokens are not kept: there is no home folder to keep them in; set HOME or XDG_CACHE_HOME")
    try:
        yield notes
    finally:
        _use.reset(token)


def cache_folder() -> Path | None:
    """None where the user has no home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "fastpeft" / "tokens"
    except RuntimeError:
        return None


def cached(
    make: Callable[[], Arrays],
    tokenizer: Any,
    texts: Iterable[Sequence[str] | None],
    settings: Mapping[str, Any],
) -> Arrays:
    """What `make` returns, made only where no entry has it. The arrays are not to be written to.

    Args:
        make: its code, file by file, is part of the key. What it raises leaves no entry.
        tokenizer: of transformers.
        texts: columns of everything that is tokenised; None for one that is not there.
        settings: everything else that the arrays depend on; JSON values.
    """
    use = _use.get()
    if use is None:
        return make()
    key = _key(make, tokenizer, texts, settings)
    if key is None:
        return make()
    entry = use.folder / key
    found = _read(entry)
    if found is not None:
        return found
    arrays = make()
    try:
        _write(entry, arrays)
    except OSError as error:
        fault = f"tokens are not kept in {use.folder}: {error.strerror or error}"
        use.notes += [fault] if fault not in use.notes else []
        return arrays
    return _read(entry) or arrays


# ---- keys ------------------------------------------------------------------------------------


def _key(
    make: Callable[[], Arrays], tokenizer: Any, texts: Iterable[Sequence[str] | None], settings: Mapping[str, Any]
) -> str | None:
    """None for a tokenizer, or for code, that cannot be told from another."""
    sources = Path(make.__code__.co_filename), Path(__file__).with_name("tokenise.py")
    parts = _tokenizer_parts(tokenizer)
    if parts is None or not all(source.is_file() for source in sources):
        return None
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8))
        digest.update(data)

    versions = {name: metadata.version(name) for name in ("transformers", "tokenizers", "numpy")}
    add(json.dumps([FORMAT, __version__, versions, settings], sort_keys=True).encode())
    for source in sources:
        add(source.read_bytes())
    for part in parts:
        add(part)
    for column in texts:
        add(b"" if column is None else str(len(column)).encode())
        for text in column or ():
            add(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _tokenizer_parts(tokenizer: Any) -> list[bytes] | None:
    """All that its tokens depend on: what a fast one is made of, or the files of a slow one."""
    arguments = {key: value for key, value in tokenizer.init_kwargs.items() if key != "name_or_path"}
    added = {str(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    about = [type(tokenizer).__qualname__, tokenizer.truncation_side, arguments, added]
    told = json.dumps(about, sort_keys=True, default=repr).encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()  # of the last call: each call sets its own
        backend.no_padding()
        return [told, backend.to_str().encode()]
    files = [Path(str(arguments.get(name))) for name in tokenizer.vocab_files_names]
    return [told, *(path.read_bytes() for path in files)] if all(path.is_file() for path in files) else None


# ---- entries ---------------------------------------------------------------------------------


def _read(entry: Path) -> Arrays | None:
    """None where there is no whole entry; what there is of it is removed."""
    if not entry.exists():
        return None
    try:
        listed = json.loads((entry / _LIST).read_bytes())
        arrays = {name: _read_array(entry / f"{name}.npy", sha256) for name, sha256 in listed.items()}
    except (OSError, ValueError, AttributeError):
        shutil.rmtree(entry, ignore_errors=True)
        return None
    with suppress(OSError):  # of another user
        os.utime(entry)
    return arrays


def _read_array(path: Path, sha256: str) -> np.ndarray:
    """Raises ValueError for any other bytes than were written."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{path} is damaged")
    is_mapped = path.stat().st_size > _MAPPED_BYTES
    return np.asarray(np.load(path, mmap_mode="r" if is_mapped else None, allow_pickle=False))


def _write(entry: Path, arrays: Arrays) -> None:
    if sum(array.nbytes for array in arrays.values()) > LIMIT_BYTES:
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        listed = {name: _write_array(partial / f"{name}.npy", array) for name, array in arrays.items()}
        _synced(partial / _LIST, lambda file: file.write(json.dumps(listed).encode()))
        if not entry.exists():  # else another run was as quick
            partial.rename(entry)
    except FileExistsError:
        pass
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _evict(entry)


def _write_array(path: Path, array: np.ndarray) -> str:
    """Returns the file's SHA-256."""
    _synced(path, lambda file: np.save(file, array, allow_pickle=False))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced(path: Path, write: Callable[[Any], object]) -> None:
    """On disk when it returns."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _evict(newest: Path) -> None:
    """Others, until all are within the limit, and what killed runs have left."""
    entries = []
    for folder in newest.parent.iterdir():
        with suppress(OSError):  # another run removes it
            changed_s = folder.stat().st_mtime
            if folder.name.startswith("."):
                if time.time() - changed_s > _STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                entries.append((changed_s, folder, sum(file.stat().st_size for file in folder.iterdir())))
    total = sum(size for *_, size in entries)
    for _, folder, size in sorted(entries):
        if total <= LIMIT_BYTES:
            break
        if folder != newest:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
