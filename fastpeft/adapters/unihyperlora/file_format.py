"""The file of an adapter: one safetensors of int8 and packed 4-bit tensors, with a JSON header in its metadata.

The header holds the format's version, the sizes that determine the shape of every tensor, the tasks, a description of
the source host, and a SHA-256 of the tensors. A file that contradicts its header is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from fastpeft.adapters.unihyperlora.dictionary import PROJECTORS, Dictionary, Shape
from fastpeft.adapters.unihyperlora.mixer import HIDDEN as MIXER_HIDDEN
from fastpeft.adapters.unihyperlora.mixer import NUM_CONDITIONS
from fastpeft.adapters.unihyperlora.probe import NUM_WORDS, Codes, Space
from fastpeft.adapters.unihyperlora.projectors import HIDDEN as PROJECTOR_HIDDEN
from fastpeft.adapters.unihyperlora.quantise import dequantise, pack_int4, quantise, unpack_int4
from fastpeft.adapters.unihyperlora.router import EMBEDDING
from fastpeft.errors import UserError

FILE = "unihyperlora.safetensors"
FORMAT = 1
LARGEST_BYTES = 64 * 2**20
"""Upper limit on the size of a file. Larger files are refused unread."""
_HEADER = "unihyperlora"
_BITS = {
    "atoms.u": 8,
    "atoms.v": 8,
    "atoms.psi": 8,
    "router.keys": 8,
    "mixer.first": 4,
    "mixer.second": 4,
    "mixer.delta": 4,
}
"""Parameters that are stored quantised; the others are stored in fp32."""
_LIMITS = {"num_atoms": 4096, "atom_width": 4096, "width": 256, "top_k": 2}


@dataclass(frozen=True)
class Stored:
    """Contents of a file."""

    shape: Shape
    host: dict[str, Any]
    parameters: dict[str, torch.Tensor]
    """Parameters in fp32, by their names in the Dictionary."""
    codes: Codes | None
    """Codes of the projector `probe`; None for the other projectors."""
    num_bytes: int


def encode(dictionary: Dictionary, host: Mapping[str, Any], codes: Codes | None = None) -> bytes:
    """The bytes of the file. Equal quantised values give equal bytes.

    Args:
        host: description of the source host, JSON values.
        codes: codes of the projector `probe`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in dictionary.named_parameters():
        value = parameter.detach().cpu()
        if name not in _BITS:
            tensors[name] = value.float().contiguous()
            continue
        quantised, scale = quantise(value, _BITS[name])
        tensors[name] = quantised if _BITS[name] == 8 else pack_int4(quantised)
        tensors[f"{name}.scale"] = scale
    spaces: list[list[Any]] = []
    if codes is not None:
        tensors["codes"], tensors["codes.scale"] = codes.codes_NQW.contiguous(), codes.scale_NQ.contiguous()
        spaces = [[space.depth, space.what] for space in codes.spaces]
    header = {"format": FORMAT, **asdict(dictionary.shape), "host": dict(host), "spaces": spaces}
    header["sha256"] = _digest(tensors)
    return serialise(tensors, metadata={_HEADER: json.dumps(header)})


def decode(path: Path) -> Stored:
    """Read and check a file.

    Raises:
        UserError: the file is missing, damaged, truncated, of a newer version, or larger than its header says.
    """
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _HEADER not in metadata:
                raise UserError(
                    f"{path}: is a safetensors file, and no UniHyperLoRA adapter: its header says nothing of one"
                )
            header = _read_header(path, metadata[_HEADER])
            shape = Shape(**{key: header[key] for key in Shape.__dataclass_fields__})
            expected = _expected(shape, len(header["spaces"]))
            _check_tensors(path, file, expected)
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged or cut off, and is not read: {error}") from None
    if _digest(tensors) != header["sha256"]:
        raise UserError(f"{path}: is damaged: its tensors are not those that its header has the SHA-256 of")
    return Stored(
        shape, header["host"], _parameters(path, shape, tensors), _codes(header, tensors), path.stat().st_size
    )


def restore(dictionary: Dictionary, stored: Stored) -> None:
    """Copy the values of a file into a dictionary of the same shape."""
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.copy_(stored.parameters[name])


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path}: is no file; name the adapter's own, which a run keeps as adapter/{FILE}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size > LARGEST_BYTES:
        raise UserError(f"{path}: is {size / 2**20:.0f} MB, and an adapter has at most {LARGEST_BYTES / 2**20:.0f}")


