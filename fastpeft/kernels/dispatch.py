"""The choice between PyTorch and Triton for each call, and of the form and tile sizes.

A fused Triton kernel beats cuBLAS at some shapes and loses at others. So there is a table per GPU model, measured once
by `fastpeft doctor --tune` and kept in the user's cache. It holds the fastest form and its tiles per operation, dtype,
in, out, rank and bucket of T. A shape that the table lacks is computed by cuBLAS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

SMALLEST_BUCKET, LARGEST_BUCKET = 64, 65536


@dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel launch. Each kernel defines what the fields mean and which of them it reads."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Choice:
    """One row of a table."""

    form: str
    """`fused`: the Triton kernel; `split`: cuBLAS."""
    config: Config | None = None
    """Tiles of the fused form."""
    microseconds: dict[str, float] = field(default_factory=dict, compare=False)
    """Time per call of each form when the table was measured."""


Key = tuple[str, str, int, int, int, int]
"""operation, dtype, in, out, rank, bucket of T."""

_forced: dict[str, Choice] = {}


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 is set: Triton kernels then run on CPU tensors, in place of the CPU path."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether operations on `x` may use Triton. fp64 never does."""
    if x.dtype == torch.float64:
        return False
    return interpreting() or (x.is_cuda and has_triton())


@cache
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def bucket(num_tokens: int) -> int:
    """T rounded up to a power of two, within SMALLEST_BUCKET and LARGEST_BUCKET."""
    return min(LARGEST_BUCKET, max(SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length()))


def key_of(operation: str, dtype: torch.dtype, num_in: int, num_out: int, rank: int, num_tokens: int) -> Key:
    return (operation, str(dtype).removeprefix("torch."), num_in, num_out, rank, bucket(num_tokens))


def choose(operation: str, x: torch.Tensor, num_in: int, num_out: int, rank: int, num_tokens: int) -> Choice:
    """The measured choice for this shape on x's device; `split` where nothing was measured.

    On a CPU under the interpreter it is always `fused`, because the interpreter serves to run the kernels.
    """
    if _forced and operation in _forced:
        return _forced[operation]
    if not x.is_cuda:
        return _FUSED if interpreting() else _SPLIT
    return table(gpu_name(x.device.index)).get(key_of(operation, x.dtype, num_in, num_out, rank, num_tokens), _SPLIT)


_SPLIT, _FUSED = Choice("split"), Choice("fused")


@contextmanager
def forced(choice: Choice, *operations: str) -> Iterator[None]:
    """Use `choice` for these operations instead of the table: for the tuner, benchmarks and tests."""
    before = dict(_forced)
    _forced.update(dict.fromkeys(operations, choice))
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


# ---- tables ----------------------------------------------------------------------------------


@cache
def gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def table(gpu: str) -> dict[Key, Choice]:
    """All choices that the user has measured on one GPU model."""
    try:
        path = table_path(gpu)
    except ValueError:
        return {}
    # os.path.isfile is False, not an error, where a parent folder lacks permission
    return read_table(path) if os.path.isfile(path) else {}


def table_path(gpu: str) -> Path:
    """Path of the user's table of this GPU model. Raises ValueError if the user has no home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            raise ValueError("there is no home folder to keep a table in; set HOME or XDG_CACHE_HOME") from None
    return Path(root) / "fastpeft" / "kernels" / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower()) + ".json"


def is_tuned(gpu: str, dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]]) -> bool:
    """Whether this GPU's table has a forward entry of lora_linear for each (in, out, rank), at any T."""
    wanted = {(str(dtype).removeprefix("torch."), *shape) for shape in shapes}
    return wanted <= {key[1:5] for key in table(gpu) if key[0] == "lora_forward"}


def read_table(path: Path) -> dict[Key, Choice]:
    """The rows of a table. Raises ValueError, which names the file, if it is not a table."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return dict(map(_read_row, rows))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of kernel choices ({error}); delete it and tune again") from None


def _read_row(row: dict[str, Any]) -> tuple[Key, Choice]:
    key, form, config = tuple(row["key"]), row["form"], row["config"]
    if [type(part) for part in key] != [str, str, int, int, int, int] or not isinstance(form, str):
        raise ValueError(f"key {key} of form {form!r}")
    tiles = None if config is None else Config(**config)
    if tiles is not None and not all(type(size) is int and size > 0 for size in vars(tiles).values()):
        raise ValueError(f"key {key} of {tiles}")
    return key, Choice(form, tiles, dict(row["microseconds"]))


def write_table(path: Path, rows: dict[Key, Choice], about: dict[str, str]) -> None:
    """Write a table with a header `about` (GPU, versions, date). The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {**about, "rows": [{"key": list(key), **asdict(choice)} for key, choice in sorted(rows.items())]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    table.cache_clear()
