"""Blocks of a report, and their two renderings: Markdown, and a self-contained HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de; --ground: #ffffff; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9aa4ae; --line: #3a424b; --ground: #0f1419; --band: #171d24; }
}
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
td.short { white-space: nowrap; }
th { color: var(--dim); font-weight: 600; } tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1.25rem 0; } figure svg { max-width: 100%; height: auto; color: var(--ink); }
svg text { fill: currentColor; font-family: system-ui, sans-serif; }
figcaption, .dim { color: var(--dim); font-size: 0.87rem; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 0.6rem 0; padding: 0.4rem 0.9rem; }
summary { cursor: pointer; font-weight: 600; }
"""
_NUMBER = re.compile(r"(< )?[-+]?[0-9][0-9,.]*%?( ± [0-9,.]+)?( (s|J|kJ))?")
_SHORT = 24
"""Cells of up to this many characters are never wrapped."""
_CELL = re.compile(rf"-|{_NUMBER.pattern}")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    """A table. Columns of numbers are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    caption: str
    png: str
    """Path of the PNG, relative to the Markdown file."""
    svg: str
    """The figure, embedded in the HTML page."""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block] = field(default_factory=list)
    folded: bool = False
    """Whether it is collapsed on the HTML page."""


Block = Text | Table | Picture | Section


def markdown(title: str, blocks: Iterable[Block]) -> str:
    return "\n".join([f"# {_plain(title)}", "", *_markdown(blocks, 2)])


def _markdown(blocks: Iterable[Block], level: int) -> Iterable[str]:
    for block in blocks:
        if isinstance(block, Text):
            yield from (_plain(block.text), "")
        elif isinstance(block, Picture):
            yield from (f"![{_plain(block.caption)}]({block.png.replace(' ', '%20')})", "")
        elif isinstance(block, Section):
            yield from (f"{'#' * level} {_plain(block.title)}", "", *_markdown(block.blocks, level + 1))
        else:
            yield _line(block.header)
            yield _line(["---:" if is_number else "---" for is_number in _numbers(block)])
            yield from (_line(map(_plain, row)) for row in block.rows)
            yield ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    for mark in "\\`*_[]<|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def page(title: str, blocks: Iterable[Block]) -> str:
    body = "\n".join(_html(blocks, 2))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(blocks: Iterable[Block], level: int) -> Iterable[str]:
    for block in blocks:
        if isinstance(block, Text):
            yield f"<p>{html.escape(block.text)}</p>"
        elif isinstance(block, Picture):
            yield f"<figure>{block.svg}<figcaption>{html.escape(block.caption)}</figcaption></figure>"
        elif isinstance(block, Section):
            inner, title = "\n".join(_html(block.blocks, level + 1)), html.escape(block.title)
            yield (
                f"<details><summary>{title}</summary>{inner}</details>"
                if block.folded
                else f"<h{level}>{title}</h{level}>\n{inner}"
            )
        else:
            yield _html_table(block)


def _html_table(table: Table) -> str:
    kinds = ["number" if is_number else "" for is_number in _numbers(table)]
    head = "".join(f'<th class="{kind}">{html.escape(name)}</th>' for kind, name in zip(kinds, table.header))
    lines = ("".join(map(_html_cell, kinds, row)) for row in table.rows)
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _html_cell(kind: str, cell: str) -> str:
    return f'<td class="{kind}{" short" if len(cell) <= _SHORT else ""}">{html.escape(cell)}</td>'


def _numbers(table: Table) -> list[bool]:
    columns = list(zip(*table.rows)) or [()] * len(table.header)
    return [any(map(_NUMBER.fullmatch, column)) and all(map(_CELL.fullmatch, column)) for column in columns]
