"""Step cost of adapters and of IW-LoRA's regulariser, in fastpeft and in PEFT, on the same model and batches.

    python bench/overhead.py [--model deberta-v3-base|minilm|DIR] [--device cpu|cuda] [--json OUT] [--seconds 150]
                             [--rows fastpeft_lora,fastpeft_iwlora] [--repeats N] [--steps N]

Random weights of the real shapes and random tokens of MNLI-like lengths; no network. The rows:

    frozen                   A step without adapters: forward, backward through the same layers, update of the head. The
                             gradient reaches the output of every linear layer that the others adapt and, as with
                             adapters, stops at the lowest of them. There are no LoRA products.
    peft_lora                PEFT's LoRA in a bare loop: loss, backward, clip_grad_norm_, torch's fused AdamW, schedule.
    peft_lora_loop_penalty   With IW-LoRA's penalty as in its paper: a Python loop over the matrices that adds
                             alpha (1 - w_k) ||B A||_F^2 to the loss, differentiated by autograd.
    peft_adalora             PEFT's AdaLoRA with its own defaults (rank 12 to 8, deltaT 1) and update_and_allocate each
                             step, measured while it prunes.
    fastpeft_lora            The trainer's own train_step.
    fastpeft_iwlora          The same, calibrated, with the penalty.
    fastpeft_iwlora_online   The same, with sensitivities that are updated during training.
    fastpeft_unihyperlora, fastpeft_sat_lora, fastpeft_hf_sat_lora   The trainer's step of the methods that share atoms.
    calibration_exact, calibration_sketch   One batch of calibration: forward, backward, estimate; no update.

Every row has the same matrices (all linear layers, rank 8), precision, batches and dropout. A time is the median over
interleaved repeats, `spread_ms` their interquartile range, each averaged over a few batches of different widths, the
same ones for every row. A run too short for all widths lists the timed ones under `widths_timed`.
`ratio` is the median of paired ratios to the row's own LoRA, named in `ratio_to`, with a 95 % bootstrap interval:
PEFT's rows to peft_lora, all others to fastpeft_lora, so that these two are 1. `over_frozen` is the ratio to frozen.
bench/cost.py defines `launches` and `peak_mb`; `peak_mb` includes the frozen weights, once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from bench.cost import count_launches, launches_kind, peak_mb
from bench.interleave import Times, choose_device, host_timer, interleave, names_in, positive, timer
from bench.models import Host, classification_loss, random_batches
from bench.report import about, json_path, print_table, write_json
from fastpeft.adapters import Adapter, method_class
from fastpeft.adapters.flat import FlatParameters
from fastpeft.config import RunConfig
from fastpeft.config.methods import METHODS, AdapterConfig, RegulariserConfig
from fastpeft.config.schema import ModelConfig
from fastpeft.data.batches import Batch
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, quiet_transformers
from fastpeft.models.precision import choose_precision
from fastpeft.models.targets import match_targets
from fastpeft.schedules import make_schedule
from fastpeft.trainer.optim import FlatAdamW
from fastpeft.trainer.step import forward_backward, train_step

Step = Callable[[int], object]
"""Takes a training step on the batch of the given index."""

ROWS = {  # in the order of their turns: rows that are compared closely are neighbours
    "frozen": "fastpeft_lora",
    "peft_adalora": "peft_lora",
    "peft_lora_loop_penalty": "peft_lora",
    "peft_lora": "peft_lora",
    "calibration_exact": "fastpeft_lora",
    "calibration_sketch": "fastpeft_lora",
    "fastpeft_iwlora_online": "fastpeft_lora",
    "fastpeft_iwlora": "fastpeft_lora",
    "fastpeft_hf_sat_lora": "fastpeft_lora",
    "fastpeft_sat_lora": "fastpeft_lora",
    "fastpeft_unihyperlora": "fastpeft_lora",
    "fastpeft_lora": "fastpeft_lora",
}
"""Row -> the LoRA row in the denominator of its `ratio`."""
SHOWN = [
    "frozen", "peft_lora", "peft_lora_loop_penalty", "peft_adalora", "fastpeft_lora", "fastpeft_iwlora",
    "fastpeft_iwlora_online", "fastpeft_unihyperlora", "fastpeft_sat_lora", "fastpeft_hf_sat_lora",
    "calibration_exact", "calibration_sketch",
]  # fmt: skip
PLAIN = ["fastpeft_lora", "fastpeft_unihyperlora", "fastpeft_sat_lora", "fastpeft_hf_sat_lora"]
"""Rows of the trainer's unchanged step, with the defaults of the method's config section."""
NUM_BATCHES = 3
CLOSE = ["fastpeft_iwlora_online", "fastpeft_iwlora", "fastpeft_lora"]
"""Rows between which one per cent must be resolved: the last CLOSE_SHARE of the seconds is rounds of these alone."""
CLOSE_SHARE = 0.4
WARMUP_PASSES = 2
CALIBRATION_BATCHES = 2
PROGRESS = 0.3
"""Share of the budget at which steps are timed: past warm-up, in the middle of AdaLoRA's pruning."""
ADALORA_STEPS = 100_000


