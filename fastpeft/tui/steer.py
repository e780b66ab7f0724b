"""Start, stop, resume and delete runs. A trainer is a process with its own session, so it outlives the TUI."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastpeft.errors import UserError
from fastpeft.runs.events import Event, parse_event
from fastpeft.runs.store import RunFolder
from fastpeft.tui.format import printable

OUTPUT = "output.log"
"""File in a run's folder with the output of a trainer started from here."""
STARTING = ".starting"
"""Folder under the results folder for the output of trainers that have no run folder yet."""


class SteerError(UserError):
    """A run cannot be steered as asked; the message says why."""


@dataclass(kw_only=True)
class Order:
    """The options of `fastpeft train`."""

    run: str | None = None
    overrides: list[str] = field(default_factory=list)
    budget: str | None = None
    mode: str = "full"
    name: str
    """Name of the run's folder; with several seeds, of the group."""
    seed: int | None = None
    seeds: list[int] | None = None
    resume: bool = False
    no_stand_in: bool = False

    @property
    def folder_name(self) -> str:
        return self.name if self.seeds is None else f"{self.name}-seed{self.seeds[0]}"

    def arguments(self, results_dir: Path) -> list[str]:
        """The command line after `fastpeft`."""
        out = ["train"]
        for option, value in (("--run", self.run), ("--budget", self.budget), ("--seed", self.seed)):
            out += [] if value is None else [option, str(value)]
        out += [] if self.seeds is None else ["--seeds", ",".join(map(str, self.seeds))]
        out += ["--mode", self.mode] if self.mode != "full" else []
        out += ["--name", self.name, "--results-dir", str(results_dir)]
        out += ["--resume"] if self.resume else []
        out += ["--no-stand-in"] if self.no_stand_in else []
        return [*out, "--", *self.overrides] if self.overrides else out


class Launch:
    """A trainer that was started from here."""

    def __init__(self, name: str, folder: Path, output: Path, process: subprocess.Popen) -> None:
        self.name, self.folder, self.output = name, folder, output
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the trainer runs; the negated signal number if one killed it."""
        return self._process.poll()

    @property
    def failed(self) -> bool:
        """Whether it ended with an error: not done, not stopped with a checkpoint, not diverged."""
        return self.exit_code not in (None, 0, 4, 128 + signal.SIGINT, 128 + signal.SIGTERM)

    def settle(self) -> bool:
        """Move the output into the run's folder once that exists. True if it is there now."""
        home = self.folder / OUTPUT
        if self.output != home and (self.folder / "run.yaml").exists():
            with suppress(FileNotFoundError):  # another process moved it
                self.output.replace(home)
            self.output = home
        return self.output == home

    def forget(self) -> None:
        """Remove the output of a trainer that failed before its run had a folder."""
        if self.output != self.folder / OUTPUT:
            self.output.unlink(missing_ok=True)

    def text(self, last_bytes: int = 16_000) -> str:
        """The end of what the trainer printed."""
        return read_end(self.output, last_bytes)


def read_end(path: Path, last_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - last_bytes))
            return printable(file.read().decode(errors="replace").strip())
    except FileNotFoundError:
        return ""


def start(order: Order, results_dir: Path) -> Launch:
    """Start a trainer; with `order.resume`, one that continues a run.

    Raises:
        UserError: the name is taken or invalid; there is no run to continue; the results folder cannot be written.
    """
    results_dir = Path(results_dir).absolute()
    folder = RunFolder.at(results_dir, order.folder_name)
    goes_on = order.resume and folder.config.is_file()
    if order.resume and not goes_on and order.seeds is None:
        raise SteerError(f"--resume: there is no run {folder.path}")
    if not order.resume:
        folder.check_free()
    output = folder.path / OUTPUT if goes_on else results_dir / STARTING / f"{order.name}.log"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise SteerError(f"{output} cannot be written: {error.strerror}") from None
    try:
        if not goes_on:
            _take(file, order.name)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastpeft", *order.arguments(results_dir)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    finally:
        os.close(file)
    return Launch(order.name, folder.path, output, process)


