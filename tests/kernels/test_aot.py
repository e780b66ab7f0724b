"""Every kernel compiles for sm_80, sm_90 and sm_100: no spill, shared memory that fits, tensor cores used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "support"
FAMILIES = sorted(path.stem.removeprefix("aot_cases_") for path in FOLDER.glob("aot_cases_*.py"))


def compile_family(family: str, *flags: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "aot.py"), family, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(compiled: list[dict]) -> None:
    assert compiled
    bad = [f"{c['kernel']} sm_{c['architecture']} {c['constants']}: {c['problems']}" for c in compiled if c["problems"]]
    assert not bad, "\n".join(bad)


def test_every_family_of_kernels_has_cases():
    there = {path.parent.name for path in (ROOT / "fastpeft" / "kernels" / "ops").glob("*/kernel.py")}
    assert there == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles(family):
    check(compile_family(family))


@pytest.mark.soak
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_with_every_config(family):
    compiled = compile_family(family, "--all")
    check(compiled)
    print(family, dict(Counter(c["kernel"] for c in compiled)))
