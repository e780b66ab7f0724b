"""Checkpoints: whole or absent, whatever happens to their files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpeft.trainer import checkpoint as module
from fastpeft.trainer.checkpoint import Checkpoint, newest_checkpoint, rng_state, save_checkpoint, set_rng_state

FILES = ("state.safetensors", "state.json", "manifest.json")


def make(step: int) -> Checkpoint:
    tensors = {
        "flat": torch.arange(100, dtype=torch.float32) * step,
        "transposed": torch.arange(6.0).reshape(2, 3).T * step,
        "count": torch.tensor(step),
        "rng": torch.arange(50, dtype=torch.uint8),
    }
    return Checkpoint(tensors, {"steps": step, "schedule": {"ended_at": None}, "elapsed_s": 0.1 * step})


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, make(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.values == make(step).values
    expected = make(step).tensors
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_reads_back_what_was_saved_and_keeps_the_newest_two(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    save(tmp_path, 3, 6, 9)
    assert names(tmp_path) == ["step-00000006", "step-00000009"]
    found, skipped = newest_checkpoint(tmp_path)
    assert_is(found, 9)
    assert skipped == []


def test_order_is_by_number_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 99_999_998, 99_999_999, 100_000_001)
    assert names(tmp_path) == ["step-100000001", "step-99999999"]
    assert_is(newest_checkpoint(tmp_path)[0], 100_000_001)


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3)
    other = Checkpoint(make(3).tensors, {"steps": 3, "again": True})
    save_checkpoint(tmp_path, 3, other)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.values["again"]


def test_manifest_fingerprints_every_other_file(tmp_path: Path) -> None:
    import hashlib

    save(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    assert names(folder) == sorted(FILES)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in FILES[:2]:
        content = (folder / name).read_bytes()
        assert manifest[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def truncate(path: Path, rng: random.Random) -> None:
    # The last byte of a JSON file is a line end, which nothing depends on.
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) - 1)])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def grow(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes([rng.randrange(1, 9)]))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def become_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip, empty, grow, delete, become_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_named_and_passed_over(damage, name: str, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for trial in range(1 if damage in (empty, delete, become_a_folder) else 6):
        folder = tmp_path / str(trial)
        save(folder, 3, 6)
        damage(folder / "step-00000006" / name, rng)
        found, skipped = newest_checkpoint(folder)
        assert_is(found, 3)
        assert len(skipped) == 1
        assert skipped[0].startswith("step-00000006: ")
        assert name in skipped[0] or name == "manifest.json"


def test_all_broken_is_none_and_every_fault_is_named(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    save(tmp_path, 3, 6)
    flip(tmp_path / "step-00000006" / "state.safetensors", rng)
    delete(tmp_path / "step-00000003" / "state.json", rng)
    found, skipped = newest_checkpoint(tmp_path)
    assert found is None
    assert skipped == [
        "step-00000006: state.safetensors is not what was written",
        "step-00000003: state.json is missing",
    ]


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    shutil.copy(tmp_path / "step-00000003" / "state.safetensors", tmp_path / "step-00000006")
    assert_is(newest_checkpoint(tmp_path)[0], 3)


def test_a_broken_newer_one_does_not_push_out_a_valid_one(tmp_path: Path, seed: int) -> None:
    """After a fall back, or a new start, the steps count from below the broken ones."""
    save(tmp_path, 90, 120)
    for step in (90, 120):
        flip(tmp_path / f"step-{step:08d}" / "state.json", random.Random(seed))
    save(tmp_path, 3)
    assert_is(newest_checkpoint(tmp_path)[0], 3)
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("call", ["save_file", "write_json", "_fsync"])
@pytest.mark.parametrize("when", [1, 2])
def test_a_save_that_is_cut_off_leaves_the_older_one(
    call: str, when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3)
    original, count = getattr(module, call), 0

    def dies(*args: object) -> object:
        nonlocal count
        count += 1
        if count == when:
            raise Killed
        return original(*args)

    monkeypatch.setattr(module, call, dies)
    if call == "save_file" and when == 2:
        save(tmp_path, 6)  # there is one such call a save: the second save dies
        with pytest.raises(Killed):
            save(tmp_path, 9)
        last = 6
    else:
        with pytest.raises(Killed):
            save(tmp_path, 6)
        last = 3
    leftovers = list(tmp_path.glob(".writing-*"))
    assert len(leftovers) == 1
    found, skipped = newest_checkpoint(tmp_path)
    assert_is(found, last)
    assert skipped == []
    monkeypatch.undo()
    save(tmp_path, 12)
    assert names(tmp_path) == [f"step-{last:08d}", "step-00000012"]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 3, 6, 9)
    assert names(tmp_path) == ["notes.txt", "step-00000006", "step-00000009", "step-x"]


def draw() -> tuple[list[float], list[float], list[float]]:
    return [random.random(), random.gauss(0, 1)], [*np.random.rand(3), np.random.randn()], torch.rand(4).tolist()


def test_rng_round_trip_through_a_file(tmp_path: Path, seed: int) -> None:
    before = rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        draw()  # both gauss caches hold a half-used pair now
        tensors, values = rng_state()
        save_checkpoint(tmp_path, 1, Checkpoint(tensors, {"rng": values}))
        expected = draw()
        draw()
        loaded, _ = newest_checkpoint(tmp_path)
        assert loaded is not None
        set_rng_state(loaded.tensors, loaded.values["rng"])
        assert draw() == expected
    finally:
        set_rng_state(*before)
