"""Loads a YAML file with `key=value` overrides into a validated RunConfig, or raises one clear error."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastpeft.atomic_write import write_atomically
from fastpeft.config.contradictions import HUB_KEYS, contradictions
from fastpeft.config.registry import complete
from fastpeft.config.schema import FAMILIES, RunConfig
from fastpeft.config.search import SPACE
from fastpeft.config.spelling import refuse_both, respelt, respelt_key, without_retired
from fastpeft.config.trackers import TRACKERS
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PRESETS = Path(__file__).parent / "presets"

# Setting one of these disables the file's stand-in, which would not represent the new model or data.
_STAND_IN_KEYS = (
    *("model.name", "model.revision", "dataset.name", "dataset.path"),
    *(f"dataset.{key}" for key in HUB_KEYS),
)


class ConfigError(UserError):
    """The user's configuration is wrong. `problems` lists every problem found, one line each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source, self.problems = source, problems
        super().__init__(f"{source}: " + "\n  ".join(["", *problems] if len(problems) > 1 else problems))


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(_presets())


def load_run(name_or_path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """Load a preset or a YAML file.

    Args:
        name_or_path: a preset's name (see `preset_names`) or the path of a YAML file.
        overrides: dotted key -> value, or texts `training.learning_rate=1e-4`. A section given as a
            dict sets the keys that are in it.

    Returns:
        The validated run, with the overrides noted in `overrides`.

    Raises:
        ConfigError: with every problem found, naming the key and the nearest valid one.
    """
    path = _find(name_or_path)
    given = _one_spelling(dict(_flat(overrides if isinstance(overrides, Mapping) else _parse_overrides(overrides))))
    values = _read_chain(path, [])
    for key, value in given.items():
        _set(values, key, value)
    if any(key in _STAND_IN_KEYS for key in given):
        values["stand_in"] = None
    earlier = values.get("overrides")
    values["overrides"] = {**(earlier if isinstance(earlier, dict) else {}), **given}
    run = run_from_values(values, str(name_or_path))
    if run.stand_in is not None:
        apply_stand_in(run)  # reports errors in it now, not when the hub is unreachable
    return run


def run_from_values(values: dict[str, Any], source: str) -> RunConfig:
    """Validate nested plain values. `source` names them in errors."""
    from pydantic import ValidationError

    try:
        run = _adapter(_versions()).validate_python(values)
    except ValidationError as error:
        raise ConfigError(source, [_explain(e, values) for e in error.errors()]) from None
    problems = [*contradictions(run), *_unknown_keys(run), *run.optuna.problems()]
    if problems:
        raise ConfigError(source, problems)
    return run


def apply_stand_in(run: RunConfig) -> RunConfig:
    """The run on its stand-in model and data. The user's overrides stay."""
    assert run.stand_in is not None
    values = run_values(run)
    for key, value in run.stand_in.overrides.items():
        if key in run.overrides:
            continue
        if key == SPACE and isinstance(value, dict):
            values["optuna"]["space"] |= value  # its keys contain dots; those that it lacks stay
        else:
            _set(values, key, value)
    values["model"] = {"name": run.stand_in.model}
    values["dataset"] = {k: v for k, v in values["dataset"].items() if k not in HUB_KEYS}
    values["dataset"] |= {"name": run.stand_in.dataset, "path": None}
    values["stand_in"] = None
    return run_from_values(values, f"{run.run_id} (stand_in)")


def with_values(run: RunConfig, given: dict[str, Any]) -> RunConfig:
    """`run` with other values at dotted keys, noted in `overrides` as if the user had set them."""
    values, given = run_values(run), _one_spelling(given)
    for key, value in given.items():
        _set(values, key, value)
    values["overrides"] |= given
    return run_from_values(values, run.run_id)


def trial_run(run: RunConfig, num_seeds: int = 1) -> RunConfig:
    """`--mode trial`: every code path in seconds. Two steps per seed, and the TRIAL settings of the chosen components
    and the trackers, such as two calibration batches and no W&B."""
    values = run_values(run)
    chosen = [(family.prefix, family.chosen(run)) for family in FAMILIES]
    trial = {
        "budget": f"{2 * num_seeds}steps",
        "evaluation.every": "1steps",
        "evaluation.max_examples": 32,
        "evaluation.max_test_examples": 32,
        "evaluation.max_new_tokens": 16,
        "training.checkpoint_steps": 1,
    }
    for prefix, entry in [*chosen, *((TRACKERS.prefix, tracker) for tracker in TRACKERS)]:
        if entry is not None:
            trial |= {f"{prefix}{entry.section}.{key}": value for key, value in entry.trial.items()}
    for key, value in trial.items():
        _set(values, key, value)
    values["overrides"] |= trial
    return run_from_values(values, f"{run.run_id} (trial)")


def run_values(run: RunConfig) -> dict[str, Any]:
    """The run as nested plain values, defaults included."""
    return dataclasses.asdict(run)


def save_run(run: RunConfig, path: Path) -> None:
    """Write, atomically, the resolved run as YAML that `load_run` reads back to an equal RunConfig."""
    write_atomically(path, yaml.safe_dump(run_values(run), sort_keys=False, allow_unicode=True))


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, with each field's documentation."""
    schema = _adapter(_versions()).json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "A preset's name, or a path from this file."}
    schema["anyOf"] = [{"required": ["extends"]}, {"required": schema.pop("required")}]
    return schema


