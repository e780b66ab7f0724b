"""What a training step has to do, part by part, beside what a machine can do: how long a step takes at least.

    python bench/roofline.py check [--threads 1] [--rounds 5] [--json OUT]
    python bench/roofline.py forecast [--json OUT]

`check` measures this CPU's ceilings, counts the operations of the trainer's own step on three shapes, and prints the
sum of their least times beside the step as it is timed, in turns with the ceilings: within a fifth, or exit code 1.
`forecast` counts the step of DeBERTa-v3-base and of Qwen3-0.6B and holds it against an A100's and an H200's published
ceilings in bf16. No GPU has confirmed it. Deep models are counted at two and at four layers, and continued in a line.

An operation takes the longer of its arithmetic and its traffic:

products      matrix products, by 2 m n k; those with a side of 64 or less, those with one of 65 to 192, batches of
              small ones and attention have each a pace of their own
functions     exp, erf, tanh and what is made of them, by the element: on a CPU they cost more than their traffic
traffic       everything else: what it reads and writes, once; copies that change the order of elements have a pace
calls         what a call costs by itself, on a CPU, autograd and Python's part in it; a GPU's launches are taken to be
              hidden, as a CUDA graph hides them

On a GPU kernels of ours do in one pass what is counted as several, so that its `traffic` is the most, not the least;
`products alone` is the floor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from bench.interleave import positive
from bench.report import about, json_path, print_table, write_json
from bench.throughput_presets import QWEN3_384, QWEN3_600M

ATEN = torch.ops.aten
ATTENTION = "_scaled_dot_product"
FUNCTIONS = ("gelu", "silu", "exp", "tanh", "erf", "softmax", "log", "sigmoid", "rsqrt")
"""In the name of an operation."""
WITHIN = 0.2
THIN, NARROW = 64, 192
Step = Callable[[], object]


@dataclass
class Work:
    """Of a step."""

    product_flops: float = 0.0
    thin_flops: float = 0.0
    """Of products with a side of THIN or less, such as LoRA's, which no machine does at full pace."""
    narrow_flops: float = 0.0
    """Of those with a side of NARROW or less."""
    batched_flops: float = 0.0
    """Of batches of small ones, as attention has them."""
    attention_flops: float = 0.0
    function_elements: float = 0.0
    bytes: float = 0.0
    """Of all but the products, attention and copies."""
    copied_bytes: float = 0.0
    product_bytes: float = 0.0
    calls: float = 0.0

    def continued(self, deeper: Work, at: float) -> Work:
        """The straight line through this, at 0, and `deeper`, at 1."""
        pairs = ((getattr(self, one.name), getattr(deeper, one.name)) for one in fields(self))
        return Work(*(own + at * (other - own) for own, other in pairs))


@dataclass(frozen=True)
class Ceilings:
    product_flops_s: float
    thin_flops_s: float
    narrow_flops_s: float
    batched_flops_s: float
    attention_flops_s: float
    function_elements_s: float
    bytes_s: float
    copied_bytes_s: float
    call_s: float = 0.0

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds."""
        return {
            "products": max(
                work.product_flops / self.product_flops_s
                + work.thin_flops / self.thin_flops_s
                + work.narrow_flops / self.narrow_flops_s
                + work.batched_flops / self.batched_flops_s,
                work.product_bytes / self.bytes_s,
            ),
            "attention": work.attention_flops / self.attention_flops_s,
            "functions": work.function_elements / self.function_elements_s,
            "traffic": work.bytes / self.bytes_s + work.copied_bytes / self.copied_bytes_s,
            "calls": work.calls * self.call_s,
        }


GPUS = {
    name: Ceilings(flops_s, flops_s, flops_s, flops_s, flops_s, float("inf"), bytes_s, bytes_s)
    for name, flops_s, bytes_s in (("A100", 312e12, 2.04e12), ("H200", 989e12, 4.8e12))
}
"""Dense bf16 and memory, as NVIDIA's data sheets of the SXM cards have them."""


