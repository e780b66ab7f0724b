"""`fastpeft doctor`: what this machine can do, what it lacks, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastpeft._version import __version__
from fastpeft.doctor import machine, surroundings
from fastpeft.doctor.check import Check, Finding, carry_out

__all__ = ["Check", "Finding", "can_train", "checks", "examine", "to_json"]


def checks(results_dir: Path) -> list[Check]:
    """Every check, in display order. The version checks come first, because they do not load torch."""
    return [
        Check("fastpeft", machine.fastpeft),
        Check("packages", machine.packages),
        Check("imports", machine.imports, timeout_s=60.0),
        Check("device", machine.device, timeout_s=30.0),
        Check("threads", machine.threads),
        Check("kernels", machine.kernels),
        Check("energy", machine.energy),
        Check("hub", surroundings.hub, timeout_s=surroundings.HUB_TIMEOUT_S + 1),
        Check("hub cache", surroundings.hub_cache),
        Check("W&B", surroundings.wandb_key),
        Check("results", partial(surroundings.results_folder, results_dir)),
        Check("disk", partial(surroundings.disk, results_dir)),
    ]


def examine(results_dir: Path) -> list[Finding]:
    """Run every check, one after another. Takes a few seconds; a check that raises becomes a finding."""
    return [finding for check in checks(results_dir) for finding in carry_out(check)]


def can_train(findings: list[Finding]) -> bool:
    return not any(finding.fatal for finding in findings)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "fastpeft": __version__,
        "can_train": can_train(findings),
        "checks": [asdict(finding) for finding in findings],
    }
