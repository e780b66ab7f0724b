"""Each script of bench/ is run by its path, from a checkout whose `bench` nothing has installed."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = [path for path in BENCH.glob("*.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_puts_its_checkout_on_the_path_before_it_imports_from_it(path):
    lines = path.read_text().splitlines()
    own = [i for i, line in enumerate(lines) if line.startswith(("from bench", "import bench"))]
    inserted = [i for i, line in enumerate(lines) if line.startswith("sys.path.insert")]
    assert not own or (inserted and inserted[0] < own[0])
