"""From a YAML file and `key=value` overrides to a validated RunConfig, or one clear error."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fastpeft.config.schema import RunConfig
from fastpeft.errors import UserError

PRESETS = Path(__file__).parent / "presets"

# Setting one of these means that the file's stand-in no longer stands for what was asked.
_STAND_IN_KEYS = ("model.name", "model.revision", "dataset.name", "dataset.path")


class ConfigError(UserError):
    """The user's configuration is wrong; `problems` holds every problem found, one a line."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source, self.problems = source, problems
        super().__init__(f"{source}: " + "\n  ".join(["", *problems] if len(problems) > 1 else problems))


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(path.stem for path in PRESETS.rglob("*.yaml"))


def load_run(name_or_path: str | Path, overrides: Mapping[str, Any] | list[str] = ()) -> RunConfig:
    """Load a preset or a YAML file.

    Args:
        name_or_path: a preset's name (see `preset_names`) or the path of a YAML file.
        overrides: dotted key -> value, or texts `training.learning_rate=1e-4`.

    Raises:
        ConfigError: with every problem found, naming the key and the nearest valid one.
    """
    path = _find(name_or_path)
    given = dict(overrides) if isinstance(overrides, Mapping) else _parse_overrides(overrides)
    values = _read_chain(path, [])
    for key, value in given.items():
        _set(values, key, value)
    if any(key in _STAND_IN_KEYS for key in given):
        values["stand_in"] = None
    earlier = values.get("overrides")
    values["overrides"] = {**(earlier if isinstance(earlier, dict) else {}), **given}
    return run_from_values(values, str(name_or_path))


def run_from_values(values: dict[str, Any], source: str) -> RunConfig:
    """Validate nested plain values. `source` names them in errors."""
    from pydantic import ValidationError

    try:
        run = _adapter().validate_python(values)
    except ValidationError as error:
        raise ConfigError(source, [_explain(e, values) for e in error.errors()]) from None
    problems = list(_contradictions(run))
    if problems:
        raise ConfigError(source, problems)
    return run


def apply_stand_in(run: RunConfig) -> RunConfig:
    """The run on its stand-in model and data; what the user overrode stays."""
    assert run.stand_in is not None
    values = run_values(run)
    for key, value in run.stand_in.overrides.items():
        if key not in run.overrides:
            _set(values, key, value)
    values["model"] = {"name": run.stand_in.model}
    values["dataset"] |= {"name": run.stand_in.dataset, "path": None}
    values["stand_in"] = None
    return run_from_values(values, f"{run.run_id} (stand_in)")


def trial_run(run: RunConfig) -> RunConfig:
    """`--mode trial`: every code path in seconds. Two steps, two calibration batches, no W&B."""
    values = run_values(run)
    for key, value in {
        "budget": "2steps",
        "evaluation.every": "1steps",
        "evaluation.max_examples": 32,
        "regulariser.warmup_steps": 2,
        "training.checkpoint_steps": 1,
        "wandb.mode": "disabled",
    }.items():
        _set(values, key, value)
    return run_from_values(values, f"{run.run_id} (trial)")


def run_values(run: RunConfig) -> dict[str, Any]:
    """The run as nested plain values, every default spelt out."""
    return dataclasses.asdict(run)


def save_run(run: RunConfig, path: Path) -> None:
    """Write the resolved run as YAML that `load_run` reads back to an equal RunConfig."""
    path.write_text(yaml.safe_dump(run_values(run), sort_keys=False, allow_unicode=True))


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, with each field's documentation."""
    return _adapter().json_schema()


@cache
def _adapter():
    from pydantic import TypeAdapter

    return TypeAdapter(RunConfig)


# ---- reading -------------------------------------------------------------------------------


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    preset = PRESETS / f"{text}.yaml"
    if text in preset_names():
        return preset
    path = Path(text)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in text:
        raise ConfigError(text, ["there is no such file"])
    close = _nearest(text, preset_names())
    raise ConfigError(text, [f"no preset and no file has this name{close}; presets: {', '.join(preset_names())}"])


def _read_chain(path: Path, seen: list[Path]) -> dict[str, Any]:
    """The file's values over those of the file that it extends, recursively."""
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
    base = _read_chain(beside if beside.is_file() else _find(parent), [*seen, path])
    renamed = any(_get(values, key) is not None for key in _STAND_IN_KEYS)
    if renamed and "stand_in" not in values:
        base["stand_in"] = None
    return _merge(base, values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"is not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"expected sections such as `model:`, got {type(values).__name__}"])
    return values


def _merge(base: dict, over: dict) -> dict:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _parse_overrides(texts: list[str]) -> dict[str, Any]:
    out, problems = {}, []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"{text!r}: an override is written key=value, such as training.learning_rate=1e-4")
            continue
        try:
            out[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{key}: the value is not valid YAML: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError("overrides", problems)
    return out


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
        return f"{key}: unknown key{_nearest(path[-1], known)}; known here: {', '.join(known)}"
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
    return f"{key}: expected {message}, got {got!r}"


def _contradictions(run: RunConfig) -> Iterator[str]:
    """What no single field can see."""
    regulariser = run.regulariser
    if run.method == "iw_lora" and regulariser.estimator == "lora_a":
        if regulariser.warmup_learning_rate <= 0:
            yield (
                "regulariser.estimator: lora_a needs regulariser.warmup_learning_rate > 0: while B is "
                "zero the gradient of A is identically zero, so every importance would be 0 / 0"
            )
        if regulariser.calibration == "inline":
            yield "regulariser.calibration: inline takes the sketch; it does not go with estimator lora_a"
    if run.method == "iw_lora" and regulariser.calibration == "inline" and run.schedule.warmup_steps == 0:
        yield "regulariser.calibration: inline measures during the rate's warm-up, but schedule.warmup_steps is 0"
    if run.dataset.labels is not None and len(set(run.dataset.labels)) < max(2, len(run.dataset.labels)):
        yield f"dataset.labels: expected two or more different names, got {run.dataset.labels}"
    known = set(_leaf_keys(RunConfig))
    for key in run.optuna.space:
        if key not in known:
            yield f"optuna.space.{key}: unknown key{_nearest(key, sorted(known))}"
    if run.stand_in is not None:
        for key in run.stand_in.overrides:
            if key not in known:
                yield f"stand_in.overrides.{key}: unknown key{_nearest(key, sorted(known))}"


def _section_type(annotation: Any) -> type | None:
    """The dataclass inside `X`, `X | None` or Annotated[X, ...]."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(filter(None, map(_section_type, typing.get_args(annotation))), None)
    return None


def _keys_at(path: list[str]) -> list[str]:
    """Keys of the section that `path` leads to, following dataclasses only."""
    owner: type = RunConfig
    for part in path:
        annotation = typing.get_type_hints(owner).get(part)
        owner = _section_type(annotation) or owner
    return [f.name for f in dataclasses.fields(owner)]


def _leaf_keys(owner: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in typing.get_type_hints(owner).items():
        section = _section_type(annotation)
        if section is not None:
            yield from _leaf_keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
