"""One row of bench/throughput.py in its own process, so that the peak of memory is that of this row.

    python bench/throughput_worker.py FOLDER ROW SEED [--curve]

The worker is set up once, warms up, answers `ready`, and then follows each line on its standard input, {"steps": N} or
{"stop": true}. Its answers are lines of JSON on its standard output; all other output goes to standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.throughput_presets import PRESETS, Plan


class Turns:
    """Called between two steps: answers, waits for the next line, and times the steps between two such waits.

    Args:
        warmup_steps: steps before the first wait.
        trims: return freed memory to the system before a wait, and start each turn with an untimed step.
    """

    def __init__(self, lines: IO[str], answers: IO[str], device: torch.device, warmup_steps: int, trims: bool) -> None:
        self._lines, self._answers, self._device, self._trims = lines, answers, device, trims
        self._until = warmup_steps
        self._begins_at: int | None = None
        """Number of steps after which the clock starts."""
        self._began = (0.0, 0.0, 0, 0)
        self.stopped = False

    def __call__(self, num_steps: int, num_tokens: int) -> bool:
        if self.stopped:
            return True
        if num_steps == self._begins_at:
            self._start(num_steps, num_tokens)
        if num_steps < self._until:
            return False
        self._wait()
        if self._begins_at is None:
            self.answer(ready=True, peak_mb=peak_mb(self._device))
        else:
            began_s, began_cpu_s, steps, tokens = self._began
            seconds = {"seconds": time.perf_counter() - began_s, "cpu_s": time.process_time() - began_cpu_s}
            taken = {"steps": num_steps - steps, "tokens": num_tokens - tokens}
            self.answer(**seconds, **taken, peak_mb=peak_mb(self._device))
        if self._trims:
            trim()
        order = json.loads(self._lines.readline() or '{"stop": true}')
        self.stopped = "stop" in order
        if self.stopped:
            return True
        self._begins_at = num_steps + self._trims
        self._until = self._begins_at + order["steps"]
        if num_steps == self._begins_at:
            self._start(num_steps, num_tokens)
        return False

    def answer(self, **fields: Any) -> None:
        self._answers.write(json.dumps(fields) + "\n")
        self._answers.flush()

    def _start(self, num_steps: int, num_tokens: int) -> None:
        self._wait()
        self._began = time.perf_counter(), time.process_time(), num_steps, num_tokens

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_mb(device: torch.device) -> float:
    """Peak memory since the process began: on a GPU by torch's allocator, on a CPU of the whole process with libraries.

    On Linux VmHWM is used, since ru_maxrss is at least the parent's memory at the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def trim() -> None:
    """Return freed memory that the C library keeps to the system."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if give_back is not None:
        give_back(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("row")
    parser.add_argument("seed", type=int)
    parser.add_argument("--curve", action="store_true")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plan = Plan.read(args.folder)
    torch.set_num_threads(plan.threads)
    preset = PRESETS[plan.preset]
    turns = Turns(sys.stdin, answers, torch.device(plan.device), plan.warmup_steps, preset.trims and not args.curve)

    from bench.throughput_rows import train

    losses = train(args.row, plan, args.folder, args.seed, turns, args.curve)
    turns.answer(losses=losses)


if __name__ == "__main__":
    main()
