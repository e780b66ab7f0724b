"""Keys of run files that are translated on loading: American spellings, and keys that earlier versions wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_OURS = {
    "regularizer": "regulariser",
    "regulariser.normalize": "regulariser.normalise",
    "model.quantization": "model.quantisation",
}
"""American spelling -> the package's spelling, by dotted key. A section precedes the keys inside it."""
_OF_KEYS = ("overrides", "optuna.space", "stand_in.overrides")
"""Sections whose keys are dotted keys themselves."""


def respelt_key(key: Any) -> Any:
    """A dotted key in the package's spelling. A key that is not a str is returned unchanged."""
    if not isinstance(key, str):
        return key
    for other, ours in _OURS.items():
        if key == other or key.startswith(f"{other}."):
            key = ours + key[len(other) :]
    return key


def respelt(values: dict[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """Nested values with keys in the package's spelling. `prefix` is the dotted key that leads to them.

    Raises:
        ValueError: a key is given in both spellings.
    """
    refuse_both(f"{prefix}{key}" for key in values)
    out = {}
    for key, value in values.items():
        whole = respelt_key(f"{prefix}{key}") if isinstance(key, str) else key
        if isinstance(value, dict) and whole in _OF_KEYS:
            refuse_both(value)
            value = {respelt_key(inner): kept for inner, kept in value.items()}
        elif isinstance(value, dict) and isinstance(key, str) and prefix.count(".") < 1:
            value = respelt(value, f"{whole}.")
        out[whole.removeprefix(prefix) if isinstance(key, str) else key] = value
    return out


def refuse_both(keys: Iterable[Any]) -> None:
    """Raise ValueError if two of the keys are spellings of one key."""
    found: dict[Any, Any] = {}
    for key in keys:
        first = found.setdefault(respelt_key(key), key)
        if first != key:
            raise ValueError(f"{first} and {key}: one key in two spellings; keep one of them")


_RETIRED = ("schedule.graff.token_weights",)
"""Dotted keys that earlier versions wrote into run.yaml, where they could only be off."""


def without_retired(values: dict[Any, Any]) -> dict[Any, Any]:
    """Remove the retired keys that are off, in place. A key that is on stays, and is refused later."""
    for key in _RETIRED:
        *path, last = key.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(last) is False:
            del section[last]
    return values
