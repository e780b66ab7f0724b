"""Shared by all tests: no network, quiet threads, small models and data made on the spot."""

from __future__ import annotations

import os
import tempfile

# Before torch is loaded: see fastpeft.cli.main.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = f"{tempfile.gettempdir()}/fastpeft-tests-hf-home"  # what this machine has cached plays no part
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ["WANDB_MODE"] = "disabled"  # tests/trackers switches it on
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import importlib
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported whether its own library is interpreted, and torch._dynamo imports it early. Of
    # a kernel it decides when the module is imported, whichever test comes first.
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

        for path in sorted(
            (Path(__file__).resolve().parent.parent / "fastpeft" / "kernels" / "ops").glob("*/kernel.py")
        ):
            importlib.import_module(f"fastpeft.kernels.ops.{path.parent.name}.kernel")

from tests.support.row_files import write_equal_pairs
from tests.support.tiny import CAUSAL_FAMILIES, FAMILIES, make_causal_lm, make_model

# Examples are the same in every run, as the seed is; `make soak` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True)
if os.environ.get("FASTPEFT_TEST_SEED") != "random":
    hypothesis.settings.load_profile("fixed")

if TYPE_CHECKING:
    from tests.support.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parent.parent
SEED = 20


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a test tried to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this user has cached plays no part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def seed() -> int:
    """The same in every run, so that a failure comes again; FASTPEFT_TEST_SEED names another, or `random` a fresh one.

    pytest shows it when the test fails.
    """
    named = os.environ.get("FASTPEFT_TEST_SEED", str(SEED))
    value = secrets.randbelow(2**31) if named == "random" else int(named)
    print(f"FASTPEFT_TEST_SEED={value}")
    return value


@pytest.fixture
def fresh_seed() -> int:
    """Another in every run, for what has to hold whatever is drawn; FASTPEFT_TEST_SEED names the one that failed."""
    named = os.environ.get("FASTPEFT_TEST_SEED", "random")
    value = secrets.randbelow(2**31) if named == "random" else int(named)
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
def fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the stand-ins' rows: two steps read few of them, and drawing and encoding all takes longer."""
    from fastpeft.standins import dialogues, problems, sentence_pairs

    monkeypatch.setattr(problems, "NUM_TRAIN_PROBLEMS", 800)
    monkeypatch.setattr(problems, "NUM_TEST_PROBLEMS", 100)
    monkeypatch.setattr(dialogues, "NUM_TRAIN", 400)
    monkeypatch.setattr(sentence_pairs, "NUM_TRAIN_PAIRS", 2000)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def refused(self, code: int = 2) -> str:
        """The message of a command that must have failed in words."""
        assert self.code == code, self
        assert self.err.startswith("fastpeft: "), self
        assert self.err.count("fastpeft: ") == 1, self
        assert "Traceback" not in self.out + self.err
        return self.err


@pytest.fixture
def fastpeft_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., Outcome]:
    """Call the entry point in this process, in an empty folder."""
    from fastpeft.cli import commands as cli

    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fastpeft", *map(str, args)])
        capsys.readouterr()
        try:
            code = cli.main() or 0
        except SystemExit as exited:
            code = exited.code or 0
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def online_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """W&B is on, and its service is a server on loopback."""
    from tests.support.wandb_server import wandb_server

    with wandb_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE")
        yield server


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub on loopback that this process asks, with a cache of the test's own."""
    from tests.support.fake_hub import FakeHub, point_at

    with FakeHub().serve() as hub:
        point_at(hub, tmp_path / "hf_home", monkeypatch)
        yield hub


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    return write_equal_pairs(tmp_path / "pairs")


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups of projections that were computed together."""
    from fastpeft.models import fused_projections

    sizes: list[int] = []
    real = fused_projections.lora_linear_grouped

    def counted(x: torch.Tensor, weights: list[torch.Tensor], *args: object, **kwargs: object) -> object:
        sizes.append(len(weights))
        return real(x, weights, *args, **kwargs)

    monkeypatch.setattr(fused_projections, "lora_linear_grouped", counted)
    return sizes


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved encoder of each family; tests leave it as it is."""
    return {family: make_model(tmp_path_factory.mktemp("models") / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def causal_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved causal language model of each family; tests leave it as it is."""
    return {family: make_causal_lm(tmp_path_factory.mktemp("causal") / family, family) for family in CAUSAL_FAMILIES}
