"""Checkpoints: whole or absent, whatever happens to their files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastpeft.trainer import checkpoint_files as module
from fastpeft.trainer import checkpointing
from fastpeft.trainer.checkpoint_files import Checkpoint, CheckpointError, State, newest_checkpoint, save_checkpoint
from fastpeft.trainer.checkpointing import Checkpointing
from fastpeft.trainer.rng import GlobalRng, rng_state, set_rng_state

FILES = ("state.safetensors", "state.json", "manifest.json")


def make(step: int) -> Checkpoint:
    parts = {
        "parameters": {"data": torch.arange(100, dtype=torch.float32) * step},
        "optimizer": {"count": torch.tensor(step), "inner": {"transposed": torch.arange(6.0).reshape(2, 3).T * step}},
        "rng": {"cpu": torch.arange(50, dtype=torch.uint8), "python": [3, [1, 2], None]},
        "schedule": {"ended_at": None, "scales": {}},
        "clock": {"elapsed_s": 0.1 * step},
        "adapter": {},
    }
    return Checkpoint(step, 10 * step, parts)


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, make(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.events_bytes) == (step, 10 * step)
    assert_same(found.parts, make(step).parts)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        elif isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


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
    save_checkpoint(tmp_path, Checkpoint(3, 30, make(3).parts | {"again": {"is": True}}))
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.parts["again"] == {"is": True}


def test_manifest_fingerprints_every_other_file(tmp_path: Path) -> None:
    save(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    assert names(folder) == sorted(FILES)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in FILES[:2]:
        content = (folder / name).read_bytes()
        assert manifest[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def as_it_was_once_written(folder: Path, step: int) -> Path:
    """A checkpoint of the first format, which had no number: the tensors under their parts' names, the values flat."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    save_file({"flat": torch.ones(4), "optimizer.step": torch.tensor(3.0)}, path / "state.safetensors")
    (path / "state.json").write_text(json.dumps({"steps": step, "elapsed_s": 1.0, "events_bytes": 0, "probes": {}}))
    contents = {name: (path / name).read_bytes() for name in FILES[:2]}
    fingerprints = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    (path / "manifest.json").write_text(json.dumps(fingerprints))
    return path


def test_a_checkpoint_of_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    old = as_it_was_once_written(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(tmp_path)
    for part in (str(old), "format 1", "reads format 3", "Resume the run with the version", "begin anew"):
        assert part in str(caught.value)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_later_format_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 7)
        save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"is a checkpoint of format 7, .* reads format 3"):
        newest_checkpoint(tmp_path)


def test_an_older_one_of_another_format_is_not_asked_for_while_the_newest_is_good(tmp_path: Path, seed: int) -> None:
    as_it_was_once_written(tmp_path, 3)
    save(tmp_path, 6)
    assert_is(newest_checkpoint(tmp_path)[0], 6)
    flip(tmp_path / "step-00000006" / "state.json", random.Random(seed))
    with pytest.raises(CheckpointError, match="step-00000003 is a checkpoint of format 1"):
        newest_checkpoint(tmp_path)


def test_a_format_that_was_damaged_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    path = tmp_path / "step-00000006" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 4}))
    found, skipped = newest_checkpoint(tmp_path)
    assert_is(found, 3)
    assert skipped == ["step-00000006: manifest.json is not what was written"]


# ---- the registry of parts -------------------------------------------------------------------


class Part:
    def __init__(self, value: int) -> None:
        self.value, self.weights = value, torch.full((3,), float(value))

    def state_dict(self) -> State:
        return {"value": self.value, "weights": self.weights}

    def load_state_dict(self, state: State) -> None:
        self.value = state["value"]
        self.weights.copy_(state["weights"])


def test_every_part_is_saved_and_restored(tmp_path: Path) -> None:
    first, second = ({"a": Part(start), "b": Part(start + 1)} for start in (1, 10))
    saving, restoring = (Checkpointing(tmp_path, parts) for parts in (first, second))
    with saving:
        saving.save(5, events_bytes=70)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    restoring.restore(checkpoint)
    assert [part.value for part in second.values()] == [1, 2]
    assert [part.weights.tolist() for part in second.values()] == [[1.0] * 3, [2.0] * 3]
    assert (checkpoint.events_bytes, saving.saved_at, restoring.saved_at) == (70, 5, 5)


def test_training_goes_on_while_a_checkpoint_is_written_as_it_was(tmp_path: Path, monkeypatch) -> None:
    may_write, part = threading.Event(), Part(1)

    def slow(folder: Path, checkpoint: Checkpoint) -> Path:
        assert may_write.wait(30)
        return save_checkpoint(folder, checkpoint)

    monkeypatch.setattr(checkpointing, "save_checkpoint", slow)
    with Checkpointing(tmp_path, {"a": part}) as saving:
        saving.save(5, events_bytes=0)
        assert newest_checkpoint(tmp_path) == (None, [])
        part.load_state_dict({"value": 2, "weights": torch.full((3,), 2.0)})
        may_write.set()
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.parts["a"]["value"] == 1
    assert checkpoint.parts["a"]["weights"].tolist() == [1.0] * 3


@pytest.mark.parametrize("is_last", [True, False])
def test_a_checkpoint_that_cannot_be_written_is_told_by_the_next_one_or_at_the_end(tmp_path, monkeypatch, is_last):
    def full(folder: Path, checkpoint: Checkpoint) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpointing, "save_checkpoint", full)
    saving = Checkpointing(tmp_path, {"a": Part(1)})
    saving.save(5, events_bytes=0)
    with pytest.raises(OSError, match="No space"):
        saving.__exit__() if is_last else saving.save(6, events_bytes=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("abc", "the checkpoint of step 5 lacks the part c. Resume"),
        ("a", "the checkpoint of step 5 has a part b that is not known here. Resume"),
        ("ac", "lacks the part c and has a part b that is not known here. Resume"),
    ],
)
def test_other_parts_are_refused_by_name_and_nothing_is_restored(names: str, message: str, tmp_path: Path) -> None:
    with Checkpointing(tmp_path, {"a": Part(1), "b": Part(2)}) as saving:
        saving.save(5, events_bytes=0)
    checkpoint, _ = newest_checkpoint(tmp_path)
    parts = {name: Part(10) for name in names}
    with pytest.raises(CheckpointError, match=message):
        Checkpointing(tmp_path, parts).restore(checkpoint)
    assert {part.value for part in parts.values()} == {10}


def test_a_name_that_could_be_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a/b'"):
        save_checkpoint(tmp_path, Checkpoint(1, 0, {"adapter": {"a/b": torch.zeros(1)}}))


# ---- damage ----------------------------------------------------------------------------------


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
        save_checkpoint(tmp_path, Checkpoint(1, 0, {"rng": GlobalRng().state_dict()}))
        expected = draw()
        draw()
        loaded, _ = newest_checkpoint(tmp_path)
        assert loaded is not None
        GlobalRng().load_state_dict(loaded.parts["rng"])
        assert draw() == expected
    finally:
        set_rng_state(before)
