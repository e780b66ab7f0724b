"""Environments with other packages than the tests' own, made once and kept in the system's temporary folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TIMEOUT_S = 1800


def python_with(*packages: str) -> Path:
    """An interpreter that has these packages, such as transformers==4.57.6. Skips the test where none can be had."""
    key = hashlib.sha256(" ".join((sys.version, *packages)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fastpeft-readers-{os.getuid()}" / key
    python, done = folder / "bin" / "python", folder / "done"
    if done.is_file():
        return python
    try:
        run(sys.executable, "-m", "venv", "--clear", folder)
        for package in packages:  # torch first: what comes later must not choose another build of it
            run(python, "-m", "pip", "install", "--quiet", *package.split())
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"{' '.join(packages)} cannot be installed: {str(reason).strip().splitlines()[-1]}")
    done.touch()
    return python


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """What it prints. Raises CalledProcessError."""
    words = [str(word) for word in command]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=clean | (env or {}))
    return done.stdout
