"""Screenshots: every sign in its own cell, and what is drawn drawn."""

from __future__ import annotations

import asyncio
import io
import re
from xml.etree import ElementTree

from rich.console import Console
from rich.text import Text

from fastpeft.tui.picture import in_cells
from fastpeft.tui.program import FastpeftApp

SVG = "{http://www.w3.org/2000/svg}"
CELL = 12.2


def exported(*lines: Text | str, width: int = 40) -> str:
    console = Console(record=True, width=width, force_terminal=True, color_system="truecolor", file=io.StringIO())
    for line in lines:
        console.print(line)
    return console.export_svg(title="t")


def signs(svg: str) -> dict[tuple[int, int], str]:
    """By column and row: what is typed."""
    found = {}
    for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        if "clip-path" in text.attrib:
            places = [round(float(x) / CELL) for x in text.attrib["x"].split()]
            assert len(places) == len(text.text)
            row = round((float(text.attrib["y"]) - 20) / 24.4)
            found |= {(column, row): sign for column, sign in zip(places, text.text)}
    return found


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of what is drawn, in cells."""
    paths = "".join(path.attrib["d"] for path in ElementTree.fromstring(svg).iter(f"{SVG}path"))
    found = re.findall(r"M([\d.e+-]+) ([\d.e+-]+)h([\d.e+-]+)v([\d.e+-]+)h-[\d.e+-]+z", paths)
    return [(float(x) / CELL, (float(y) - 1.5) / 24.4, float(w) / CELL, float(h) / 24.4) for x, y, w, h in found]


def test_each_sign_is_in_its_cell_whatever_precedes_it():
    svg = in_cells(
        exported(Text.assemble(("compare", "bold"), "  4 runs ", (" STAND-IN ", "black on yellow"), "漢x <&>"))
    )
    text = {column: sign for (column, row), sign in signs(svg).items() if row == 0}
    line = "".join(text.get(column, " ") for column in range(max(text) + 1))
    assert line.startswith("compare  4 runs  STAND-IN 漢 x <&>")
    assert all(sign.strip() for sign in text.values()), "no blank is typed, so that none can be dropped"
    assert "textLength" not in svg


def test_lines_and_dots_are_drawn_within_their_cells_and_meet():
    svg = in_cells(exported("a━━┓", "⣿░▄ "))
    assert set(signs(svg).values()) == {"a"}
    drawn = boxes(svg)
    across = [(x, x + w) for x, y, w, _ in drawn if y < 1 and w > 0.4]
    assert across[0][1] == across[1][0], "without a gap"
    dots = [(x, y) for x, y, w, _ in drawn if y > 1 and w < 0.4]
    assert len(dots) == 8
    assert all(0 <= x < 1 and 1 <= y < 2 for x, y in dots)
    for x, y, w, h in drawn:
        assert int(x + 0.01) == int(x + w - 0.01)
        assert int(y + 0.01) == int(y + h - 0.01)


def test_the_programs_own_screenshot_is_one(tmp_path):
    async def run() -> str:
        app = FastpeftApp(tmp_path)
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause(0.2)
            return app.export_screenshot()

    svg = asyncio.run(run())
    assert "textLength" not in svg
    assert {sign for (_, row), sign in signs(svg).items() if row == 0} >= set("fastpeft0runs")