class Frozen(Adapter):
    """No adapter: only the head is trained, and the gradient reaches the layers that `targets` names."""

    def __init__(self, backbone: Backbone, targets: list[str]) -> None:
        self.model = backbone.model
        for name in targets:
            self.model.get_submodule(name).register_forward_hook(_ask_for_gradient)
        head = [p for name in backbone.head for p in self.model.get_submodule(name).parameters()]
        self.flat = FlatParameters([], head)

    @classmethod
    def build(cls, run: RunConfig, backbone: Backbone) -> Self:
        return cls(backbone, match_targets(backbone.model, backbone.head, run.adapter.target_modules))

    def save(self, folder: Path) -> None:
        raise NotImplementedError("a row of a benchmark is not saved")


def _ask_for_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
    """Make the output require a gradient, as the factor B of an adapted layer does."""
    return None if output.requires_grad else output.detach().requires_grad_()


class Rows:
    """Builds each row's step on the same frozen weights."""

    def __init__(self, host: Host, run: RunConfig, batches: list[Batch], device: torch.device) -> None:
        self.host, self.run, self.batches, self.device = host, run, batches, device
        self._open = ExitStack()
        """Calibrations in progress."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def build(self, name: str) -> Step:
        torch.manual_seed(0)
        if name == "frozen":
            return self._trained(Frozen.build(self.run, self.host.copy(fast=True)))
        if name.startswith("peft_"):
            return self._peft(name)
        if name.startswith("calibration_"):
            return self._calibration(name.removeprefix("calibration_"))
        if name in PLAIN:
            return self._trained(self._adapter(name.removeprefix("fastpeft_")))
        adapter = self._adapter("iw_lora", online=name.endswith("online"))
        with adapter.calibrating():
            for index in range(CALIBRATION_BATCHES):
                self._calibrate(adapter, index)
        adapter.finish_calibration()
        return self._trained(adapter)

    def _adapter(self, method: str, **regulariser: Any) -> Adapter:
        run = replace(self.run, method=method, regulariser=replace(self.run.regulariser, **regulariser))
        own = METHODS.own_section(run)
        if METHODS[method].routes:  # in the short test the host is no wider than the atoms
            own = replace(own, max_extra_flops=100.0, max_mb=100.0)
        adapter = method_class(method).build(run.adapter, own, self.host.copy(fast=True))
        adapter.model.train()
        return adapter

    def _trained(self, adapter: Adapter) -> Step:
        schedule = make_schedule(self.run.schedule, self.run.training.learning_rate)
        optimizer = FlatAdamW(adapter.flat, self.run.optimizer, self.host.backbone.dtype)

        def step(index: int) -> None:
            batch = self.batches[index % len(self.batches)]
            train_step(adapter, schedule, optimizer, classification_loss, [batch], len(batch.labels), PROGRESS)

        return step

    def _calibration(self, estimator: str) -> Step:
        adapter = self._adapter("iw_lora", estimator=estimator)
        self._open.enter_context(adapter.calibrating())
        return lambda index: self._calibrate(adapter, index)

    def _calibrate(self, adapter: Adapter, index: int) -> None:
        batch = self.batches[index % len(self.batches)]
        adapter.before_calibration_batch()
        forward_backward(adapter, classification_loss, [batch], len(batch.labels))
        adapter.after_calibration_batch(1.0)

    def _peft(self, name: str) -> Step:
        import peft

        backbone = self.host.copy()
        targets = match_targets(backbone.model, backbone.head, self.run.adapter.target_modules)
        common = {
            "task_type": peft.TaskType.SEQ_CLS,
            "lora_alpha": self.run.adapter.alpha,
            "target_modules": targets,
            "modules_to_save": list(backbone.head),
        }
        adalora = name == "peft_adalora"
        if adalora:
            config = peft.AdaLoraConfig(total_step=ADALORA_STEPS, **common)
        else:
            config = peft.LoraConfig(r=self.run.adapter.rank, **common)
        with quiet_transformers():
            model = peft.get_peft_model(backbone.model, config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.run.training.learning_rate, weight_decay=0.01, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / ADALORA_STEPS)
        penalty = _loop_penalty(model, self.run.regulariser.alpha) if name.endswith("penalty") else None
        steps_taken = int(PROGRESS * ADALORA_STEPS)

        def step(index: int) -> None:
            nonlocal steps_taken
            batch = self.batches[index % len(self.batches)]
            loss = model(**batch.inputs, labels=batch.labels).loss
            (loss if penalty is None else loss + penalty()).backward()
            nn.utils.clip_grad_norm_(trained, self.run.optimizer.max_grad_norm)
            optimizer.step()
            scheduler.step()
            if adalora:
                steps_taken += 1
                model.base_model.update_and_allocate(steps_taken)
            optimizer.zero_grad()

        return step


def _loop_penalty(model: nn.Module, alpha: float) -> Callable[[], torch.Tensor]:
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and "default" in module.lora_A]
    weight = 1 / len(layers)  # the value of w_k does not affect the cost

    def penalty() -> torch.Tensor:
        total = torch.zeros((), device=layers[0].lora_A["default"].weight.device)
        for layer in layers:
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            total = total + alpha * (1 - weight) * delta.pow(2).sum()
        return total

    return penalty


# ---- measuring -----------------------------------------------------------------------------


def run_config(targets: str, rank: int) -> RunConfig:
    return RunConfig(
        run_id="overhead",
        method="lora",
        model=ModelConfig(name="random"),
        adapter=AdapterConfig(rank=rank, target_modules=targets),
        regulariser=RegulariserConfig(),
    )


def build_rows(rows: Rows, names: list[str]) -> tuple[dict[str, Step], dict[str, tuple[int | None, float]]]:
    """Each row's step, and its launches and peak memory on the widest batch."""
    steps, costs, widest = {}, {}, len(rows.batches) - 1
    for name in names:

        def work(name: str = name) -> None:
            steps[name] = rows.build(name)
            for _ in range(WARMUP_PASSES):
                steps[name](widest)

        peak = peak_mb(work, rows.device) + rows.host.frozen_mb
        costs[name] = count_launches(lambda name=name: steps[name](widest), rows.device), peak
    return steps, costs


