"""What the tests of comparisons share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn and not written as what they are, which takes a second each."""

    def save(figure: Figure, stem: Path) -> str:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".pdf", ".png"):
            stem.with_name(stem.name + suffix).write_text("a figure")
        return "<svg></svg>"

    for module in ("run_figures", "comparison_figures"):
        monkeypatch.setattr(f"fastpeft.compare.{module}.save", save)
