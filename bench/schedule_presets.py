"""The shipped presets of a task as runs that bench/schedules.py can compare."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import Any

import torch

from bench.schedule_report import BASELINE
from fastpeft.config import RunConfig, apply_stand_in, load_run, preset_names, run_values, with_values
from fastpeft.errors import UserError


class Presets:
    """Presets that differ from the baseline's only in schedule, optimizer and learning rate. Names are without task."""

    def __init__(self, args: argparse.Namespace) -> None:
        """`args.overrides`: strings key=value."""
        presets = preset_names()
        baseline = next(name for name in (f"{BASELINE}_{args.task}", f"lora_{args.task}") if name in presets)
        self.args, self.overrides = args, load_run(baseline, args.overrides).overrides
        found = {BASELINE: self._prepare(baseline)}
        for name in presets:
            label = name.removesuffix(f"_{args.task}")
            if label != name and name != baseline:
                run = self._prepare(name)
                if self._rest(run) == self._rest(found[BASELINE]) and _kind(run) != _kind(found[BASELINE]):
                    found[label] = run
        self.found = found

    def choose(self, text: str | None) -> dict[str, RunConfig]:
        """Presets named in `text`, comma-separated. Raises UserError for an unknown name, with the nearest known."""
        if text == "all":
            return self.found
        own = [name for name, run in self.found.items() if name in (run.schedule.name, run.optimizer.name)]
        names = [part.strip() for part in text.split(",")] if text else own
        for name in names:
            if name not in self.found:
                near = get_close_matches(name, self.found, 1)
                hint = f"; did you mean {near[0]}?" if near else "."
                known = ", ".join(self.found)
                raise UserError(f"--schedules {name}: no such schedule{hint} There are {known}; all takes them all")
        return {name: self.found[name] for name in dict.fromkeys([BASELINE, *names])}

    def _prepare(self, preset: str) -> RunConfig:
        args = self.args
        if args.model:
            run = load_run(preset, {"model.name": args.model, "dataset.path": args.data})
        else:
            run = load_run(preset)
            if run.stand_in is None:
                raise UserError(f"preset {preset} has no stand-in: give --model and --data")
            run = apply_stand_in(run)
        values = {
            "evaluation.every": "end",
            "evaluation.max_examples": args.max_examples,
            "evaluation.max_test_examples": args.max_examples,
            "training.checkpoint_steps": 10**9,
            "wandb.mode": "disabled",
        }
        if not torch.cuda.is_available():
            values["training.threads"] = 1
        if args.quick:
            values["evaluation.max_new_tokens"] = 16
        return with_values(run, values | self.overrides)

    @staticmethod
    def _rest(run: RunConfig) -> dict[str, Any]:
        """Settings that must be the same in all compared runs."""
        values = run_values(run)
        kept = {key: values[key] for key in ("method", "model", "adapter", "dataset", "training", "evaluation")}
        return kept | {"training": values["training"] | {"learning_rate": None}}


def _kind(run: RunConfig) -> tuple[Any, Any]:
    return run.schedule, run.optimizer


def run_of(run: RunConfig, seed: int, rate: float, budget: str) -> RunConfig:
    return with_values(run, {"training.seed": seed, "training.learning_rate": rate, "budget": budget})
