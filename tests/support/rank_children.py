"""Real processes that are the ranks of a run, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.tiny_runs import POLL_S, has_event, write_run

ENDLESS = "budget=100000steps"
TIMEOUT_S = 300
"""Three processes load torch, on a machine that may do other things."""


def has_step(folder: Path, step: int) -> bool:
    return has_event(folder, lambda event: event["type"] == "step" and event["step"] >= step)


class RankChildren:
    """`python -m fastpeft train ...` on each of two ranks, as torch's launcher starts it."""

    def __init__(self, log: Path, *args: str, folders: tuple[Path, Path]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [log.with_suffix(f".{rank}") for rank in range(2)]
        self.ranks: list[subprocess.Popen] = []
        for rank, folder in enumerate(folders):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            command = [sys.executable, "-m", "fastpeft", "train", *args]
            with self.logs[rank].open("wb") as file:
                self.ranks.append(
                    subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder)
                )

    def ends(self) -> list[int]:
        return [rank.wait(TIMEOUT_S) for rank in self.ranks]

    def messages(self) -> list[str]:
        lines = [line for log in self.logs for line in log.read_text().splitlines()]
        assert not [line for line in lines if "Traceback" in line]
        return [line for line in lines if line.startswith("fastpeft: ")]

    def wait_for_step(self, folder: Path, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not has_step(folder, step):
            assert all(rank.poll() is None for rank in self.ranks), self.messages()
            assert time.monotonic() < deadline
            time.sleep(POLL_S)


@contextmanager
def children(files: Path, *args: str, second: Path | None = None) -> Iterator[RankChildren]:
    started = RankChildren(files / "log", *args, folders=(files, second or files))
    try:
        yield started
    finally:
        for rank in started.ranks:
            rank.kill()
            rank.wait()


def options(files: Path, *more: str) -> list[str]:
    run = files / "run.yaml"
    if not run.is_file():
        write_run(files)
    return ["--run", str(run), "--results-dir", str(files / "results"), "--name", "r", *more]
