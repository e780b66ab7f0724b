"""Roofline of a training step: its work by parts, a machine's ceilings, and the least time that follows.

    python bench/roofline.py check [--threads 1] [--rounds 5] [--json OUT]
    python bench/roofline.py forecast [--json OUT]

`check` measures this CPU's ceilings, counts the operations of the trainer's own step on three shapes, and prints the
sum of their least times and the measured step time, in turns with the ceilings. Exit code 1 if they differ by more than
a fifth. `forecast` counts the step of DeBERTa-v3-base and of Qwen3-0.6B, at an A100's and an H200's published ceilings
in bf16. No GPU has confirmed it. Deep models are counted at two and at four layers, and extrapolated linearly.

The parts of a step and their ceilings:

products      matrix products, by 2 m n k. Those with a side of 16 or less, of 17 to 64, of 65 to 192, batches of small
              ones, and attention each have a ceiling of their own
functions     exp, erf, tanh and functions built on them, per element: on a CPU they cost more than their traffic.
              Softmax and the backward passes have a ceiling of their own
traffic       everything else: bytes read and written, once. Copies that change the order of elements, and layer norms,
              each have a ceiling of their own
calls         fixed cost of a call on a CPU, including autograd and Python. A GPU's launches are assumed hidden, as a
              CUDA graph hides them

A CPU's ceilings are measured on arrays that stream through memory, as a step's activations do.

On a GPU fastpeft's kernels compute in one pass several of the counted operations, so that its `traffic` is an upper
bound, not a lower one; `products alone` is the lower bound.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional

from bench.interleave import positive
from bench.report import about, json_path, print_table, write_json
from bench.step_work import ATEN, GPUS, Ceilings, Step, Work, count
from bench.throughput_presets import QWEN3_384, QWEN3_600M

WITHIN = 0.2
COLD_BYTES = 64 * 2**20
"""Size of the arrays that a ceiling is measured on: larger than a core's own caches."""


# ---- this CPU ------------------------------------------------------------------------------


