"""The font of figures: DejaVu Sans for European scripts, without the tables for text shaping.

To embed the few glyphs of a figure, matplotlib subsets those tables for every PDF, which takes 0.2 s.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FALLBACK = "DejaVu Sans"
"""For glyphs that the reduced font lacks, and the only font outside `plain_font`."""
_FAMILY = "Fastpeft Sans"
_LETTERS = (*range(0x20, 0x250), *range(0x370, 0x530), *range(0x2010, 0x2040), 0x20AC, 0x2212)
"""Latin, Greek, Cyrillic, punctuation."""
_TABLES = ["GSUB", "GPOS", "GDEF", "kern", "MATH", "FFTM"]
_NAMES = (1, 3, 4, 6, 16)
"""Name IDs that are replaced: the font's licence asks for other names in a modified version."""
_families = [FALLBACK]


def families() -> list[str]:
    """Value for matplotlib's font.family."""
    return list(_families)


def use_font(path: Path) -> None:
    """Use the font file `path` in this process."""
    from matplotlib.font_manager import fontManager

    fontManager.addfont(path)
    _families[:] = [_FAMILY, FALLBACK]


@contextmanager
def plain_font() -> Iterator[Path]:
    """Use the reduced font inside the context. Yields its file."""
    path = _made()
    use_font(path)
    try:
        yield path
    finally:
        _families[:] = [FALLBACK]


@cache
def _made() -> Path:
    """The font file, kept until the process ends: matplotlib drops all added fonts once the file of one is missing."""
    folder = tempfile.TemporaryDirectory(prefix="fastpeft-font-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "plain.ttf"
    _make(path)
    return path


def _make(path: Path) -> None:
    from fontTools import subset
    from matplotlib.font_manager import findfont

    options = subset.Options(layout_features=[], drop_tables=_TABLES, notdef_outline=True)
    font, subsetter = subset.load_font(findfont(FALLBACK), options), subset.Subsetter(options)
    subsetter.populate(unicodes=_LETTERS)
    subsetter.subset(font)
    names: Any = font["name"]
    for one in names.names:
        if one.nameID in _NAMES:
            one.string = _FAMILY.replace(" ", "") if one.nameID == 6 else _FAMILY
    font.save(path)