def measure(args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    device = choose_device(args.device)
    names = names_in(args.rows, list(ROWS))
    dtype = choose_precision(args.precision, device, lambda: (768, 3072)).dtype
    host = Host.build(args.model or ("deberta-v3-base" if device.type == "cuda" else "minilm"), dtype, device)
    batches = random_batches(host, args.batch_size, NUM_BATCHES, device)
    run = run_config(args.targets, args.rank)
    with Rows(host, run, batches, device) as rows:
        steps, costs = build_rows(rows, names)
        for _ in range(WARMUP_PASSES):
            for index in range(NUM_BATCHES):
                for step in steps.values():
                    step(index)
        calls = args.steps or (8 if device.type == "cuda" else 1)
        measured_by = host_timer(device, calls)
        close = close_rows(steps)
        until = timer(args.seconds * (1 - CLOSE_SHARE if close else 1), began)
        times = interleave(steps, NUM_BATCHES, args.repeats, until, measured_by)
        until = timer(args.seconds, began)
        times.rounds += interleave(close, NUM_BATCHES, args.repeats, until, measured_by).rounds
    matrices = match_targets(host.backbone.model, host.backbone.head, run.adapter.target_modules)
    widths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    shape = host.shape() | {
        "batch_size": args.batch_size,
        "widths": widths,
        "num_tokens": [batch.num_tokens for batch in batches],
        "precision": str(dtype).removeprefix("torch."),
        "targets": args.targets,
        "matrices": len(matrices),
        "rank": args.rank,
    }
    return about(device) | {
        "model": host.name,
        "shape": shape,
        "rounds": len(times.rounds),
        "widths_timed": [widths[index] for index in sorted(times.common_inputs)],
        "calls_a_turn": calls,
        "launches_kind": launches_kind(device),
        "rows": [row(name, times, costs[name]) for name in SHOWN if name in names],
    }


def close_rows(steps: dict[str, Step]) -> dict[str, Step]:
    """Rows of CLOSE among `steps`; none if only one of them is there."""
    close = {name: steps[name] for name in CLOSE if name in steps}
    return close if len(close) > 1 else {}


def row(name: str, times: Times, cost: tuple[int | None, float]) -> dict[str, Any]:
    ratio, low, high = times.ratio(name, ROWS[name]) if ROWS[name] in times else (None, None, None)
    over_frozen = times.ratio(name, "frozen")[0] if "frozen" in times else None
    return {
        "name": name,
        "step_ms": round(times.median_s(name) * 1e3, 4),
        "spread_ms": round(times.spread_s(name) * 1e3, 4),
        "ratio": _rounded(ratio),
        "ratio_to": ROWS[name],
        "ratio_low": _rounded(low),
        "ratio_high": _rounded(high),
        "over_frozen": _rounded(over_frozen),
        "launches": cost[0],
        "peak_mb": round(cost[1], 1),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def show(report: dict[str, Any]) -> None:
    shape = report["shape"]
    title = (
        f"{report['model']} ({shape['matrices']} matrices, rank {shape['rank']}, {shape['precision']}) on "
        f"{report['device']}: batches of {shape['batch_size']} x {shape['widths']}, {report['rounds']} rounds"
    )
    columns = [
        "",
        "ms a step",
        "spread",
        "ratio",
        "95 % interval",
        "to",
        "over frozen",
        report["launches_kind"],
        "peak MB",
    ]
    lines = []
    for r in report["rows"]:
        interval = None if r["ratio_low"] is None else f"{r['ratio_low']:.4f} to {r['ratio_high']:.4f}"
        ratio, over = (None if r[key] is None else f"{r[key]:.4f}" for key in ("ratio", "over_frozen"))
        times = f"{r['step_ms']:.2f}", f"{r['spread_ms']:.2f}"
        peak = f"{r['peak_mb']:.0f}"
        lines.append([r["name"], *times, ratio, interval, r["ratio_to"], over, r["launches"], peak])
    print_table(title, columns, lines)
    timed, widths = report["widths_timed"], shape["widths"]
    if timed != widths:
        print(
            f"too short a run: its times are of batches {timed} wide, and not of all of {widths}; the ratios are of "
            "what each pair has met. Give more --seconds, or fewer --rows"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="deberta-v3-base, minilm, or a folder with a config.json")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=json_path)
    parser.add_argument("--seconds", type=float, default=150.0, help="the whole of it; rounds end there")
    parser.add_argument("--repeats", type=positive, default=400, help="most rounds")
    parser.add_argument("--steps", type=positive, help="steps a turn; 8 on a GPU, 1 on a CPU")
    parser.add_argument("--rows", help="only these, comma-separated")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    args = parser.parse_args()
    try:
        report = measure(args)
    except UserError as error:
        raise SystemExit(str(error)) from None
    show(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
