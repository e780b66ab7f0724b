"""Options that training commands share."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError


def results_option(results_dir: Path) -> str:
    """The option to show in a suggested command; empty if the folder is the default."""
    return "" if results_dir == Path("results") else f" --results-dir {shlex.quote(str(results_dir))}"


def seeds_of(text: str, seed: int | None) -> list[int]:
    """The seeds of --seeds. Raises UserError for invalid ones, or if --seed, `seed`, is given too."""
    from fastpeft.config import parse_seeds

    if seed is not None:
        raise UserError("--seed and --seeds: give one of them")
    try:
        return parse_seeds(text)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def load_config(
    run: str | None,
    overrides: list[str],
    budget: str | None,
    seed: int | None,
    mode: str,
    resume: bool,
    num_seeds: int,
) -> Any:
    """The RunConfig of the options; None if a resume uses the stored one."""
    from fastpeft.config import load_run, preset_names, trial_run

    if mode not in ("trial", "full"):
        raise UserError(f"--mode {mode!r}: expected trial or full")
    texts = list(overrides)
    texts += [f"budget={json.dumps(budget)}"] if budget is not None else []
    texts += [f"training.seed={seed}"] if seed is not None else []
    if run is None:
        if not resume:
            raise UserError(f"train needs --run: a YAML file or one of {', '.join(preset_names())}")
        if texts or mode == "trial":
            raise UserError("--resume without --run takes the stored settings; give --run to check others against them")
        return None
    config = load_run(run, texts)
    return trial_run(config, num_seeds) if mode == "trial" else config