class Counter(TorchDispatchMode):
    """Adds up the work of what runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.work.calls += 1
        if not func.is_view:
            self._add(func, args, kwargs or {}, out)
        return out

    def _add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        work, name, packet = self.work, str(func), func.overloadpacket
        tensors = {id(x): x for x in tree_iter((args, kwargs, out)) if isinstance(x, torch.Tensor)}.values()
        moved = sum(x.numel() * x.element_size() for x in tensors)
        if ATTENTION in name:
            work.attention_flops += _attention_flops(args, backward="backward" in name)
        elif packet == ATEN.addmm_ or packet in flop_registry:
            flops = (
                2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
                if packet == ATEN.addmm_
                else flop_registry[packet](*args, **kwargs, out_val=out)
            )
            side = min(min(x.shape[-2:]) for x in tensors if x.ndim > 1)
            if packet == ATEN.bmm:
                work.batched_flops += flops
            elif side <= THIN:
                work.thin_flops += flops
            elif side <= NARROW:
                work.narrow_flops += flops
            else:
                work.product_flops += flops
            work.product_bytes += moved
        elif any(part in name for part in FUNCTIONS):
            work.function_elements += max(x.numel() for x in tensors)
        elif name.startswith(("aten.copy_", "aten.clone")):
            work.copied_bytes += moved
        elif not name.startswith(("aten.empty", "aten.detach", "aten.new_empty")):
            work.bytes += moved


def _attention_flops(args: Any, backward: bool) -> float:
    query, key = args[1:3] if backward else args[:2]
    rows, heads, length, width = query.shape
    return (10 if backward else 4) * rows * heads * length * key.shape[2] * width


def count(step: Step) -> Work:
    with Counter() as counter:
        step()
    return counter.work


# ---- this CPU ------------------------------------------------------------------------------


def measure_ceilings(repeats: int = 5) -> Ceilings:
    """Least times of products of four forms, attention, GELU, a sum of arrays that a cache holds, heads put apart, and
    of a call."""
    x, weight, thin = torch.randn(1024, 768), torch.randn(768, 768), torch.randn(768, 32)
    narrow, square = torch.randn(1024, 128), torch.randn(128, 128)
    query = torch.randn(16, 12, 64, 32)
    values, other, out = torch.randn(1 << 20), torch.randn(1 << 20), torch.empty(1 << 20)
    heads = values.view(32, 64, 16, 32).transpose(1, 2)
    batch = query.flatten(0, 1)

    def least(work: Step) -> float:
        return _least(work, repeats)

    return Ceilings(
        2 * 1024 * 768 * 768 / least(lambda: x @ weight),
        2 * 1024 * 768 * 32 / least(lambda: x @ thin),
        2 * 1024 * 128 * 128 / least(lambda: narrow @ square),
        2 * 16 * 12 * 64 * 64 * 32 / least(lambda: batch @ batch.mT),
        4 * 16 * 12 * 64 * 64 * 32 / least(lambda: functional.scaled_dot_product_attention(query, query, query)),
        len(values) / least(lambda: functional.gelu(values)),
        3 * values.nbytes / least(lambda: torch.add(values, other, out=out)),
        2 * values.nbytes / least(heads.contiguous),
        least(_tiny_calls) / count(_tiny_calls).calls,
    )


def _tiny_calls() -> None:
    """Forward and backward pass through a chain of operations on eight numbers: calls and nothing else."""
    start = torch.zeros(8, requires_grad=True)
    x = start
    for _ in range(200):
        x = torch.sigmoid(x * start)
    x.sum().backward()


def _least(work: Step, repeats: int) -> float:
    work()
    return min(_timed(work) for _ in range(repeats))


def _timed(work: Step) -> float:
    """By the processor's time where one thread works: other processes take less from that."""
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
    """Forward and backward pass of a language model of `shape` with LoRA on all its linears, two thirds labelled."""
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
