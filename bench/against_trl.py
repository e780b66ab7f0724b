"""Held-out perplexity on conversations after the same tokens: fastpeft against TRL's SFTTrainer.

    python bench/against_trl.py --run RUN [--seeds 0,1,2] [--steps 100] [--json OUT] [key=value ...]

RUN is a run file or preset of a language model; where its model or data cannot be reached, its stand-in is used. Both
trainers have the same rows, tokens, labels (the answers alone), rank, targets, batch size, learning rate, linear decay,
warm-up and number of steps, in fp32 on one thread. They take turns within each seed. --steps is cut to an epoch, so
that each row is read at most once. Both draw batches at random: batches of similar length give a token of a short row
more weight. The trainers differ, and so does the random order of the rows. `training.sampling=group_by_length` measures
fastpeft's own batches.

The perplexity is computed here, with transformers and PEFT alone and one row at a time, on the adapters of both.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import fastpeft
from bench.hf_trainer import load_model, trainer_settings, with_lora
from bench.report import about, json_path, print_table, write_json
from fastpeft.compare.comparison import mean_of
from fastpeft.config import RunConfig, load_run, with_values
from fastpeft.errors import UserError
from fastpeft.models.backbone import quiet_transformers
from fastpeft.runs.events import read_events
from fastpeft.schedules.schedule import WARMUP_CAP
from fastpeft.standins import embedded_path
from fastpeft.tasks import Task, load_task
from fastpeft.tasks.causal_lm.labelled_rows import LabelledRows
from fastpeft.trainer.resolve import resolve

SETTINGS = {
    "training.precision": "fp32",
    "training.threads": 1,
    "training.checkpoint_steps": 1_000_000,
    "schedule.name": "linear",
    "training.sampling": "random",
    "evaluation.every": "end",
    "evaluation.max_new_tokens": 1,
    "wandb.mode": "disabled",
}
ROWS = ("before", "SFTTrainer", "fastpeft")


def run_of(args: argparse.Namespace, seed: int) -> RunConfig:
    warmup_steps = int(WARMUP_CAP * args.steps)  # fastpeft cuts a longer warm-up, SFTTrainer does not
    settings = SETTINGS | {"training.seed": seed, "budget": f"{args.steps}steps", "schedule.warmup_steps": warmup_steps}
    run = with_values(resolve(load_run(args.run, args.settings)).run, settings)
    shipped = embedded_path(run.model.name)
    return run if shipped is None else with_values(run, {"model.name": str(shipped)})


def encoded_rows(run: RunConfig) -> tuple[Task, LabelledRows, LabelledRows]:
    """The task, and its training and validation rows with fastpeft's tokens and labels."""
    task, cpu = load_task(run.dataset, run.evaluation, run.training.seed), torch.device("cpu")
    task.encode(task.load_model(run.model, torch.float32, cpu), cpu)
    rows: Any = task
    return task, rows.train, rows.validation


def train_with_sft(run: RunConfig, task: Task, rows: LabelledRows, steps: int) -> nn.Module:
    """Returns the model with its adapter."""
    import datasets
    import transformers
    import trl

    transformers.set_seed(run.training.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model.name, local_files_only=True)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for row in range(len(rows)):
        places = set(rows.places(row).tolist())
        tokens = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        columns["input_ids"].append(tokens)
        columns["completion_mask"].append([int(place in places) for place in range(len(tokens))])
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        settings = trainer_settings(run, Path(folder), "random") | {"max_steps": steps, "use_cpu": True}
        settings |= {"adam_beta1": run.optimizer.beta1, "adam_beta2": run.optimizer.beta2}
        own = {"max_length": run.dataset.max_length, "completion_only_loss": True, "gradient_checkpointing": False}
        model = with_lora(load_model(task, run), task, run)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**settings | own),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer,
        )
        trainer.train()
    return model


def train_with_fastpeft(run: RunConfig, task: Task) -> tuple[nn.Module, int]:
    """Returns the model with its adapter, loaded by PEFT alone, and the number of steps taken."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        result = fastpeft.train(run, results_dir=folder, name="run")
        if result.status != "done":
            raise SystemExit(f"the run with seed {run.training.seed} has {result.status} after {result.steps} steps")
        steps = sum(event["type"] == "step" for event in read_events(Path(folder) / "run" / "events.jsonl"))
        base: Any = load_model(task, run)
        return peft.PeftModel.from_pretrained(base, str(Path(folder) / "run" / "adapter")), steps


@torch.inference_mode()
def held_out(model: nn.Module, rows: LabelledRows, most: int) -> float:
    """Mean negative log-likelihood of the labelled tokens of the first `most` rows, in nats."""
    model.eval()
    total, count = 0.0, 0
    for row in range(min(most, len(rows))):
        tokens = torch.from_numpy(rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].astype("int64"))
        places = torch.from_numpy(rows.places(row).astype("int64"))
        logits = model(input_ids=tokens[None]).logits[0, places - 1].float()
        total += nn.functional.cross_entropy(logits, tokens[places], reduction="sum").item()
        count += len(places)
    return total / count


def measure(args: argparse.Namespace) -> dict[str, Any]:
    losses: dict[str, list[float]] = {row: [] for row in ROWS}
    report: dict[str, Any] = about(torch.device("cpu")) | {"seeds": args.seeds, "losses": losses}
    for turn, seed in enumerate(args.seeds):
        run = run_of(args, seed)
        task, train, validation = encoded_rows(run)
        steps = min(args.steps, len(train) // run.training.batch_size)
        run = with_values(run, {"budget": f"{steps}steps"})
        report |= {"steps": steps, "batch_size": run.training.batch_size, "rate": run.training.learning_rate}
        report |= {"model": Path(run.model.name).name, "dataset": run.dataset.name}
        losses["before"].append(held_out(load_model(task, run), validation, args.rows))
        for row in ROWS[1:] if turn % 2 else ROWS[:0:-1]:
            if row == "fastpeft":
                model, made = train_with_fastpeft(run, task)
                assert made == steps, f"fastpeft made {made} steps of {steps}"
            else:
                model = train_with_sft(run, task, train, steps)
            losses[row].append(held_out(model, validation, args.rows))
            print(f"seed {seed} {row}: perplexity {math.exp(losses[row][-1]):.4f}", flush=True)
        if args.json:
            write_json(args.json, report)
    return report


def show(report: dict[str, Any]) -> None:
    losses = report["losses"]
    apart = [own - peer for own, peer in zip(losses["fastpeft"], losses["SFTTrainer"])]
    lines = [[row, f"{math.exp(statistics.fmean(losses[row])):.4f}", str(mean_of(losses[row])), ""] for row in losses]
    lines[-1][-1] = str(mean_of(apart))
    title = f"{report['model']} on {report['dataset']}, {report['steps']} steps of {report['batch_size']} rows"
    print_table(title, ["", "perplexity", "held-out loss (nats)", "minus SFTTrainer"], lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200, help="validation rows that are scored")
    parser.add_argument("--json", type=json_path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of both, as `fastpeft train` takes them")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    try:
        report = measure(args)
    except UserError as error:
        raise SystemExit(f"{error}") from None
    show(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
