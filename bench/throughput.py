"""Real tokens per second of fastpeft, of each of its levers, and of its peers, in turns on the same batches.

    python bench/throughput.py [--preset mnli|deberta|gsm8k|gemma|alpaca] [--model DIR] [--data DIR]
                               [--rows R,R] [--rounds 6] [--steps N] [--seconds S] [--threads N] [--device cpu|cuda]
                               [--curves [1,2,3]] [--json OUT] [key=value ...]

    mnli     MiniLM (--model), else its shape with random weights; LoRA r 8 on all linears, batch 32. On a GPU the shape
             of DeBERTa-v3-base in bf16.
    deberta  The shape of DeBERTa-v3-base with random weights, on a CPU as well.
    gsm8k    A random Qwen3 of 384 x 6, vocabulary 32,000; r 64, batch 16. On a GPU the shape of Qwen3-0.6B in bf16.
    gemma    Gemma 3 270M (--model); r 64, batch 16; the peers in micro-batches of 4.
    alpaca   The same on instructions in the template `alpaca`, r 16.

    hf_padded        transformers' Trainer and PEFT, each row padded to the longest length.
    hf_grouped       The same, rows of similar length padded to the longest of them. Base of the ratios.
    hf_compiled      The same with torch_compile=True.
    trl              TRL's SFTTrainer, on language models, loss on the answers alone.
    trl_packed       The same with packing, which makes its own batches.
    unsloth, liger   On a GPU, where they are installed.
    fastpeft         fastpeft's own training loop, on a GPU with training.cuda_graphs=auto.
    fastpeft_plain   Without any lever; fastpeft_NAME with one lever alone: LEVERS in bench/throughput_presets.py.
                     `levers` in --rows means all of these.
    fastpeft_launched  With training.cuda_graphs=off; runs only if named in --rows.
    fastpeft_packed  With training.padding=none; runs only if named in --rows.
    fastpeft_prefix  With training.cache_prefix, after its first epoch; for adapter.target_modules on upper layers; runs
                     only if named in --rows.

Every row is a process of its own, set up and warmed up before timing. A round is one turn of each row forwards and
one backwards, of `--steps` steps. Rows of a turn train on the same batches, with the same rank, dropout, precision and
optimizer (bench/throughput_inputs.py). `tok/s` and `ms a step` are medians over the turns. A ratio is the median over
the rounds of hf_grouped's time per token over the row's, with a 95 % bootstrap interval from five rounds on. `by CPU
time` is the same ratio of the processes' CPU seconds, which other work on the machine affects less. `peak MB` is that
of the whole process, on a GPU of torch's allocator. `--curves` trains each row once more per seed: a row whose losses
differ from hf_grouped's by more than the seeds explain is void. `key=value` is a setting of the run, such as
training.batch_size=8, for all rows.

Without --data a random model trains on random words with the lengths of real rows, a pretrained one on the generated
data that ships. Exit code 1 if a row failed or is void.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.interleave import choose_device, names_in, positive, timer
from bench.report import about, json_path, print_table, write_json
from bench.throughput_curves import CURVE_STEPS, apart
from bench.throughput_presets import (
    BASE,
    CUDA_STEPS,
    LEVER_ROWS,
    ONLY_BY_NAME,
    PEERS,
    PREFIX,
    PRESETS,
    ROWS,
    WARMUP_STEPS,
    Plan,
)
from bench.throughput_turns import RowFailed, Timed, Worker, prepare

Save = Callable[[dict[str, Any]], None]


def measure(args: argparse.Namespace, save: Save = lambda report: None) -> dict[str, Any]:
    """Measure the rows. `save` receives the partial report after each round."""
    preset = PRESETS[args.preset]
    missing = {row: why for row in args.rows if row in PEERS and (why := PEERS[row].missing(preset, args.device))}
    rows = [row for row in args.rows if row not in missing]
    plan, steps = plan_of(args, rows)
    torch.set_num_threads(plan.threads)
    report = about(torch.device(plan.device)) | describe(args, plan, steps)
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        folder = Path(name)
        plan.write(folder)
        prepare(folder, plan)
        with Timed(folder, plan, steps, rows) as timed:
            timed.set_up()
            until = timer(args.seconds or math.inf)

            def over() -> bool:
                save(report | timed.report(missing))
                return until()

            timed.take_turns(args.rounds, over)
        report |= timed.report(missing)
        if args.curves:
            report |= add_curves(report["rows"], folder, plan, args.curves)
    return report


def plan_of(args: argparse.Namespace, rows: list[str]) -> tuple[Plan, int]:
    """Returns the plan, and the number of steps per turn."""
    preset = PRESETS[args.preset]
    steps = args.steps or (CUDA_STEPS if args.device == "cuda" else preset.steps)
    plan = Plan(
        preset=args.preset,
        model=args.model,
        data=args.data,
        device=args.device,
        threads=args.threads or preset.threads,
        warmup_steps=max([WARMUP_STEPS, *(PEERS[row].warmup_steps for row in rows if row in PEERS)]),
        num_steps=max(2 * args.rounds * (steps + preset.trims), CURVE_STEPS if args.curves else 0),
        settings=args.settings,
    )
    return plan, steps


def _name(folder: str | None) -> str | None:
    """Last two parts of the folder's path, since its place on one machine is no result."""
    return folder and "/".join(Path(folder).parts[-2:])


