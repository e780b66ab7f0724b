"""Screenshots that look the same in every viewer: each character in its cell, lines and dots drawn as paths.

Textual's SVG consists of runs of text. In a viewer without its font, characters have other widths, which shifts what
follows, and leading blanks may be dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from rich.cells import cell_len

from fastpeft.tui.widgets.raster import BLANK, DOTS_42

_SVG = "http://www.w3.org/2000/svg"
_TEXT, _GROUP, _PATH = (f"{{{_SVG}}}{name}" for name in ("text", "g", "path"))
# As rich lays lines out: rich.console.Console.export_svg.
_HEIGHT = 24.4
_ABOVE_BASELINE = 18.5

_UP, _RIGHT, _DOWN, _LEFT = 1, 2, 4, 8
_HEAVY = {
    "━": _LEFT | _RIGHT, "┃": _UP | _DOWN, "┏": _RIGHT | _DOWN, "┓": _LEFT | _DOWN, "┗": _UP | _RIGHT, "┛": _UP | _LEFT,
    "┣": _UP | _RIGHT | _DOWN, "┫": _UP | _LEFT | _DOWN, "┳": _LEFT | _RIGHT | _DOWN, "┻": _LEFT | _RIGHT | _UP,
}  # fmt: skip
_LIGHT = {
    "─": _LEFT | _RIGHT, "│": _UP | _DOWN, "╭": _RIGHT | _DOWN, "╮": _LEFT | _DOWN, "╰": _UP | _RIGHT, "╯": _UP | _LEFT,
}  # fmt: skip
_SHADES = {"░": 0.25, "▒": 0.5, "▓": 0.75}
_PARTS = {
    "▀": (0.0, 0.0, 1.0, 0.5), "▐": (0.5, 0.0, 0.5, 1.0), "╌": (0.1, 0.45, 0.3, 0.08),
    **{chr(0x2580 + i): (0.0, 1 - i / 8, 1.0, i / 8) for i in range(1, 9)},
    **{chr(0x2590 - i): (0.0, 0.0, i / 8, 1.0) for i in range(1, 8)},
    **dict.fromkeys(_SHADES, (0.0, 0.0, 1.0, 1.0)),
}  # fmt: skip
"""(left, top, width, height) as shares of a cell."""

Box = tuple[float, float, float, float]


def in_cells(svg: str) -> str:
    """Textual's SVG `svg` with its texts laid out in cells."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    for group in list(root.iter(_GROUP)):
        for place, text in reversed([*enumerate(group)]):
            if text.tag == _TEXT and "textLength" in text.attrib:
                group.remove(text)
                for new in reversed([*_laid_out(text)]):
                    group.insert(place, new)
    return ElementTree.tostring(root, encoding="unicode")


def _laid_out(text: Element) -> Iterator[Element]:
    """One text element of all typed characters, and one path of all drawn ones for each opacity."""
    signs = text.text or ""
    width = float(text.attrib["textLength"]) / len(signs)
    x, baseline = float(text.attrib["x"]), float(text.attrib["y"])
    typed, places, drawn = "", [], dict[float, str]()
    for sign in signs:
        boxes = list(_boxes(sign))
        for left, top, wide, high in boxes:
            box = (x + left * width, baseline - _ABOVE_BASELINE + top * _HEIGHT, wide * width, high * _HEIGHT)
            strength = _SHADES.get(sign, 1.0)
            drawn[strength] = drawn.get(strength, "") + "M{:.5g} {:.5g}h{:.3g}v{:.3g}h-{:.3g}z".format(*box, box[2])
        if not boxes and not sign.isspace():
            typed += sign
            places.append(f"{x:g}")
        x += width * cell_len(sign)
    kept = {name: text.attrib[name] for name in ("class", "clip-path") if name in text.attrib}
    if typed:
        found = Element(_TEXT, kept | {"x": " ".join(places), "y": text.attrib["y"]})
        found.text = typed
        yield found
    for strength, path in drawn.items():
        yield Element(_PATH, kept | {"d": path} | ({} if strength == 1.0 else {"fill-opacity": f"{strength:g}"}))


def _boxes(sign: str) -> Iterator[Box]:
    """The boxes of a plot or frame character, in shares of its cell; none for other characters."""
    if BLANK < ord(sign) <= BLANK + 0xFF:
        for row in range(4):
            for column in range(2):
                if (ord(sign) - BLANK) & int(DOTS_42[row, column]):
                    yield 0.07 + 0.5 * column, 0.035 + 0.25 * row, 0.36, 0.18
    elif sign in _PARTS:
        left, top, wide, high = _PARTS[sign]
        yield left, top, wide, high
        if sign == "╌":
            yield left + 0.5, top, wide, high
    elif sign in _HEAVY or sign in _LIGHT:
        thick = 0.2 if sign in _HEAVY else 0.1
        arms, thin = (_HEAVY | _LIGHT)[sign], thick / 2
        across, down = 0.5 - thick / 2, 0.5 - thin / 2
        if arms & (_LEFT | _RIGHT):
            left, right = 0.0 if arms & _LEFT else across, 1.0 if arms & _RIGHT else 1 - across
            yield left, down, right - left, thin
        if arms & (_UP | _DOWN):
            top, bottom = 0.0 if arms & _UP else down, 1.0 if arms & _DOWN else 1 - down
            yield across, top, thick, bottom - top
