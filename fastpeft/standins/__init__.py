"""Small pretrained models and generated data that ship with the package, for when no hub can be reached."""

from __future__ import annotations

from pathlib import Path

from fastpeft.errors import UnavailableError

EMBEDDED_PREFIX = "embedded/"
"""Of model.name: one of the shipped models."""

PATHS = {name: Path(__file__).parent / name for name in ("deberta_tiny", "deberta_small", "deberta_deep", "qwen3_tiny")}


def embedded_path(name: str) -> Path | None:
    """Folder of a shipped model, None for other names. Raises UnavailableError for an unknown one."""
    if not name.startswith(EMBEDDED_PREFIX):
        return None
    names = {EMBEDDED_PREFIX + key.replace("_", "-"): path for key, path in PATHS.items()}
    if name not in names:
        raise UnavailableError(f"model.name {name!r}: shipped models are {', '.join(names)}")
    return names[name]