def _read_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["format"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format {version!r}")
        if version > FORMAT:
            raise UserError(
                f"{path}: is of format {version}, and this version of fastpeft reads up to {FORMAT}: take a newer one"
            )
        for key, most in _LIMITS.items():
            if type(header[key]) is not int or not 1 <= header[key] <= most:
                raise ValueError(f"{key} {header[key]!r}, of which there can be 1 to {most}")
        header["tasks"] = tuple(header["tasks"])
        header["alpha"] = float(header["alpha"])
        sound = 0 < len(header["tasks"]) <= 256 and all(isinstance(task, str) for task in header["tasks"])
        if not sound or header["projector"] not in PROJECTORS or not 0 < header["alpha"] < 1e6:
            raise ValueError(f"projector {header['projector']!r}, alpha {header['alpha']}, tasks {header['tasks']!r}")
        if (header["projector"] == "probe") != bool(header["spaces"]) or len(header["spaces"]) > 4096:
            raise ValueError(f"{len(header['spaces'])} canonical spaces for projector {header['projector']}")
        header["spaces"] = [Space(float(depth), str(what)) for depth, what in header["spaces"]]
        if not isinstance(header["host"], dict) or not isinstance(header["sha256"], str):
            raise ValueError("host or sha256 is missing")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its header is damaged: {type(error).__name__}: {error}") from None
    return header


def _expected(shape: Shape, num_spaces: int) -> dict[str, tuple[str, list[int]]]:
    """Name of each tensor -> its dtype, in safetensors' notation, and its shape."""
    m, d, q = shape.num_atoms, shape.atom_width, shape.width
    sizes = {
        "atoms.u": (m, d),
        "atoms.v": (m, d),
        "atoms.psi": (q, d),
        "mixer.first": (MIXER_HIDDEN, NUM_CONDITIONS + 1),
        "mixer.second": (m, MIXER_HIDDEN + 1),
        "mixer.delta": (m, NUM_CONDITIONS),
        "router.slope": (m,),
        "router.keys": (m, EMBEDDING),
        "router.embedding": (len(shape.tasks), EMBEDDING),
    }
    if shape.projector == "coordinate":
        sizes |= {"projector.first": (PROJECTOR_HIDDEN, 3), "projector.second": (q, PROJECTOR_HIDDEN)}
    found: dict[str, tuple[str, list[int]]] = {}
    for name, size in sizes.items():
        bits = _BITS.get(name)
        if bits is None:
            found[name] = "F32", list(size)
            continue
        found[name] = ("I8", list(size)) if bits == 8 else ("U8", [(size[0] * size[1] + 1) // 2])
        found[f"{name}.scale"] = "F32", [size[0]]
    if num_spaces:
        found |= {"codes": ("I8", [num_spaces, q, NUM_WORDS]), "codes.scale": ("F32", [num_spaces, q])}
    return found


def _check_tensors(path: Path, file: Any, expected: Mapping[str, tuple[str, list[int]]]) -> None:
    """Check names, dtypes and shapes before any tensor is read."""
    names = set(file.keys())
    if names != set(expected):
        lacking, more = sorted(set(expected) - names), sorted(names - set(expected))
        raise UserError(
            f"{path}: does not fit its header: it lacks {lacking or 'nothing'} and has {more or 'nothing'} more"
        )
    for name, (dtype, size) in expected.items():
        piece = file.get_slice(name)
        if (piece.get_dtype(), piece.get_shape()) != (dtype, size):
            found = f"{piece.get_dtype()} {piece.get_shape()}"
            raise UserError(f"{path}: does not fit its header: {name} is {found}, and {dtype} {size} is declared")


def _parameters(path: Path, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    with torch.device("meta"):
        sizes = {name: parameter.shape for name, parameter in Dictionary(shape).named_parameters()}
    for name, size in sizes.items():
        stored, bits = tensors[name], _BITS.get(name)
        if bits == 4:
            try:
                stored = unpack_int4(stored, (size[0], size[1]))
            except ValueError as error:
                raise UserError(f"{path}: is damaged: {name} holds {error}") from None
        found[name] = stored if bits is None else dequantise(stored, tensors[f"{name}.scale"])
        if not bool(found[name].isfinite().all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    return found


def _codes(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Codes | None:
    if not header["spaces"]:
        return None
    return Codes(tuple(header["spaces"]), tensors["codes"], tensors["codes.scale"])


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
