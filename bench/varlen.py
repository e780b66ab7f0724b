"""Unpadded against padded rows in fastpeft: an optimizer step of each in turns on the same batches.

    python bench/varlen.py --run lora_mnli [--order drawn|grouped] [--batches 8] [--seconds 60] [key=value ...]

`drawn` batches have rows in random order, so that only micro-batches group rows by length; `grouped` batches have
rows of similar length. Both ways use the token limit that the padded run plans. Ratios are padded time over unpadded
time, so that more than 1 is a gain. On a busy machine compare CPU time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.interleave import host_timer, interleave, timer
from fastpeft.config import load_run
from fastpeft.data.batches import Batches, micro_batches
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.padding import padding_share
from fastpeft.trainer.resolve import resolve
from fastpeft.trainer.step import forward_backward

WAYS = ("padded", "none")


class Steps:
    """Steps of one job on given batches; `cpu_s` holds the CPU seconds of each."""

    def __init__(self, job: Job, batches: list[np.ndarray], limit: int) -> None:
        self.job, self.batches, self.limit = job, batches, limit
        self.cpu_s: list[float] = []
        job.adapter.model.train()

    def take(self, index: int) -> None:
        began = time.process_time()
        job, rows = self.job, self.batches[index]
        parts = (job.task.collate(part, job.device) for part in micro_batches(job.task.train, rows, self.limit))
        signals = forward_backward(job.adapter, job.task.loss, parts, job.task.num_items(rows))
        job.optimizer.clip_guard_and_update(signals, job.schedule.rates(None, 0.1))
        self.cpu_s.append(time.process_time() - began)

    def padding(self) -> float:
        """Share of padding tokens in the micro-batches."""
        rows = self.job.task.train
        parts = [part for batch in self.batches for part in micro_batches(rows, batch, self.limit)]
        tokens = sum(int(rows.lengths[part].sum()) for part in parts)
        return 1 - tokens / sum(len(part) * int(rows.widths[part].max()) for part in parts)


def choose_batches(job: Job, order: str, count: int) -> list[np.ndarray]:
    epoch = Batches(job.task.train, job.batches.batch_size, job.batches.seed, order == "grouped").epoch(0)
    return [epoch[i] for i in np.linspace(0, len(epoch) - 1, min(count, len(epoch))).astype(int)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--order", choices=("drawn", "grouped"), default="drawn")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as `fastpeft train` takes them")
    arguments = parser.parse_intermixed_args()
    made = {}
    for way in WAYS:
        run = resolve(load_run(arguments.run, [*arguments.settings, f"training.padding={way}"])).run
        torch.set_num_threads(run.training.threads or torch.get_num_threads())
        made[way] = build_job(run)
    if not made["none"].task.train.varlen:
        raise SystemExit("\n".join(note for note in made["none"].notes if "training.padding" in note))
    padded = made["padded"]
    batches = choose_batches(padded, arguments.order, arguments.batches)
    limit = padded.limits.training
    steps = {way: Steps(job, batches, limit) for way, job in made.items()}
    for each in steps.values():
        each.take(0)  # a warm-up
        each.cpu_s.clear()
    times = interleave(
        {way: each.take for way, each in steps.items()}, len(batches), 10**6, timer(arguments.seconds),
        host_timer(padded.device),
    )  # fmt: skip
    cpu = {way: np.array(each.cpu_s) for way, each in steps.items()}
    paired = (cpu["padded"].reshape(-1, 2).sum(1)) / cpu["none"].reshape(-1, 2).sum(1)
    low, middle, high = np.percentile(paired, [25, 50, 75])
    wall = times.ratio("padded", "none")[0]
    print(
        f"{arguments.run}, {arguments.order} batches of {padded.batches.batch_size}, micro-batches of {limit:,} "
        f"tokens, {torch.get_num_threads()} thread(s): {steps['padded'].padding():.1%} padding in micro-batches, and "
        f"{padding_share(padded.batches):.1%} in those that auto looks at"
    )
    print(
        f"padded over none, {len(paired)} rounds: CPU time {middle:.3f} ({low:.3f} to {high:.3f}), wall {wall:.3f}; "
        f"CPU {np.median(cpu['padded']) * 1e3:.0f} and {np.median(cpu['none']) * 1e3:.0f} ms a step"
    )


if __name__ == "__main__":
    main()
