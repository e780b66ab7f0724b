"""Step time of two ranks over that of one process with half of the batch: two cores, one thread each.

    python bench/rank_steps.py [--rounds 3] [--run lora_mnli] [--batch-size 32] [--steps 60]

Three alternatives in turns, forwards and then backwards: one process with half of the batch; two such processes side by
side, which share nothing but the machine; two gloo ranks with the whole batch. The second shows how much the machine's
two cores slow each other. The difference from it to the third is the all-reduce, and waiting for the slower rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 10
"""First steps, which are not timed."""
ALTERNATIVES = ("alone", "side by side", "ranks")


def start(folder: Path, name: str, run: str, steps: int, batch_size: int, *options: str) -> subprocess.Popen:
    values = [
        f"training.batch_size={batch_size}", f"budget={steps}steps", "training.threads=1", "training.precision=fp32",
        "evaluation.every=end", "evaluation.max_examples=16", "schedule.warmup_steps=0",
        "training.checkpoint_steps=9999",
    ]  # fmt: skip
    where = ["--run", run, "--name", name, "--results-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastpeft", "train", *where, *options, *values]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def step_s(log: Path) -> float:
    """Seconds of the median step in an event log."""
    events = map(json.loads, log.read_text().splitlines())
    at = [event["elapsed_s"] for event in events if event["type"] == "step"][SKIPPED:]
    return median(after - before for before, after in pairwise(at))


def measure(alternative: str, run: str, steps: int, batch_size: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if alternative == "ranks":
            started = [start(folder, "0", run, steps, batch_size, "--ranks", "2")]
        else:
            names = "01" if alternative == "side by side" else "0"
            started = [start(folder, each, run, steps, batch_size // 2) for each in names]
        if any(process.wait() for process in started):
            raise SystemExit(f"{alternative}: a run has failed")
        return max(step_s(log) for log in folder.glob("*/events.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", default="lora_mnli")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in ALTERNATIVES}
    for i in range(args.rounds):
        for name in ALTERNATIVES[:: 1 if i % 2 == 0 else -1]:
            found[name].append(measure(name, args.run, args.steps, args.batch_size))
            print(f"round {i + 1}: {name} {found[name][-1] * 1e3:.1f} ms", flush=True)
    for base in ALTERNATIVES[:2]:
        ratios = [mine / other for mine, other in zip(found["ranks"], found[base])]
        print(f"ranks over {base}: {median(ratios):.3f} (rounds {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