def describe(args: argparse.Namespace, plan: Plan, steps: int) -> dict[str, Any]:
    run, preset = plan.run(Path()), PRESETS[args.preset]
    random = "" if plan.has_weights else ", random weights"
    return {
        "preset": args.preset,
        "model": (_name(args.model) or preset.shapes[args.device]["model_type"]) + random,
        "data": _name(args.data) or ("made up" if plan.makes_up_data else run.dataset.name),
        "batch_size": run.training.batch_size,
        "rank": run.adapter.rank,
        "precision": run.training.precision,
        "settings": plan.settings,
        "warmup_steps": plan.warmup_steps,
        "steps_a_turn": steps,
    }


def add_curves(rows: list[dict[str, Any]], folder: Path, plan: Plan, seeds: list[int]) -> dict[str, Any]:
    """Losses of each timed row by seed. Sets `void` of rows whose losses differ from hf_grouped's."""
    curves: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["tokens_a_s"] is None or row["failed"] or row["name"] == PREFIX:
            continue
        try:
            curves[row["name"]] = [Worker.curve(folder, row["name"], plan, seed) for seed in seeds]
        except RowFailed as error:
            row["failed"] = f"while its curve was taken: {error}"
        print(f"curve of {row['name']}: {len(seeds)} seeds", flush=True)
    for row in rows:
        if row["name"] in curves and BASE in curves and not (row["name"] in PEERS and PEERS[row["name"]].own_batches):
            far = apart(curves[row["name"]], curves[BASE])
            row["curve"] = far.to_json()
            row["void"] = row["void"] or (far.words if far.is_apart else None)
    return {"curves": curves, "curve_seeds": seeds}


# ---- showing -------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    title = (
        f"{report['preset']}: {report['model']} on {report['data']}, {report['device']}, {report['precision']}, rank "
        f"{report['rank']}, batches of {report['batch_size']}, {report['rounds']} rounds of 2 x "
        f"{report['steps_a_turn']} steps"
    )
    columns = [
        "",
        "tok/s",
        "ms a step",
        f"x {BASE}",
        "95 % interval",
        "by CPU time",
        "peak MB",
        f"of {BASE}'s",
        "J/ktok",
        "remark",
    ]
    lines = []
    for row in report["rows"]:
        interval = None if row["ratio_low"] is None else f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        remark = row["missing"] or row["failed"] or (row["void"] and f"void: {row['void']}") or ""
        cells = [
            _figure(row["tokens_a_s"], ",.0f"),
            _figure(row["step_ms"], ",.1f"),
            _figure(row["ratio"], ".3f"),
            interval,
            _figure(row["cpu_ratio"], ".3f"),
            _figure(row["peak_mb"], ",.0f"),
            _figure(row["memory_ratio"], ".2f"),
            _figure(row["joules_a_ktoken"], ".2f"),
        ]
        lines.append([row["name"], *cells, remark[:80]])
    print_table(title, columns, lines)


def _figure(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


# ---- arguments -----------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="mnli")
    parser.add_argument("--model", help="a folder; with a config.json alone its shape gets random weights")
    parser.add_argument("--data", help="a folder with train.* and dev.* files, of word problems train.* alone")
    parser.add_argument("--rows", help="only these, comma-separated; `levers` are those of fastpeft's levers")
    parser.add_argument("--rounds", type=positive, default=6)
    parser.add_argument("--steps", type=positive, help="a turn; a few, as the preset has them, and 20 on a GPU")
    parser.add_argument("--seconds", type=float, help="no round begins later than this after the set-up")
    parser.add_argument("--threads", type=positive, help="the preset's own when absent")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--curves", type=_seeds, nargs="?", const=[1, 2, 3], help="seeds, two or more")
    parser.add_argument("--json", type=json_path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the run, for all rows")
    args = parser.parse_args(argv)
    try:
        args.device = choose_device(args.device).type
        asked = args.rows or ",".join(row for row in ROWS if row not in ONLY_BY_NAME)
        args.rows = names_in(asked.replace("levers", ",".join(LEVER_ROWS)), ROWS)
    except SystemExit as error:
        parser.error(str(error))
    for name, wanted in (("model", "config.json"), ("data", "")):
        path = getattr(args, name)
        if path is not None and not (Path(path) / wanted).exists():
            parser.error(f"--{name} {path}: there is no such folder{wanted and f' with a {wanted} in it'}")
    if args.model is None and args.device not in PRESETS[args.preset].shapes:
        parser.error(f"--preset {args.preset} trains a pretrained model: give its folder as --model")
    args.settings = dict(pair.partition("=")[::2] for pair in args.settings)
    try:
        plan_of(args, [])[0].run(Path())
    except ValueError as error:
        parser.error(str(error))
    return args


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(",")]
    if len(set(seeds)) < 2:
        raise ValueError(text)
    return seeds


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    report = measure(args, lambda report: write_json(args.json, report) if args.json else None)
    show(report)
    if args.json:
        write_json(args.json, report)
    raise SystemExit(any(row["failed"] or row["void"] for row in report["rows"]))


if __name__ == "__main__":
    main()
