"""A run's folder: its name, its lock, and small files that are whole or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastpeft.runs import store
from fastpeft.runs.store import (
    DEAD_AFTER_S,
    Result,
    RunError,
    RunFolder,
    default_name,
    list_runs,
    read_json,
    recover_folder,
    replaced_folder,
    write_json,
)
from tests.support.file_limit import files_of_at_most

LOCKER = """
import sys
from pathlib import Path
from fastpeft.runs.store import RunFolder
from tests.support.file_limit import files_of_at_most
RunFolder(Path(sys.argv[1])).lock()
"""
HOLDER = LOCKER.replace("RunFolder(Path", "folder = RunFolder(Path").replace(").lock()", "); folder.lock()") + (
    "print('locked', flush=True); sys.stdin.read()"
)


def make(tmp_path: Path, name: str, config: str = "run_id: x\n") -> RunFolder:
    folder = RunFolder.at(tmp_path, name)
    folder.create()
    folder.config.write_text(config)
    folder.unlock()
    return folder


# ---- names ---------------------------------------------------------------------------------

NO_NAMES = [
    "", ".", "..", "../x", "a/b", "/abs", "a/../b", "..\\x", "a\\b", ".hidden", "-x", "--resume", "_x", "a b", "a\nb",
    "a\n",    "a\0b", "é", "a\u202eb", "\uff41", "٣", "a:b", "a*", "~", "$HOME", "a;b", "x" * 129, "x" * 200, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_plain_folder_name_is_refused(name, tmp_path):
    with pytest.raises(RunError, match="cannot name a run") as caught:
        RunFolder.at(tmp_path, name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "7", "A.b_c-d", "x" * 128, "lora_mnli-20250101-120000", "a..b", "con"])
def test_a_plain_name_is_a_folder_right_under_the_results(name, tmp_path):
    folder = RunFolder.at(tmp_path, name)
    folder.create()
    assert folder.path.parent == tmp_path
    assert folder.path.is_dir()
    folder.unlock()


def test_random_names_never_leave_the_results_folder(tmp_path, seed):
    rng = random.Random(seed)
    num_taken = 0
    for _ in range(3000):
        name = "".join(rng.choices("ab9._-/\\~ \n\0é:", k=rng.randint(0, 6)))
        try:
            path = RunFolder.at(tmp_path, name).path
        except RunError:
            continue
        num_taken += 1
        assert Path(os.path.normpath(path)).parent == tmp_path, name
        assert path.name == name
    assert num_taken > 0


def test_the_default_name_is_the_run_and_the_time():
    assert re.fullmatch(r"lora_mnli-\d{8}-\d{8}", default_name("lora_mnli"))
    assert RunFolder.at(Path("results"), default_name("x" * 100))


# ---- folders and locks ---------------------------------------------------------------------


def test_a_taken_name_is_refused_and_the_run_is_left_alone(tmp_path):
    make(tmp_path, "a")
    with pytest.raises(RunError, match=r"has this name.*--resume"):
        RunFolder.at(tmp_path, "a").create()
    assert (tmp_path / "a" / "run.yaml").read_text() == "run_id: x\n"


def test_a_folder_or_file_that_is_no_run_is_in_the_way(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "broken"):
        with pytest.raises(RunError, match="in the way"):
            RunFolder.at(tmp_path, name).create()


def test_results_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.at(tmp_path / "file", "a").create()


def test_one_of_many_that_create_the_same_run_at_once_gets_it(tmp_path):
    won, lost = [], []
    start = threading.Barrier(8)

    def create() -> None:
        folder = RunFolder.at(tmp_path / "results", "a")
        start.wait()
        try:
            folder.create()
            won.append(folder)
        except RunError:
            lost.append(folder)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_another_process_cannot_lock_a_run_that_is_being_trained(tmp_path):
    folder = RunFolder.at(tmp_path, "a")
    folder.create()
    tried = subprocess.run([sys.executable, "-c", LOCKER, folder.path], capture_output=True, text=True)
    assert tried.returncode != 0
    assert "is being trained by another process" in tried.stderr
    folder.unlock()
    subprocess.run([sys.executable, "-c", LOCKER, folder.path], check=True)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    folder = make(tmp_path, "a")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RunError, match="another process"):
        folder.lock()
    holder.kill()
    holder.wait()
    folder.lock()
    folder.unlock()


def test_a_refused_lock_leaves_the_one_that_is_held(tmp_path):
    folder = make(tmp_path, "a")
    folder.lock()
    for _ in range(2):
        with pytest.raises(RunError):
            folder.lock()
    with pytest.raises(RunError):
        RunFolder(folder.path).lock()
    folder.unlock()
    folder.unlock()
    RunFolder(folder.path).lock()


# ---- small files ---------------------------------------------------------------------------


def test_json_is_strict_and_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"nan": math.nan, "list": [math.inf, {"x": -math.inf}], "text": "é雪\n", "n": 0.1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_json(tmp_path / "a.json") == {"nan": "nan", "list": ["inf", {"x": "-inf"}], "text": "é雪\n", "n": 0.1}


def test_a_file_that_is_cut_off_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"steps": 1})
    with files_of_at_most(8), pytest.raises(OSError, match="File too large"):
        write_json(path, {"steps": 2})
    assert read_json(path) == {"steps": 1}
    write_json(path, {"steps": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_at_any_point_leaves_the_old_file_whole(fails, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"steps": 1})

    def fail(*arguments):
        raise OSError("no space left")

    if fails == "fsync":
        monkeypatch.setattr(store.os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"steps": 2})
    monkeypatch.undo()
    assert read_json(path) == {"steps": 1}
    write_json(path, {"steps": 3})
    assert read_json(path) == {"steps": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_what_is_no_json_leaves_the_old_file_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": [1] * 10_000, "b": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path, total = tmp_path / "a.json", 100
    write_json(path, {"i": 0, "filling": ["x"] * 2000})

    def write() -> None:
        for i in range(1, total):
            write_json(path, {"i": i, "filling": ["x"] * 2000})

    writer = threading.Thread(target=write)
    writer.start()
    last = 0
    while writer.is_alive():
        values = read_json(path)
        assert values is not None
        assert len(values["filling"]) == 2000
        assert values["i"] >= last
        last = values["i"]
    writer.join()
    assert read_json(path)["i"] == total - 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"\x00" * 100, b"{'a': 1}"])
def test_a_file_that_is_no_json_object_reads_as_none(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path) is None
    assert read_json(tmp_path / "missing.json") is None


def test_a_result_comes_back(tmp_path):
    folder = make(tmp_path, "a")
    assert folder.read_result() is None
    result = Result(
        run_id="x", name="a", metric={"name": "accuracy", "value": 0.5}, best={"value": 0.6, "step": 7}, energy_j=1.5,
        budget={"kind": "steps", "limit": 10, "spent": 7.0}, tokens=10**12, git="abc",
    )  # fmt: skip
    folder.write_result(result)
    assert folder.read_result() == result


def test_a_result_of_a_newer_version_is_read_and_half_a_one_is_not(tmp_path):
    folder = make(tmp_path, "a")
    folder.result.write_text(json.dumps({"run_id": "x", "name": "a", "invented_later": 3}))
    assert folder.read_result() == Result(run_id="x", name="a")
    folder.result.write_text('{"run_id": "x"}')
    assert folder.read_result() is None


def test_every_field_of_a_result_is_json(tmp_path):
    folder = make(tmp_path, "a")
    folder.write_result(Result(run_id="x", name="a"))
    assert set(json.loads(folder.result.read_text())) == {field.name for field in dataclasses.fields(Result)}


def test_runs_are_listed_by_age_and_other_folders_are_not(tmp_path):
    for i, name in enumerate(["c", "a", "b"]):
        folder = make(tmp_path, name)
        os.utime(folder.config, (1000 + i, 1000 + i))
    (tmp_path / "no_run").mkdir()
    (tmp_path / "run.yaml").touch()
    assert [folder.path.name for folder in list_runs(tmp_path)] == ["c", "a", "b"]
    assert list(list_runs(tmp_path / "missing")) == []
    assert list(list_runs(tmp_path / "run.yaml")) == []


def test_a_running_run_without_heartbeat_is_dead(tmp_path):
    folder = RunFolder.at(tmp_path, "one")
    folder.create()
    assert folder.status() == "no result"
    folder.write_result(Result(run_id="r", name="one"))
    folder.events.write_text('{"type":"run"}\n')
    assert folder.status() == "running"
    long_ago = time.time() - 2 * DEAD_AFTER_S
    os.utime(folder.events, (long_ago, long_ago))
    assert folder.status() == "dead"
    folder.write_result(Result(run_id="r", name="one", status="done"))
    assert folder.status() == "done"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_replaced_whole(tmp_path, there):
    target = tmp_path / "adapter_best"
    if there:
        target.mkdir()
        (target / "old").touch()
    with replaced_folder(target) as folder:
        (folder / "new").touch()
        assert [p.name for p in target.glob("*")] == (["old"] if there else [])
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_best"]


def test_a_folder_that_was_being_replaced_is_recovered(tmp_path, monkeypatch):
    target = tmp_path / "adapter_best"
    with replaced_folder(target) as folder:
        (folder / "first").touch()
    rename = Path.rename

    def die(self, other):
        if self.name.endswith("writing"):
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt), replaced_folder(target) as folder:
        (folder / "second").touch()
    monkeypatch.undo()
    assert not target.exists()
    recover_folder(target)
    assert [p.name for p in target.iterdir()] == ["first"]
    recover_folder(target)
