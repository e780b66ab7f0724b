"""Time of each operation against its rivals and against this machine's ceilings.

    python bench/kernels.py [--parts lora,cross_entropy] [--device cpu|cuda] [--seconds 240] [--json OUT]

First the ceilings are measured: the bandwidth of a large copy and the rate of the largest matrix product. Then the
operations run in turns with their rivals; a star marks the one that fastpeft itself uses. `floor` is the time of the
least work and the least traffic of an operation at these ceilings, and `reached` is floor over time. On a GPU a
time is the device's: launches are queued behind a pause, so that the host's time to issue them does not count
(bench/overhead.py has whole steps, where it does). Inputs stay the same between calls, so that small ones are in
cache, as in a training step. `ratio` is the median of paired ratios to the rival in `to`, with a 95 % bootstrap
interval. Each part has its share of the seconds, and leaves out the cases for which no time remains.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.interleave import Measure, choose_device, host_timer, interleave, names_in, timer
from bench.kernel_cases import PARTS, Case, Setting
from bench.report import about, json_path, print_table, write_json
from fastpeft.errors import first_line
from fastpeft.kernels.tune import DeviceTimer
from fastpeft.models.precision import choose_precision

MAX_ROUNDS = 30
SECONDS_A_CASE = 3.0
SHARES = {"lora": 3}
"""Relative share of the seconds, by part; 1 for parts not listed."""


def timer_of(device: torch.device, small: bool) -> Measure:
    if device.type != "cuda":
        return host_timer(device, calls=1 if small else 3)
    microseconds = DeviceTimer(device, calls=4, pause_cycles=1_500_000)
    return lambda run: microseconds(run) * 1e-6


def ceilings(setting: Setting) -> dict[str, float]:
    """Bytes per second, read and written, of the best copy; FLOP per second of the best product, on random data."""
    on_gpu = setting.device.type == "cuda"
    num_bytes = 2**30 if on_gpu else 2**26
    source = torch.randn(num_bytes // 4, device=setting.device)
    target = torch.empty_like(source)
    measure = timer_of(setting.device, small=False)
    copy_s = min(measure(lambda: target.copy_(source)) for _ in range(20))
    rates = []
    for size in (4096, 8192, 16384) if on_gpu else (512, 1024):
        left, right = setting.random(size, size), setting.random(size, size)
        best_s = min(measure(lambda left=left, right=right: left @ right) for _ in range(10 if on_gpu else 40))
        rates.append(2 * size**3 / best_s)
    return {"copy_bytes_per_s": 2 * num_bytes / copy_s, "matmul_flops": max(rates)}


def compare(case: Case, measure: Measure, until: Callable[[], bool], ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each rival; one that fails has a `fault` in place of a time."""
    able: dict[str, Callable[[int], object]] = {}
    faults: dict[str, str] = {}
    for name, run in case.rivals.items():
        try:
            run()
            run()  # compiles before the timing
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # of a compiler or driver, or out of memory
            faults[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        able[name] = lambda index, run=run: run()
    floor_s = max(case.flops / ceiling["matmul_flops"], case.num_bytes / ceiling["copy_bytes_per_s"])
    about_case = {"operation": case.operation, "shape": case.shape}
    rows = [about_case | {"name": name, "fault": fault} for name, fault in faults.items()]
    if not able:
        return rows
    times = interleave(able, 1, MAX_ROUNDS, until, measure)
    for name in able:
        ratio, low, high = times.ratio(name, case.base) if case.base in able else (None, None, None)
        row = {
            "name": name,
            "ours": name == case.ours,
            "us": round(times.median_s(name) * 1e6, 3),
            "spread_us": round(times.spread_s(name) * 1e6, 3),
            "floor_us": round(floor_s * 1e6, 3),
            "reached": round(floor_s / times.median_s(name), 4),
            "ratio": ratio,
            "ratio_to": case.base,
            "ratio_low": low,
            "ratio_high": high,
        }
        rows.append(about_case | row)
    return rows


def run_part(name: str, setting: Setting, seconds: float, ceiling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Rows of a part's cases, at least one case, until its time is over; then the number of cases left out."""
    measure, over = timer_of(setting.device, setting.small), timer(seconds)
    left = 0
    for i, case in enumerate(PARTS[name](setting)):
        if i and over():
            left += 1
            continue
        case_over = timer(min(SECONDS_A_CASE, seconds / 4))
        yield from compare(case, measure, lambda case_over=case_over: over() or case_over(), ceiling)
    if left:
        yield {"operation": name, "left_out": left}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = ["", "shape", "", "us", "spread", "floor", "reached", "ratio", "95 % interval", "to"]
    lines = []
    for row in rows:
        if "left_out" in row:
            lines.append([row["operation"], None, f"no time was left for {row['left_out']} cases", *[None] * 7])
            continue
        shape = " ".join(f"{key} {value}" for key, value in row["shape"].items())
        if "fault" in row:
            lines.append([row["operation"], shape, f"{row['name']}: {row['fault'][:60]}", *[None] * 7])
            continue
        ratio = None if row["ratio"] is None else f"{row['ratio']:.3f}"
        interval = None if row["ratio_low"] is None else f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        times = [f"{row[key]:.1f}" for key in ("us", "spread_us", "floor_us")]
        name = f"* {row['name']}" if row["ours"] else row["name"]
        line = [row["operation"], shape, name, *times, f"{row['reached']:.0%}", ratio, interval, row["ratio_to"]]
        lines.append(line)
    print_table(title, columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args()
    began = time.perf_counter()
    device, parts = choose_device(args.device), names_in(args.parts, list(PARTS))
    on_gpu = device.type == "cuda"
    dtype = choose_precision(args.precision, device, lambda: (768, 3072)).dtype
    setting = Setting(device, dtype, small=not on_gpu, compiled=on_gpu and not args.no_compile)
    ceiling = ceilings(setting)
    report = about(device) | {"precision": str(setting.dtype).removeprefix("torch."), "ceilings": ceiling, "rows": []}
    report["failed"] = {}
    for i, part in enumerate(parts):
        left = args.seconds - (time.perf_counter() - began)
        rows: list[dict[str, Any]] = []
        try:
            share = SHARES.get(part, 1) / sum(SHARES.get(name, 1) for name in parts[i:])
            for row in run_part(part, setting, left * share, ceiling):
                rows.append(row)
        except Exception as error:  # the other parts continue; the exit code reports the failure
            traceback.print_exc()
            report["failed"][part] = f"{type(error).__name__}: {first_line(error)}"
        report["rows"] += rows
        show(f"{part} on {report['device']}, {report['precision']}", rows)
        if args.json:
            write_json(args.json, report)  # partial results, in case the next part is stopped
    copy, matmul = ceiling["copy_bytes_per_s"] / 1e9, ceiling["matmul_flops"] / 1e12
    print(f"ceilings: copy {copy:.1f} GB/s, matrix product {matmul:.2f} TFLOP/s")
    raise SystemExit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
