"""The adapter's file: it holds what was scored to the bit, and one that is not whole is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpeft.adapters.unihyperlora import file_format
from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Shape
from fastpeft.adapters.unihyperlora.probe import NUM_WORDS, Codes, Space
from fastpeft.adapters.unihyperlora.quantise import quantise
from fastpeft.errors import UserError
from tests.support.atom_hosts import SMALL, dictionary

HOST = {"name": "some/host", "layers": 2, "width": 32}


def some_codes(shape: Shape, seed: int) -> Codes | None:
    if shape.projector != "probe":
        return None
    spaces = (Space(0.0, "in.hidden"), Space(1.0, "out.query"))
    draw = torch.Generator().manual_seed(seed)
    pairs = [quantise(torch.randn(shape.width, NUM_WORDS, generator=draw), 8) for _ in spaces]
    return Codes(spaces, torch.stack([c for c, _ in pairs]), torch.stack([s for _, s in pairs]))


def write(path: Path, shape: Shape = SMALL, seed: int = 0) -> Dictionary:
    made = dictionary(shape, seed)
    path.write_bytes(file_format.encode(made, HOST, some_codes(shape, seed)))
    return made


@pytest.mark.parametrize("projector", ["coordinate", "spectral", "probe"])
@pytest.mark.parametrize("num_atoms", [12, 13])
def test_a_file_gives_back_its_own_bits(projector: str, num_atoms: int, tmp_path: Path, seed: int) -> None:
    shape = Shape(**{**vars(SMALL), "projector": projector, "num_atoms": num_atoms})
    made = write(tmp_path / "a", shape, seed)
    stored = file_format.decode(tmp_path / "a")
    assert (stored.shape, stored.host) == (shape, HOST)
    other = Dictionary(shape)
    file_format.restore(other, stored)
    assert file_format.encode(other, stored.host, stored.codes) == (tmp_path / "a").read_bytes()
    c = torch.tensor([[0.3, 1, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 1]])
    for before, after in zip(made.fold(c, 1, [24]).gain_u, other.fold(c, 1, [24]).gain_u):
        assert torch.equal(before, after)
    assert torch.equal(made.fold(c, None, [24]).bias_M, other.fold(c, None, [24]).bias_M)


def test_the_papers_sizes_take_under_a_tenth_of_a_megabyte() -> None:
    size = len(file_format.encode(Dictionary(Shape()), HOST))
    assert 70_000 < size < 2**20 / 10


def change_header(path: Path, change: Callable[[dict], object]) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(json.loads(file.read(size))["__metadata__"]["unihyperlora"])
    change(header)
    save_file(load_file(path), path, metadata={"unihyperlora": json.dumps(header)})


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


BAD = {
    "nothing there": (lambda p: p.unlink(), "cannot be read: No such file"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "is damaged or cut off"),
    "cut off early": (lambda p: p.write_bytes(p.read_bytes()[:5]), "is damaged or cut off"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged or cut off"),
    "more behind": (lambda p: p.write_bytes(p.read_bytes() + b"more"), "is damaged or cut off"),
    "one bit": (flip, "SHA-256"),
    "another file": (lambda p: save_file({"x": torch.zeros(2)}, p), "no UniHyperLoRA adapter"),
    "newer": (lambda p: change_header(p, lambda h: h.update(format=2)), "format 2, and this version .* reads up to 1"),
    "no version": (lambda p: change_header(p, lambda h: h.pop("format")), "its header is damaged: KeyError"),
    "larger": (lambda p: change_header(p, lambda h: h.update(num_atoms=11)), "atoms.u is I8 .*and I8 .11, 20. is decl"),
    "huge": (lambda p: change_header(p, lambda h: h.update(num_atoms=10**9)), "num_atoms 1000000000, of which"),
    "too many atoms a token": (lambda p: change_header(p, lambda h: h.update(top_k=3)), "top_k 3, of which"),
    "projector": (lambda p: change_header(p, lambda h: h.update(projector="no")), "damaged.*projector 'no'"),
    "no codes": (lambda p: change_header(p, lambda h: h.update(projector="probe")), "0 canonical spaces"),
    "one more": (lambda p: change_tensors(p, lambda t: t.update(x=torch.zeros(1))), r"has \['x'\] more"),
    "one less": (lambda p: change_tensors(p, lambda t: t.pop("atoms.v")), r"it lacks \['atoms.v'\]"),
    "dtype": (lambda p: change_tensors(p, lambda t: t.update({"router.slope": torch.zeros(12).half()})), "is F16"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_whole_is_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    spoil, message = BAD[fault]
    spoil(path)
    with pytest.raises(UserError, match=message) as error:
        file_format.decode(path)
    assert str(path) in str(error.value)
    assert error.value.exit_code == 2


def test_a_larger_file_than_any_adapter_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    monkeypatch.setattr(file_format, "LARGEST_BYTES", 100)
    with pytest.raises(UserError, match="an adapter has at most"):
        file_format.decode(tmp_path / "a")
