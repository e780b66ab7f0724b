"""The journal survives what happens to files: a kill while it is written, a full disk, a lock that stays."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from fastpeft.errors import UserError
from fastpeft.sweep.journal import JournalError, JournalFile, open_journal


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.log"


def test_what_is_written_is_read_by_optuna_itself(path):
    study = optuna.create_study(storage=open_journal(path), study_name="a")
    study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 0.5)
    own = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    assert optuna.load_study(storage=own, study_name="a").best_value == 0.5


@pytest.mark.parametrize("torn", [b"{", b'{"op_code":4,"wor', b"\xff\x00"])
def test_a_line_that_a_kill_cut_off_is_taken_away(path, torn):
    study = optuna.create_study(storage=open_journal(path), study_name="a")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = optuna.load_study(storage=open_journal(path), study_name="a")
    assert path.read_bytes() == whole
    path.write_bytes(whole + torn)  # and by a process that has it open
    again.ask()
    assert len(lines(path)) == len(whole.splitlines()) + 1
    assert len(study.trials) == 1


def test_a_journal_that_is_no_journal_is_refused(path):
    path.write_text("accuracy 0.9\n")
    with pytest.raises(JournalError, match=r"is no journal of Optuna, or is damaged"):
        open_journal(path)
    (path.parent / "folder").mkdir()
    with pytest.raises(JournalError, match=r"cannot be opened"):
        open_journal(path.parent / "folder")


def test_a_lock_that_another_process_keeps_is_said(path):
    JournalFile(path)
    with path.with_name("journal.log.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(JournalError, match=r"journal\.log\.lock is locked by another process") as caught:
            JournalFile(path, lock_timeout_s=0.05).append_logs([{"a": 1}])
    assert caught.value.exit_code == 2
    JournalFile(path).append_logs([{"a": 1}])
    assert lines(path) == [{"a": 1}]


def test_the_lock_of_a_killed_process_is_free(path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fastpeft.sweep.journal import KernelLock\n"
        f"lock = KernelLock(Path({str(path.with_name('journal.log.lock'))!r}))\n"
        "lock.__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -9
    JournalFile(path, lock_timeout_s=0.05).append_logs([{"a": 1}])


def test_a_full_disk_leaves_whole_lines_and_says_so(path):
    """A limit on the file's size: the kernel takes part of a line and refuses the rest, as a full disk does."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from fastpeft.sweep.journal import JournalFile, JournalError\n"
        f"journal = JournalFile(Path({str(path)!r}))\n"
        "journal.append_logs([{'a': 1}])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try:\n"
        "    journal.append_logs([{'b': 'x' * 100}])\n"
        "except JournalError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "journal.log cannot be written: File too large" in done.stdout, done.stderr
    assert path.read_text() == '{"a":1}\n'


def test_no_space_left_is_the_users_to_mend(path, monkeypatch):
    study = optuna.create_study(storage=open_journal(path), study_name="a")
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\. What is in it is kept"):
        study.ask()
    monkeypatch.undo()
    assert path.read_bytes() == before
    study.tell(study.ask(), 1.0)
    assert [trial.number for trial in optuna.load_study(storage=open_journal(path), study_name="a").trials] == [0]
