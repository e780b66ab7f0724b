"""The lowest releases that pyproject.toml allows, as a requirements file for pip-audit: `python .ci/floors.py`."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def floors(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """name==version of each dependency that every installation has."""
    found = []
    for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        lowest = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if len(lowest) != 1:
            raise SystemExit(f"{pyproject}: {text!r} has no lower bound; write {requirement.name}>=VERSION")
        found.append(f"{requirement.name}=={lowest[0]}")
    return found


if __name__ == "__main__":
    print("\n".join(floors()))
