"""What is free is the least of what the machine has and what the control groups leave."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import pytest
import torch

from fastpeft import device_memory
from fastpeft.device_memory import (
    control_group_rooms,
    free_bytes,
    free_memory,
    high_water_bytes,
    is_out_of_memory,
    resident_bytes,
    unmeasured,
)

CPU = torch.device("cpu")
MB = 2**20


class Groups:
    """Control groups in a folder, and what /proc/self says of them."""

    def __init__(self, folder: Path) -> None:
        self.process, self.mount = folder / "self", folder / "sys"
        self.process.mkdir()
        self.mount.mkdir()

    def second(self, path: str, *, root: str = "/") -> Path:
        """A process in the group `path` of version 2, of which `root` is mounted."""
        self._say(f"0::{path}\n", f"31 23 0:29 {root} {self.mount} rw,relatime shared:9 - cgroup2 cgroup2 rw\n")
        return self.process

    def first(self, path: str, *, root: str = "/") -> Path:
        """The same of version 1, beside other controllers."""
        other = self.mount.parent / "cpu"
        self._say(
            f"5:cpu,cpuacct:/other\n4:memory:{path}\n0::/\n",
            f"31 23 0:28 / /proc rw - proc proc rw\n32 23 0:29 / {other} rw - cgroup cgroup rw,cpu,cpuacct\n"
            f"33 23 0:30 {root} {self.mount} rw,relatime - cgroup cgroup rw,memory\n",
        )
        return self.process

    def _say(self, groups: str, mounts: str) -> None:
        (self.process / "cgroup").write_text(groups)
        (self.process / "mountinfo").write_text(mounts)

    def limit(self, path: str, limit: str, usage: int = 0, cache: int = 0, version: int = 2) -> None:
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for name, value in zip(names, (limit, usage)):
            (folder / name).write_text(f"{value}\n")
        kind = "inactive_file" if version == 2 else "total_inactive_file"
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file 1\n{kind} {cache}\nactive_file 7\n")


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_version_2_counts_every_group_up_to_the_mount(groups: Groups) -> None:
    groups.limit("a/b", str(300 * MB), usage=100 * MB, cache=20 * MB)
    groups.limit("a", "max", usage=500 * MB)
    groups.limit(".", str(1000 * MB), usage=900 * MB)
    assert list(control_group_rooms(groups.second("/a/b"))) == [220 * MB, 100 * MB]


def test_version_1(groups: Groups) -> None:
    groups.limit("a/b", str(300 * MB), usage=100 * MB, cache=30 * MB, version=1)
    groups.limit("a", str(2**63 - 4096), usage=500 * MB, version=1)
    rooms = list(control_group_rooms(groups.first("/a/b")))
    assert rooms[0] == 230 * MB
    assert rooms[1] > 2**62


@pytest.mark.parametrize(("path", "root"), [("/docker/x", "/docker/x"), ("/docker/x", "/"), ("/", "/")])
def test_in_a_container_the_mount_may_be_its_own_group(path: str, root: str, groups: Groups) -> None:
    """Or the path may be the host's, of which nothing is to be seen."""
    groups.limit(".", str(64 * MB), usage=24 * MB)
    assert min(control_group_rooms(groups.second(path, root=root))) == 40 * MB


def test_what_is_over_its_limit_has_no_room(groups: Groups) -> None:
    groups.limit("a", str(10 * MB), usage=12 * MB)
    assert list(control_group_rooms(groups.second("/a"))) == [0]


def test_without_groups_none_limits(groups: Groups, tmp_path: Path) -> None:
    assert list(control_group_rooms(tmp_path / "nothing")) == []
    assert list(control_group_rooms(groups.second("/gone"))) == []


@pytest.mark.parametrize(("machine", "group", "free"), [(10, 7, 7), (5, 7, 5), (5, None, 5)])
def test_free_is_the_least_of_all(machine: int, group: int | None, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = machine * MB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(device_memory, "control_group_rooms", lambda: [] if group is None else [group * MB])
    assert free_bytes(CPU) == free * MB


def test_the_high_water_mark_stays_where_memory_was() -> None:
    before = high_water_bytes(CPU)
    held = torch.ones(max(64 * MB, before - resident_bytes(CPU) + 64 * MB) // 4)
    at_most = high_water_bytes(CPU)
    assert at_most >= before + 32 * MB
    assert resident_bytes(CPU) >= held.nbytes
    del held
    free_memory()
    assert high_water_bytes(CPU) >= at_most - MB  # the kernel counts in steps


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_is_freed_goes_back_to_the_machine() -> None:
    """Small blocks, every other one of which is freed: the heap's end is held."""
    blocks = [torch.ones(16 * 1024) for _ in range(4000)]  # 64 kB each
    kept = blocks[-1:]
    full = resident_bytes(CPU)
    del blocks
    free_memory()
    assert resident_bytes(CPU) <= full - 180 * MB
    assert kept


def test_what_a_cpu_cannot_give_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(("setting", "tokens"), [("auto", 4096), (7, 7)])
def test_a_number_for_who_does_not_measure(setting, tokens: int) -> None:
    assert unmeasured(setting) == tokens