def _take(file: int, name: str) -> None:
    """Lock the output file. The trainer inherits the lock, which is released when it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SteerError(f"{name} is being started already") from None
    os.ftruncate(file, 0)  # from an earlier start that failed


def left_behind(results_dir: Path) -> dict[str, str]:
    """Settle starts that no TUI watches any more. Output moves to its run's folder. If the trainer ended without one,
    the output is removed, and returned by name."""
    failed = {}
    for output in sorted((Path(results_dir) / STARTING).glob("*.log")):
        name = output.stem
        folders = [output.parent.parent / name, *output.parent.parent.glob(f"{name}-seed*")]
        home = next((folder for folder in folders if (folder / "run.yaml").exists()), None)
        if home is not None:
            with suppress(FileNotFoundError):
                output.replace(home / OUTPUT)
        elif not _is_locked(output):
            failed[name] = read_end(output, 16_000)
            output.unlink(missing_ok=True)
    return failed


def resume(folder: RunFolder) -> Launch:
    """Continue a run from its newest checkpoint.

    Raises:
        SteerError: the run is running or done.
    """
    status = folder.status()
    if status == "done":
        raise SteerError(f"{folder.path.name} is done: its budget is spent")
    if status == "running" and _is_locked(folder.path / ".lock"):
        raise SteerError(f"{folder.path.name} is running")
    return start(Order(name=folder.path.name, resume=True), folder.path.parent)


# ---- stopping ------------------------------------------------------------------------------


def stop(folder: RunFolder) -> int:
    """Send SIGTERM to the run's trainer, which finishes its step, saves a checkpoint and ends. Returns its pid.

    Only a process that holds this run's lock is signalled, never one that has since got the trainer's pid.

    Raises:
        SteerError: there is no such process, or it is on another host or another user's.
    """
    name, event = folder.path.name, last_run_event(folder.events)
    if event is None:
        raise SteerError(f"{name} is still being set up, or has no log: try again in a few seconds")
    pid, host = event.get("pid"), event.get("host")
    if host != socket.gethostname():
        raise SteerError(f"{name} runs on {host}: stop it there with `kill {pid}`")
    if not isinstance(pid, int):
        raise SteerError(f"{name} is not running: there is no process {pid}")
    try:
        handle = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        raise SteerError(f"{name} is not running: there is no process {pid}") from None
    try:
        if not _holds(pid, folder.path / ".lock"):
            raise SteerError(f"{name} is not running: process {pid} is another one now")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
    except PermissionError:
        raise SteerError(f"{name}: process {pid} belongs to another user") from None
    except ProcessLookupError:
        raise SteerError(f"{name} has just ended") from None
    finally:
        os.close(handle)
    return pid


def last_run_event(path: Path) -> Event | None:
    """The `run` event of a run's newest trainer."""
    mark = b'{"type":"run",'
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            at = len(text)
            while (at := text.rfind(mark, 0, at)) >= 0:
                end = text.find(b"\n", at)
                if end >= 0 and (at == 0 or text[at - 1 : at] == b"\n"):
                    event = parse_event(text[at:end])
                    if event is not None:
                        return event
    except (FileNotFoundError, ValueError):  # ValueError: an empty file
        return None
    return None


def _holds(pid: int, lock: Path) -> bool:
    """Whether the process has this lock file open."""
    try:
        wanted = lock.stat()
        open_files = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False
    for link in open_files:
        try:
            if os.path.samestat(link.stat(), wanted):
                return True
        except OSError:
            continue
    return False


# ---- deleting ------------------------------------------------------------------------------


def delete(results_dir: Path, name: str) -> None:
    """Delete a run's folder and its content. Links are removed, never followed.

    Raises:
        UserError: `name` is no run directly under the results folder, or a trainer owns it.
    """
    folder = RunFolder.at(Path(results_dir), name)
    with _directory(Path(results_dir)) as parent:
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            raise SteerError(f"there is no run {folder.path}") from None
        if stat.S_ISLNK(mode):
            raise SteerError(f"{folder.path} is a link to a folder elsewhere: remove it by hand")
        if not stat.S_ISDIR(mode) or not os.path.lexists(folder.config):
            raise SteerError(f"{folder.path} is no run's folder: it has no run.yaml")
        with _own(folder):
            doomed = f".deleted-{name}"
            if os.path.lexists(folder.path.with_name(doomed)):
                shutil.rmtree(doomed, dir_fd=parent)
            os.rename(name, doomed, src_dir_fd=parent, dst_dir_fd=parent)
        try:
            shutil.rmtree(doomed, dir_fd=parent)
        except OSError as error:
            raise SteerError(f"{folder.path.with_name(doomed)} cannot be removed: {error}") from None


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _own(folder: RunFolder) -> Iterator[None]:
    """Hold the run's lock, so that no trainer runs or starts meanwhile."""
    if folder.status() == "running" and _other_host(folder):
        raise SteerError(f"{folder.path.name} is running on another host")
    try:
        fd = os.open(folder.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise SteerError(f"{folder.path / '.lock'} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise SteerError(f"{folder.path.name} is running: stop it first") from None
    finally:
        os.close(fd)


def _other_host(folder: RunFolder) -> bool:
    event = last_run_event(folder.events)
    return event is not None and event.get("host") != socket.gethostname()


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# ---- showing -------------------------------------------------------------------------------


def open_folder(path: Path) -> bool:
    """Show a folder in the desktop's file manager. False if there is no desktop, as over SSH."""
    opener = shutil.which("xdg-open")
    remote = "SSH_CONNECTION" in os.environ
    if opener is None or remote or not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    quiet = subprocess.DEVNULL
    subprocess.Popen([opener, str(path)], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    return True
