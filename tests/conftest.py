"""Shared by all tests: no network, quiet threads, small models and data made on the spot."""

from __future__ import annotations

import os
import tempfile

# Before torch is loaded: see fastpeft.cli.main.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = f"{tempfile.gettempdir()}/fastpeft-tests-hf-home"  # what this machine has cached plays no part
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ["WANDB_MODE"] = "disabled"  # tests/trackers switches it on
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import random
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a test tried to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def seed() -> int:
    """Fresh for every run; pytest shows it when the test fails."""
    value = int(os.environ.get("FASTPEFT_TEST_SEED", secrets.randbelow(2**31)))
    print(f"FASTPEFT_TEST_SEED={value}")
    return value


@pytest.fixture
def fastpeft_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m fastpeft ...` in an empty folder; returns the finished process."""

    def run(*args: str, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fastpeft", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub on loopback that this process asks, with a cache of the test's own."""
    from fake_hub import FakeHub, point_at

    with FakeHub().serve() as hub:
        point_at(hub, tmp_path / "hf_home", monkeypatch)
        yield hub


def write_pairs(folder: Path, num_train: int = 96, num_dev: int = 32, seed: int = 0) -> Path:
    """A tiny learnable pair task: `train.jsonl` and `dev.jsonl` with labels yes / no."""
    rng = random.Random(seed)
    words = ["dog", "cat", "bird", "every", "some", "no", "ran", "slept", "the", "a"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", num_train), ("dev", num_dev)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                label = i % 2
                text = " ".join(rng.choices(words, k=rng.randint(3, 12)))
                other = text if label else " ".join(rng.choices(words, k=rng.randint(3, 12)))
                row = {"premise": text, "hypothesis": other, "label": ["no", "yes"][label]}
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs")