def measure_ceilings(repeats: int = 5) -> Ceilings:
    """Ceilings from the least times of one operation per part, on arrays larger than a core's cache, and of a call."""
    weight, square = torch.randn(768, 768), torch.randn(128, 128)

    def least(work: Callable[[torch.Tensor], object], *shape: int) -> float:
        arrays = [torch.randn(shape) for _ in range(max(2, COLD_BYTES // (4 * math.prod(shape))))]
        return _least(lambda: [work(x) for x in arrays], repeats) / len(arrays)

    rows, heads = (1024, 768), (16, 12, 64, 32)
    values = math.prod(rows)
    gradient = torch.randn(rows)
    return Ceilings(
        2 * values * 768 / least(lambda x: x @ weight, *rows),
        _pair_flops(8) / least(_pair(8), *rows),
        _pair_flops(32) / least(_pair(32), *rows),
        2 * 1024 * 128 * 128 / least(lambda x: x @ square, 1024, 128),
        2 * 16 * 12 * 64 * 64 * 32 / least(lambda x: x @ x.mT, 16 * 12, 64, 32),
        4 * 16 * 12 * 64 * 64 * 32 / least(lambda x: functional.scaled_dot_product_attention(x, x, x), *heads),
        values / least(functional.gelu, *rows),
        values / least(lambda x: ATEN.gelu_backward(gradient, x), *rows),
        2 * 4 * values / least(lambda x: x + 1.0, *rows),
        2 * 4 * values / least(lambda x: x.view(32, 32, 24, 32).transpose(1, 2).contiguous(), *rows),
        2 * 4 * values / least(lambda x: functional.layer_norm(x, (768,)), *rows),
        _least(_tiny_calls, repeats) / count(_tiny_calls).calls,
    )  # fmt: skip


def _pair(rank: int) -> Callable[[torch.Tensor], object]:
    """Products of a pair of LoRA factors, forward and for the gradients. x also serves as output and its gradient."""
    a, b = torch.randn(rank, 768), torch.randn(768, rank)

    def work(x: torch.Tensor) -> None:
        u = x @ a.T
        x.addmm_(u, b.T, alpha=1e-3)  # 0 would leave the product out
        _ = x.T @ u, u.T @ x

    return work


def _pair_flops(rank: int) -> int:
    return 4 * 2 * 1024 * 768 * rank


def _tiny_calls() -> None:
    """Forward and backward pass through a chain of operations on eight numbers, whose time is that of the calls."""
    start = torch.zeros(8, requires_grad=True)
    x = start
    for _ in range(200):
        x = torch.sigmoid(x * start)
    x.sum().backward()


def _least(work: Step, repeats: int) -> float:
    work()
    return min(_timed(work) for _ in range(repeats))


def _timed(work: Step) -> float:
    """Seconds of `work`: CPU time with one thread, since other processes disturb it less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def cpu_steps() -> dict[str, Step]:
    """The trainer's own step: a small encoder, one of MiniLM's shape, and a language model."""
    from bench.models import Host, random_batches
    from bench.overhead import Rows, run_config
    from fastpeft.standins import PATHS

    steps = {}
    for name, model in (("MiniLM, b 32", "minilm"), ("deberta-tiny, b 32", str(PATHS["deberta_tiny"]))):
        cpu = torch.device("cpu")
        host = Host.build(model, torch.float32, cpu)
        batches = random_batches(host, 32, 3, cpu)
        own = Rows(host, run_config("all-linear", 8), batches, cpu).build("fastpeft_lora")
        steps[name] = lambda own=own: own(1)
    steps["Qwen3 384 x 6, b 8"] = language_step(QWEN3_384, torch.float32, rows=8, width=190, rank=64)
    return steps


def language_step(shape: Mapping[str, Any], dtype: torch.dtype, rows: int, width: int, rank: int) -> Step:
    """Forward and backward pass of a language model of `shape`, LoRA on all linears, two thirds of tokens labelled."""
    import transformers

    from fastpeft.adapters.lora import Lora
    from fastpeft.config.methods import AdapterConfig
    from fastpeft.data.batches import IGNORE, Batch
    from fastpeft.models.backbone import Backbone, quiet_transformers
    from fastpeft.models.fast import speed_up
    from fastpeft.tasks.causal_lm.loss import AnswerLoss

    config = transformers.AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    speed_up(model)
    entries = [model, model.get_decoder()]
    backbone = Backbone(model, None, [], False, None, dtype, "CAUSAL_LM", entries, head_is_frozen=True)
    adapter = Lora(AdapterConfig(rank=rank, target_modules="all-linear"), None, backbone)
    adapter.model.train()
    loss = AnswerLoss(torch.device("cpu"), dtype, frozen_head=True)
    ids = torch.randint(config.vocab_size, (rows, width))
    prompt = width // 3
    labels = ids.clone()
    labels[:, :prompt] = IGNORE
    labelled = (torch.arange(rows)[:, None] * width + torch.arange(prompt - 1, width - 1)).flatten()
    batch = Batch({"input_ids": ids}, labels, rows * width, labelled)
    return lambda: loss.batch(adapter.model, batch, len(labelled), set()).loss.backward()


def check(threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    steps = cpu_steps()
    works = {}
    for name, step in steps.items():
        step()
        works[name] = count(step)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    parts: dict[str, dict[str, float]] = {}
    ceilings = measure_ceilings()
    for _ in range(rounds):
        ceilings = measure_ceilings()
        for name, step in steps.items():
            parts[name] = ceilings.parts(works[name])
            found[name].append((sum(parts[name].values()), _least(step, 3)))
    rows = [
        {
            "name": name,
            "predicted_s": statistics.median(predicted for predicted, _ in pairs),
            "measured_s": statistics.median(measured for _, measured in pairs),
            "ratio": statistics.median(predicted / measured for predicted, measured in pairs),
            "parts_s": parts[name],
            "work": asdict(works[name]),
        }
        for name, pairs in found.items()
    ]
    return about(torch.device("cpu")) | {"ceilings": asdict(ceilings), "rows": rows}


# ---- forecast ------------------------------------------------------------------------------


def deberta_work(layers: int) -> Work:
    from bench.models import SHAPES, Host, random_batches
    from bench.overhead import Rows, run_config

    cpu = torch.device("cpu")
    SHAPES["counted"] = {**SHAPES["deberta-v3-base"], "num_hidden_layers": layers}
    host = Host.build("counted", torch.bfloat16, cpu)
    step = Rows(host, run_config("all-linear", 8), random_batches(host, 32, 3, cpu), cpu).build("fastpeft_lora")
    return count(lambda: step(1))


def qwen3_work(layers: int) -> Work:
    shape = {**QWEN3_600M, "num_hidden_layers": layers}
    return count(language_step(shape, torch.bfloat16, rows=4, width=175, rank=64))


SHALLOW, DEEP = 2, 4


def forecast() -> dict[str, Any]:
    rows = []
    models = {"DeBERTa-v3-base, b 32": (deberta_work, 12, 1), "Qwen3-0.6B, b 64 x 175": (qwen3_work, 28, 16)}
    for name, (work_of, layers, batches) in models.items():
        shallow, deep = work_of(SHALLOW), work_of(DEEP)
        work = shallow.continued(deep, (layers - SHALLOW) / (DEEP - SHALLOW))
        work = Work(*(batches * getattr(work, one.name) for one in fields(work)))
        for gpu, ceilings in GPUS.items():
            parts = ceilings.parts(work)
            rows.append(
                {"name": name, "gpu": gpu, "parts_s": parts, "least_s": parts["products"], "work": asdict(work)}
            )
    return {"rows": rows}


# ---- the command ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "forecast"))
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args(argv)
    report = check(options.threads, options.rounds) if options.what == "check" else forecast()
    names = list(report["rows"][0]["parts_s"])
    lines = []
    for row in report["rows"]:
        parts = [f"{1e3 * row['parts_s'][name]:.2f}" for name in names]
        if options.what == "check":
            lines.append(
                [row["name"], *parts, f"{1e3 * row['predicted_s']:.1f}", f"{1e3 * row['measured_s']:.1f}",
                 f"{row['ratio']:.2f}"]
            )  # fmt: skip
        else:
            total = sum(row["parts_s"].values())
            lines.append([f"{row['name']}, {row['gpu']}", *parts, f"{1e3 * total:.2f}", f"{1e3 * row['least_s']:.2f}"])
    last = ["predicted", "measured", "ratio"] if options.what == "check" else ["sum", "products alone"]
    print_table("milliseconds a step", ["", *names, *last], lines)
    if options.json:
        write_json(options.json, report)
    if options.what == "check":
        raise SystemExit(any(abs(row["ratio"] - 1) > WITHIN for row in report["rows"]))


if __name__ == "__main__":
    main()
