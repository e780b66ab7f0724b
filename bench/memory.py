"""Planned against measured peak memory of training runs, each in a process of its own.

    python bench/memory.py [--run "lora_mnli model.name=PATH dataset.path=PATH"]... [--model PATH] [--steps 30]
                           [--json OUT]

A run is a preset or a file, followed by settings. Without --run the stand-in of every kind of task is trained;
--model adds word problems on a given language model, such as Gemma 3 270M. The plan is read from the run's first
event, before its first step. The peak covers the whole process, including evaluation and saving (VmHWM on a CPU, the
allocator's on a GPU). Exit code 1 where a plan is off by more than 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.2
STAND_INS = ("lora_mnli", "lora_conll2003", "lora_stsb", "lora_goemotions", "linear_gsm8k", "lora_alpaca")
"""One preset of each kind of task."""


@dataclass(frozen=True)
class Row:
    run: str
    kind: str
    held_mb: float
    """Memory held before the first step."""
    planned_mb: float
    measured_mb: float

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return self.planned_mb / self.measured_mb

    @property
    def is_off(self) -> bool:
        return abs(self.ratio - 1) > GOAL


def command(run: str, steps: int, results_dir: Path) -> list[str]:
    """Command that trains `run`, a preset's name or a file, followed by settings."""
    name, *settings = shlex.split(run)
    given = [f"budget={steps}steps", "evaluation.every=end", "evaluation.max_examples=256", "wandb.mode=disabled"]
    where = ["--run", name, "--name", "r", "--results-dir", str(results_dir)]
    return [sys.executable, "-m", "fastpeft", "train", *where, *given, *settings]


def measure(run: str, steps: int) -> Row:
    """Train `run` in its own process and read its row. Raises SystemExit if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command(run, steps, Path(folder)), env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{run}: {done.stderr.strip()}")
        return read_row(run, Path(folder) / "r")


def read_row(run: str, folder: Path) -> Row:
    """Row of the finished run in `folder`."""
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    plan: dict[str, Any] = next(event["memory"] for event in events if event["type"] == "run")
    result = json.loads((folder / "result.json").read_text())
    return Row(run, result["kind"], plan["held_mb"], plan["peak_mb"], result["peak_memory_mb"])


def table(rows: list[Row]) -> str:
    lines = ["| run | kind | before the first step | planned peak | measured | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.held_mb:,.0f} MB | {row.planned_mb:,.0f} MB | {row.measured_mb:,.0f} MB"
        lines.append(f"| `{row.run}` | {row.kind} | {figures} | {row.ratio:.2f}{' **off**' if row.is_off else ''} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", help="a preset or a file, with settings; may be given again")
    parser.add_argument("--model", type=Path, help="a folder with a language model of one's own")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: the optimizer's memory is taken at the first step; give at least 2")
    if args.model is not None and not args.model.is_dir():
        parser.error(f"--model {args.model}: there is no such folder")
    runs = list(args.run or STAND_INS)
    if args.model is not None:
        runs.append(shlex.join(["linear_gsm8k", f"model.name={args.model}", "dataset.name=embedded-word-problems"]))
    rows = []
    for run in runs:
        rows.append(measure(run, args.steps))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if args.json is not None:
            found = {"steps": args.steps, "rows": [asdict(row) | {"ratio": round(row.ratio, 3)} for row in rows]}
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    print("\n" + table(rows))
    return int(any(row.is_off for row in rows))


if __name__ == "__main__":
    sys.exit(main())
