"""Turns the texts of the start form into an order for the trainer, or into problems."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastpeft.config import ConfigError, RunConfig, load_run, parse_seeds, trial_run
from fastpeft.config.load import json_schema
from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder, default_name
from fastpeft.tui.steer import Order


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The texts in the form's fields."""

    run: str = ""
    budget: str = ""
    seeds: str = ""
    name: str = ""
    overrides: str = ""
    trial: bool = False
    no_stand_in: bool = False


@dataclass(frozen=True)
class Checked:
    """The result of validating a draft."""

    order: Order | None
    """None if there are problems."""
    problems: list[str] = field(default_factory=list)
    summary: str = ""
    help: str = ""
    """Documentation of the last key in the overrides."""


def check(draft: Draft, results_dir: Path) -> Checked:
    """Validate as `fastpeft train` does. Takes about 10 ms, the first time a second: not for the UI thread."""
    help = key_help(last_key(draft.overrides))
    if not draft.run.strip():
        return Checked(None, ["Run: a preset's name, or the path of a YAML file"], help=help)
    try:
        order, run = _order(draft)
        RunFolder.at(results_dir, order.folder_name).check_free()
    except ConfigError as error:
        return Checked(None, error.problems, help=help)
    except (UserError, ValueError) as error:
        return Checked(None, [str(error)], help=help)
    return Checked(order, summary=summary(run, order), help=help)


def _order(draft: Draft) -> tuple[Order, RunConfig]:
    try:
        overrides = shlex.split(draft.overrides)
    except ValueError as error:
        raise ValueError(f"Settings: {error}") from None
    seeds = parse_seeds(draft.seeds) if draft.seeds.strip() else []
    texts = [*overrides, *([f"budget={json.dumps(draft.budget.strip())}"] if draft.budget.strip() else [])]
    run = load_run(draft.run.strip(), texts)
    if draft.trial:
        run = trial_run(run, max(1, len(seeds)))
    order = Order(
        run=draft.run.strip(),
        overrides=overrides,
        budget=draft.budget.strip() or None,
        mode="trial" if draft.trial else "full",
        name=draft.name.strip() or default_name(run.run_id),
        seed=seeds[0] if len(seeds) == 1 else None,
        seeds=seeds if len(seeds) > 1 else None,
        no_stand_in=draft.no_stand_in,
    )
    return order, run


def summary(run: RunConfig, order: Order) -> str:
    budget = f"budget {run.budget}" if run.budget else f"{run.training.epochs:g} epochs"
    seeds = f", shared by {len(order.seeds)} seeds" if order.seeds else ""
    return f"{run.method} on {run.model.name}, {run.dataset.name}, {budget}{seeds}"


# ---- settings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    key: str
    kind: str
    default: Any
    help: str

    def __str__(self) -> str:
        default = "" if self.default is None else f", default {self.default}"
        return f"{self.key} ({self.kind}{default})" + (f": {self.help}" if self.help else "")


@cache
def settings() -> dict[str, Setting]:
    """Every dotted key of a run, with its type, default and documentation."""
    schema = json_schema()
    return {setting.key: setting for setting in _settings(schema, schema["$defs"], "")}


def _settings(node: dict[str, Any], defs: dict[str, Any], prefix: str) -> list[Setting]:
    out = []
    for name, value in node["properties"].items():
        section = _section(value, defs)
        if section is not None:
            out += _settings(section, defs, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("extends", "overrides", "run_id"):
            help = " ".join(value.get("description", "").split())
            out.append(Setting(prefix + name, _kind(value), value.get("default"), help))
    return out


def _section(value: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any] | None:
    for one in [value, *value.get("anyOf", []), *value.get("allOf", [])]:
        if "$ref" in one:
            found = defs[one["$ref"].rpartition("/")[2]]
            return found if "properties" in found else None
    return None


def _kind(value: dict[str, Any]) -> str:
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if "anyOf" in value:
        return " or ".join(_kind(one) for one in value["anyOf"] if one.get("type") != "null")
    names = {"string": "text", "integer": "whole number", "boolean": "true | false", "array": "list", "object": "keys"}
    named: str = value.get("type", "any")
    return names.get(named, named)


def last_key(overrides: str) -> str:
    """The key of the setting being typed."""
    words = overrides.split()
    return words[-1].partition("=")[0] if words and not overrides.endswith(" ") else ""


def key_help(key: str) -> str:
    """A key's documentation; for an incomplete key, the keys that begin with it."""
    if key in settings():
        return str(settings()[key])
    starts = [name for name in settings() if key and name.startswith(key)]
    return "  ".join(starts)


def complete(overrides: str) -> str | None:
    """The overrides with their last key completed; None if it cannot be."""
    key = last_key(overrides)
    if not key or overrides.endswith("=") or "=" in overrides.split()[-1]:
        return None
    found = next((name for name in settings() if name.startswith(key)), None)
    return None if found is None else f"{overrides[: len(overrides) - len(key)]}{found}="