def _versions() -> tuple[int, ...]:
    """Cache key of the run's type. It changes when a component is added, which changes choices and sections."""
    return tuple(family.version for family in FAMILIES)


@lru_cache(maxsize=1)
def _run_type(versions: tuple[int, ...]) -> type[RunConfig]:
    return complete(RunConfig)


@lru_cache(maxsize=1)
def _adapter(versions: tuple[int, ...]) -> TypeAdapter[RunConfig]:
    from pydantic import TypeAdapter

    return TypeAdapter(_run_type(versions))


# ---- reading -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys, and aliases, with which a small file can expand without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not taken; a run inherits with `extends`"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises KeyError for `!!bool x`, IndexError for `!!int ""`, ...
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in PRESETS.rglob("*.yaml")}


def _find(name_or_path: str | Path, asked_by: str = "") -> Path:
    text, presets = str(name_or_path), _presets()
    if text in presets:
        return presets[text]
    if os.path.isfile(text):  # False, where Path.is_file raises, for a name that is too long
        return Path(text)
    source = asked_by or repr(text)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        raise ConfigError(source, ["there is no such file"])
    close = _nearest(text, sorted(presets))
    raise ConfigError(source, [f"no preset and no file has this name{close}; presets: {', '.join(sorted(presets))}"])


def _read_chain(path: Path, seen: list[Path]) -> dict[str, Any]:
    """The file's values merged over those of the file that it extends, recursively."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(str(path), [f"`extends` runs in a circle: {' -> '.join(p.stem for p in [*seen, path])}"])
    values = _read(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(str(path), [f"extends: expected a preset's name or a path, got {parent!r}"])
    beside = path.parent / parent
    found = beside if os.path.isfile(beside) else _find(parent, f"{path}: extends {parent!r}")
    base = _read_chain(found, [*seen, path])
    renamed = any(_get(values, key) is not None for key in _STAND_IN_KEYS)
    if renamed and "stand_in" not in values:
        base["stand_in"] = None
    return _merge(base, values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    except ValueError as error:
        raise ConfigError(str(path), [f"is {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"expected sections such as `model:`, got {type(values).__name__}"])
    try:
        return without_retired(respelt(values))
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from None


def _one_spelling(given: dict[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key, in this package's spelling."""
    try:
        refuse_both(given)
    except ValueError as error:
        raise ConfigError("overrides", [str(error)]) from None
    return {respelt_key(key): value for key, value in given.items()}


