"""Style of the figures, and their files: PDF with embedded fonts, PNG, and SVG for the HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.compare.plain_font import families
from fastpeft.runs.store import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Palette of Okabe and Ito, which colour-blind readers can tell apart. Its black is INK."""
INK = "#000000"
_LINES = ("-", "--", ":", "-.")
"""Line styles for more labels than colours."""
_DPI = 120
_PNG = {"compress_level": 1}
"""A quarter of the time of Pillow's default level."""
_RC: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.unicode_minus": False,  # U+2212 is embedded as a font of its own, which takes 0.2 s
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#888888",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "path.simplify_threshold": 0.5,
}


@contextmanager
def drawing(title: str, size: tuple[float, float], results: Sequence[Result]) -> Iterator[Figure]:
    """A figure of `size` inches; the project's style applies inside the context."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = _RC | {"font.family": families()}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(mark_stand_ins(title, results))
        yield figure


def mark_stand_ins(text: str, results: Sequence[Result]) -> str:
    return f"{text} (STAND-IN: no numbers of a real model)" if any(r.stand_in for r in results) else text


def save(figure: Figure, stem: Path) -> str:
    """Write STEM.pdf and STEM.png. Returns SVG for a page, with a transparent background and INK as `currentColor`.

    To be called inside `drawing`.
    """
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)  # laid out once for all three
    figure.savefig(f"{stem}.pdf", metadata={"CreationDate": None})
    figure.savefig(f"{stem}.png", dpi=_DPI, pil_kwargs=_PNG)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):  # SVG ids stay unique within a page
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    return _themed(text.getvalue())


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace(INK, "currentColor")


def style_of(index: int) -> dict[str, str]:
    """Style of label `index`: a colour, and dashes once the palette is used up."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _LINES[index // len(COLOURS) % len(_LINES)],
    }
