"""Scripts of bench/, run as a user would: from a checkout that is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny import _settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ABSENT = ("pydantic", "datasets", "textual", "optuna", "wandb", "pynvml", "pyarrow", "tensorboard", "schedulefree")
_SITE = f"""
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
"""


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, nowhere installed."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "results")
    for name in ("fastpeft", "bench", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "kernels").symlink_to(os.readlink(ROOT / "kernels"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json alone."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps({"model_type": "deberta-v2"} | _settings("deberta-v2", 40)))
    return folder


@pytest.fixture
def script(checkout: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run bench/NAME of the copied checkout in a Python that lacks what a bare GPU machine lacks, children included."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_SITE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(name: str, *args: object, timeout: float = 240) -> subprocess.CompletedProcess:
        command = [sys.executable, str(checkout / "bench" / name), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=env)

    return run
