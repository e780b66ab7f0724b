"""Provenance of a result file (device, versions, commit), and tables of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastpeft.runs.system import git_commit

_PACKAGES = ("torch", "triton", "transformers", "peft")


def about(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    return {
        "device": device_name(device),
        "driver": driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(facts.get("cpu_name") or platform.processor() or platform.machine())


def driver() -> str | None:
    """Version of the NVIDIA kernel module; None if it cannot be read."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[:1].isdigit() and "." in word), None)


def _versions() -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[package] = None
    return out


def json_path(text: str) -> Path:
    """For argparse: a file that can be written, checked before anything is measured."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError(f"{path} cannot be written")
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def write_json(path: Path, body: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table. The first column is text, the others are right-aligned; None is shown as a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