def _merge(base: dict, over: dict) -> dict:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        both = both and "type" not in value  # a search parameter of another type has other keys
        out[key] = _merge(out[key], value) if both else value
    return out


def _parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    out, problems = {}, []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"{text!r}: an override is written key=value, such as training.learning_rate=1e-4")
            continue
        try:
            # A prompt is plain text: its colons and braces are not YAML. In quotes, escapes are read.
            plain = key.strip() == "dataset.prompt" and value[:1] not in ("'", '"')
            out[key.strip()] = value if plain else _parse(value)
        except ValueError as error:
            problems.append(f"{key}: the value is {error}")
    if problems:
        raise ConfigError("overrides", problems)
    return out


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs, with sections given as dicts flattened."""
    leaves = _leaf_keys()
    for key, value in given.items():
        if isinstance(value, Mapping) and key not in leaves:
            yield from _flat({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            yield key, value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        child = values.get(section)
        if not isinstance(child, dict):
            child = values[section] = {}
        values = child
    values[last] = value


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


# ---- explaining ----------------------------------------------------------------------------


def _explain(error: Mapping[str, Any], values: dict[str, Any]) -> str:
    """One pydantic error as a sentence that a user can act on."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(p for p in path if p not in ("str", "list[str]")) or "the file"
    kind, got = error["type"], error.get("input")
    if kind == "unexpected_keyword_argument":
        known = _keys_at(path[:-1])
        elsewhere = sorted(leaf for leaf in _leaf_keys() if leaf.endswith(f".{path[-1]}"))
        hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else _nearest(path[-1], known)
        return f"{key}: unknown key{hint}; known here: {', '.join(known)}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    if kind == "literal_error":
        allowed = str(error["ctx"]["expected"])
        options = [option.strip("'") for option in allowed.replace(" or ", ", ").split(", ")]
        return f"{key}: {got!r} is not one of {allowed}{_nearest(str(got), options)}"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if kind == "dataclass_type":
        return f"{key}: expected a section with keys, got {got!r}; known here: {', '.join(_keys_at(path))}"
    message = error["msg"].removeprefix("Input should be ")
    quotes = "; in quotes it is text" if kind == "string_type" and isinstance(got, (int, float)) else ""
    return f"{key}: expected {message}, got {got!r}{quotes}"


def _unknown_keys(run: RunConfig) -> Iterator[str]:
    """Problems for dotted keys inside other sections that name no setting."""
    known = _leaf_keys()
    for key in run.optuna.space:
        if key not in known:
            yield f"optuna.space.{key}: unknown key{_nearest(key, sorted(known))}"
    if run.stand_in is not None:
        for key in run.stand_in.overrides:
            if key not in known:
                yield f"stand_in.overrides.{key}: unknown key{_nearest(key, sorted(known))}"


def _section_type(annotation: Any) -> type | None:
    """The dataclass inside `X`, `X | None` or Annotated[X, ...]."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(filter(None, map(_section_type, typing.get_args(annotation))), None)
    return None


def _keys_at(path: list[str]) -> list[str]:
    """Keys of the section that `path` leads to, following dataclasses only."""
    owner: type = _run_type(_versions())
    for part in path:
        annotation = typing.get_type_hints(owner).get(part)
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        owner = _section_type(annotation) or owner
    return [f.name for f in dataclasses.fields(owner)]


def _leaf_keys() -> frozenset[str]:
    """Dotted keys of a run's settings, without the sections."""
    return frozenset(_leaves(_run_type(_versions())))


@lru_cache(maxsize=128)
def _leaves(owner: type) -> tuple[str, ...]:
    hints, found = typing.get_type_hints(owner), []
    for field in dataclasses.fields(owner):
        section = _section_type(hints[field.name])
        found += [field.name] if section is None else [f"{field.name}.{leaf}" for leaf in _leaves(section)]
    return tuple(found)


def _nearest(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
