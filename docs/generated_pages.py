"""Pages of the site that are made when it is built: references from the code, and files from outside docs/.

mkdocs calls `on_files` and `on_page_markdown`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fastpeft.config import preset_names
from fastpeft.config.load import PRESETS, json_schema

ROOT = Path(__file__).resolve().parent.parent

OUTSIDE = {
    "bench/LOG.md": "measurements.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository, and the pages of the site that show them."""

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {page: (ROOT / path).read_text() for path, page in OUTSIDE.items()}
    made["reference/configuration.md"] = configuration_page()
    made["reference/command-line.md"] = command_page()
    made["reference/presets.md"] = presets_page()
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ lead to the page that shows the file; the site has no page for other files."""
    sources = {page: path for path, page in OUTSIDE.items()}
    place = sources.get(page.file.src_uri, posixpath.join("docs", page.file.src_uri))
    return LINK.sub(lambda match: _moved(match, place, page.file.src_uri), markdown)


def _moved(match: re.Match[str], place: str, page: str) -> str:
    text, target = match.groups()
    if "://" in target or target.startswith("#"):
        return match[0]
    path, hash_mark, anchor = target.partition("#")
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
    if in_repository in OUTSIDE:
        there = OUTSIDE[in_repository]
    elif in_repository.startswith("docs/"):
        there = in_repository.removeprefix("docs/")
    else:
        return text
    return f"[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{hash_mark}{anchor})"


# ---- the configuration ---------------------------------------------------------------------


def configuration_page() -> str:
    """Every key of a run file, from the schema that validates it."""
    schema = json_schema()
    lines = [
        "# Configuration reference",
        "",
        "Every key of a run file: its values, its default and what it means. This page is made from the schema that "
        "validates run files, which `fastpeft runs schema` prints as JSON schema.",
        "",
        "On the command line a key is written with dots: `training.learning_rate=1e-4`.",
        "",
        "## The run",
        "",
        *_table(schema, "", schema["$defs"]),
    ]
    for name, section in schema["properties"].items():
        lines += _section(name, section, schema["$defs"], level=2)
    return "\n".join(lines) + "\n"


def _section(name: str, annotation: dict[str, Any], definitions: dict[str, Any], level: int) -> Iterator[str]:
    """A heading, what the section is for, its keys, and the sections inside it."""
    definition = _definition(annotation, definitions)
    if definition is None:
        return
    yield from ["", f"{'#' * level} `{name}`", ""]
    if about := definition.get("description") or annotation.get("description"):
        yield from [_inline(about), ""]
    yield from _table(definition, f"{name}.", definitions)
    for key, value in definition["properties"].items():
        yield from _section(f"{name}.{key}", value, definitions, level + 1)


def _table(definition: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> Iterator[str]:
    keys = {k: v for k, v in definition["properties"].items() if _definition(v, definitions) is None}
    if not keys:
        return
    yield from ["| key | values | default | |", "|---|---|---|---|"]
    required = definition.get("required", ())
    for key, value in keys.items():
        default = "required" if key in required else _value(value["default"]) if "default" in value else ""
        cells = [f"`{prefix}{key}`", _values(value, definitions), default, _inline(value.get("description", ""))]
        yield f"| {' | '.join(cells)} |"


def _definition(annotation: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds; None for a key with a value."""
    for option in [annotation, *annotation.get("anyOf", ())]:
        if "$ref" in option:
            return definitions[option["$ref"].rpartition("/")[2]]
    return None


def _values(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in value:
        return ", or ".join(_values(option, definitions) for option in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_values(value['items'], definitions)}"
    if value.get("type") == "null":
        return "nothing"
    names = {"string": "text", "boolean": "`true`, `false`", "integer": "whole number", "object": "keys and values"}
    return names.get(value.get("type", ""), value.get("type", "any")) + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "over", "maximum": "to", "exclusiveMaximum": "under"}
    bounds = [f"{word} {value[key]:,}" for key, word in words.items() if key in value and abs(value[key]) < 2**31]
    return f" {' '.join(bounds)}" if bounds else ""


def _value(default: Any) -> str:
    return "" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _inline(text: str) -> str:
    """One line of a table: bars and angle brackets are text."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---- presets and commands ------------------------------------------------------------------


def presets_page() -> str:
    lines = [
        "# Presets",
        "",
        "The runs that ship with the package, for `--run`. A name is METHOD_TASK, METHOD_TASK_HOST, or SCHEDULE_TASK. "
        "`fastpeft runs show NAME` prints one with all defaults spelt out.",
        "",
        "| preset | |",
        "|---|---|",
    ]
    about = {path.stem: _first_comment(path) for path in PRESETS.rglob("*.yaml")}
    lines += [f"| `{name}` | {_inline(about[name])} |" for name in preset_names()]
    return "\n".join(lines) + "\n"


def _first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    length = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:length])


def command_page() -> str:
    import typer

    from fastpeft.cli.commands import app

    command = typer.main.get_command(app)
    lines = ["# Command line", "", "Made from the command itself. `fastpeft COMMAND --help` prints the same.", ""]
    return "\n".join([*lines, *_commands(command, "fastpeft")]) + "\n"


def _commands(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield from [f"## {name}", "", _inline(command.help or ""), "", "| | default | |", "|---|---|---|"]
        for parameter in command.params:
            yield _parameter(parameter)
        yield ""
        return
    for key, child in inner.items():
        yield from _commands(child, f"{name} {key}")


def _parameter(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = parameter.metavar or parameter.name.upper() if argument else ", ".join(parameter.opts)
    if parameter.secondary_opts:
        names += f", {', '.join(parameter.secondary_opts)}"
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) else f"`{default}`"
    return f"| `{names}` | {shown} | {_inline(getattr(parameter, 'help', None) or '')} |"
