"""What the files of the package import of one another, read from their source: nothing is imported to find out."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastpeft"

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    return {module_name(path, package.parent): path for path in sorted(package.rglob("*.py"))}


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Full names of all that a module imports, at any depth, with the line."""
    for imported, _, line in _bindings(name, path, _parse(path)):
        yield imported, line


def file_graph(files: Mapping[str, Path]) -> Graph:
    """Each module's arrows to others of `files`, those under TYPE_CHECKING among them.

    An import of a name is an arrow to the module that it is looked up in. Where a package itself is imported, its
    __init__ counts only if a name of it is used; what is used of its modules is an arrow to those.
    """
    return {name: set(_arrows(name, path, files)) - {name} for name, path in files.items()}


def _arrows(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    tree = _parse(path)
    used = {text for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (text := _dotted(node))}
    for imported, bound, _ in _bindings(name, path, tree):
        owner = _owner(imported, files)
        if owner is None:
            continue
        if owner != imported or files[owner].stem != "__init__":
            yield owner
            continue
        rest = (text.removeprefix(bound) for text in used if text.startswith(f"{bound}."))
        yield from (found for text in rest if (found := _owner(imported + text, files)))


def _bindings(name: str, path: Path, tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """What is imported, the name that it is known by in the file, and the line."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", alias.asname or alias.name, node.lineno


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` of a chain of attributes that begins with a name."""
    if isinstance(node, ast.Name):
        return node.id
    above = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{above}.{node.attr}" if above else None


def _owner(name: str, files: Mapping[str, Path]) -> str | None:
    """The module that `name` is, or that it stands in."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph: Graph) -> list[set[str]]:
    """The strongly connected parts of more than one module, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        open_.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in open_:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            part = set(open_[open_.index(node) :])
            del open_[open_.index(node) :]
            if len(part) > 1:
                found.append(part)

    for node in graph:
        if node not in order:
            visit(node)
    return found
