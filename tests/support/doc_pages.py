"""The documentation as data: its pages, their code blocks, links, headings and settings. Nothing here imports torch."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.import_graph import PACKAGE, ROOT

DOCS = ROOT / "docs"
AT_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")

FENCE = re.compile(r"^ *```(?P<info>[^`]*)$")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMENT = re.compile(r"\s+#\s.*$")
IDENTIFIER = re.compile(r"^::: (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced or an indented block of code."""

    page: Path
    line: int
    """Of its first line, from 1."""
    info: str
    """What stands behind the opening fence; empty for an indented block."""
    text: str
    fenced: bool = True

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def title(self) -> str | None:
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else None

    def commands(self) -> list[str]:
        """Lines of a shell: without prompts and comments, and continued lines as one."""
        joined = re.sub(r"\s*\\\n\s*", " ", self.text)
        lines = (COMMENT.sub("", line.removeprefix("$ ")).strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def pages() -> list[Path]:
    return [ROOT / name for name in AT_ROOT] + sorted(DOCS.rglob("*.md"))


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    return tuple(_blocks(page))


def _blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence:
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            yield Block(page, number + 2, fence["info"].strip(), "\n".join(lines[number + 1 : end]))
            number = end
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(page, number + 1, "", "\n".join(line[4:] for line in lines[number:end]), fenced=False)
            number = end - 1
        number += 1


def prose(page: Path) -> str:
    """A page without its code blocks; a line keeps its number."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        fence = FENCE.match(line) is not None
        kept.append("" if inside or fence else line)
        inside ^= fence
    return "\n".join(kept)


def inline_code(page: Path) -> list[str]:
    return [text.replace("\\`", "`") for text in INLINE.findall(prose(page))]


# ---- links ---------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    return LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


@cache
def anchors(page: Path) -> set[str]:
    """Of headings, as mkdocs and GitHub both make them, and of the identifiers that are documented there."""
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {_slug(heading) for heading in headings} | set(IDENTIFIER.findall(text))


def _slug(heading: str) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


# ---- the site ------------------------------------------------------------------------------


@cache
def nav_pages() -> list[str]:
    """Every page that the site's navigation names."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from walk(value)
        else:
            for value in node:
                yield from walk(value)

    text = (ROOT / "mkdocs.yml").read_text()
    return list(walk(yaml.safe_load(text)["nav"]))


@cache
def generated_pages() -> set[str]:
    """The pages that docs/generated_pages.py makes, read from its source: importing it needs mkdocs."""
    tree = ast.parse((DOCS / "generated_pages.py").read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.endswith(".md") and text in nav_pages() and not (DOCS / text).exists()}


# ---- names of the code ---------------------------------------------------------------------


@cache
def top_level(module: str) -> set[str] | None:
    """Names that a module of the package defines or imports at its top level; None where there is no such module."""
    base = PACKAGE.parent.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.is_file():
        return None
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def exists(dotted: str) -> bool:
    """Whether `fastpeft.a.b` is a module, or a name at the top of the module `fastpeft.a`."""
    if top_level(dotted) is not None:
        return True
    module, _, name = dotted.rpartition(".")
    return name in (top_level(module) or ())


def said_texts() -> list[str]:
    """Every text in the package's source, with NUL for what is filled in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


# ---- settings ------------------------------------------------------------------------------


@cache
def setting_keys() -> tuple[frozenset[str], frozenset[str]]:
    """Dotted keys of a run file: of values, and of sections."""
    from fastpeft.config.load import json_schema

    schema = json_schema()
    values, sections = set(), set()

    def walk(definition: dict[str, Any], prefix: str) -> None:
        for key, value in definition["properties"].items():
            options = [value, *value.get("anyOf", ())]
            inner = next((option["$ref"] for option in options if "$ref" in option), None)
            if inner is None:
                values.add(prefix + key)
            else:
                sections.add(prefix + key)
                walk(schema["$defs"][inner.rpartition("/")[2]], f"{prefix}{key}.")

    walk(schema, "")
    return frozenset(values), frozenset(sections)


@cache
def run_files() -> dict[str, str]:
    """YAML run files that the pages show, by run_id."""
    found = {}
    for page in pages():
        for block in blocks(page):
            if block.language == "yaml" and (name := re.search(r"^run_id: (\S+)$", block.text, re.MULTILINE)):
                found[name[1]] = block.text
    return found


def words(command: str) -> list[str]:
    return shlex.split(command)
