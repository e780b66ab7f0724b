"""W&B's own settings: mode, project, and whether there is an API key. W&B is not imported: that takes half a second."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from fastpeft.errors import UserError
from fastpeft.trackers.tracker import is_installed

_MODES = ("disabled", "offline", "online")
"""From least to most."""
_ALIASES = {"dryrun": "offline", "run": "online"}


def wandb_mode(asked: str, say: Callable[[str], None]) -> str:
    """disabled, offline or online, from `wandb.mode`, what is installed, and W&B's own settings.

    WANDB_MODE, WANDB_DISABLED and `wandb offline` can only restrict `wandb.mode`.
    """
    stored = _stored_settings()
    limit = os.environ.get("WANDB_MODE") or stored.get("mode", "online")
    limit = _ALIASES.get(limit, limit)
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        limit = "disabled"
    mode = min("online" if asked == "auto" else asked, limit if limit in _MODES else "online", key=_MODES.index)
    if mode == "disabled":
        return mode
    if not is_installed("wandb"):
        if asked != "auto":
            raise UserError(f"wandb.mode: {asked}, but W&B is not installed: pip install wandb, or wandb.mode=disabled")
        say("W&B is not installed: the run is in its event log only")
        return "disabled"
    if mode == "online" and not has_key():
        if asked == "online":
            raise UserError(
                "wandb.mode: online, but there is no API key: set WANDB_API_KEY, run `wandb login`, or take "
                "wandb.mode=offline"
            )
        mode = "offline"
    return mode


def wandb_project(asked: str | None) -> str:
    """The project: of the run's section, else of the environment, else the package's name."""
    return asked or os.environ.get("WANDB_PROJECT") or "fastpeft"


def has_key() -> bool:
    """Whether W&B would find an API key: in the environment, its own settings, or netrc."""
    stored = _stored_settings()
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or stored.get("api_key"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or stored.get("base_url", "https://api.wandb.ai")).netloc
    try:
        found = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])


def _stored_settings() -> dict[str, str]:
    """Settings files that `wandb login --host`, `wandb offline` and `wandb disabled` write: the user's, then over them
    the working directory's."""
    found: dict[str, str] = {}
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    for path in (own / "settings", Path("wandb/settings")):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
            found |= dict(parser.items("default")) if parser.has_section("default") else {}
        except (configparser.Error, UnicodeDecodeError):
            continue
    return found
