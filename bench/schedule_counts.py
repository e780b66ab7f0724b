"""Counted cost of a schedule's measurements in a training step of Qwen3-0.6B's shape: no GPU, no weights.

    python bench/schedule_counts.py [--rows 64 --width 256 --prompt 96] [--json OUT]

The trainer's own code runs on the meta device: model, loss, backward pass, probes. torch counts the FLOPs of its matrix
products; the secants' bytes are those of the buffers that their kernel reads and writes, all from memory, as for
buffers larger than the L2 cache. `share` is a part's time at an H200's ceilings (989 TFLOP/s in bf16, 4.8 TB/s), the
larger of arithmetic and traffic, over that of a step with a constant learning rate: a ratio of two best cases, not a
measurement. The sums over blocks are computed by the optimizer's kernel from registers and add no traffic. `host` is
the schedule's own time on this machine, measured; on a GPU it overlaps with the device's work.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.interleave import positive
from bench.report import json_path, write_json
from fastpeft.adapters.lora import Lora
from fastpeft.config import RunConfig, load_run
from fastpeft.data.batches import IGNORE, Batch
from fastpeft.models.backbone import Backbone
from fastpeft.schedules import make_schedule
from fastpeft.signals import Blocks, BlockSums, Measured, Need, Secants
from fastpeft.tasks.causal_lm.loss import AnswerLoss
from fastpeft.trainer.optim import adam_moments
from fastpeft.trainer.probes.answer_gradient import AnswerGradient
from fastpeft.trainer.probes.hooks import SAMPLE_EVERY

QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12
META = torch.device("meta")
HOST_STEPS = 200
PACKED = "transformers.masking_utils.find_packed_sequence_indices"
"""transformers' function that reads position values, which the meta device does not have."""


def _addmm_flops(out: torch.Size, a: torch.Size, b: torch.Size, **more: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: _addmm_flops}
"""Operations that torch's counter does not know."""


class Shape:
    """LoRA of a preset on a causal LM of these sizes, and one batch, all on the meta device."""

    def __init__(self, run: RunConfig, sizes: dict[str, Any], rows: int, width: int, prompt: int) -> None:
        import transformers

        with META:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)).to(torch.bfloat16)
            model.requires_grad_(False)
            entries = [model, model.get_decoder()]
            backbone = Backbone(model, None, [], False, None, torch.bfloat16, "CAUSAL_LM", entries, head_is_frozen=True)
            self.adapter = Lora(run.adapter, None, backbone)
        self._loss = AnswerLoss(META, torch.bfloat16, frozen_head=True)
        self._size = rows, width, prompt

    def flops(self, needs: set[Need]) -> int:
        """FLOPs of the matrix products of a forward and a backward pass that measure `needs`."""
        rows, width, prompt = self._size
        with META, mock.patch(PACKED, return_value=None):
            labels = torch.full((rows, width), IGNORE)
            labelled = (torch.arange(rows)[:, None] * width + torch.arange(prompt - 1, width - 1)).flatten()
            batch = Batch({"input_ids": torch.zeros_like(labels)}, labels, rows * width, labelled)
            answers = AnswerGradient(self.adapter)
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                answers.start()
                if Need.ANSWER_GRADIENT in needs:
                    answers.before_pass(batch)
                self._loss.batch(self.adapter.model, batch, len(labelled), needs).loss.backward()
                answers.after_pass()
        return counter.get_total_flops()

    def secant_bytes(self) -> int:
        """Bytes of secant_sums: five flat buffers are read, two of them written."""
        return 7 * self.adapter.flat.data.nbytes


def host_s(name: str, run: RunConfig, blocks: Blocks) -> float:
    """Mean seconds of one call of `rates`, including periodic work, with all measurements that the schedule needs."""
    schedule = make_schedule(
        run.schedule, run.training.learning_rate, blocks, adam=adam_moments(run.optimizer), seed=run.training.seed
    )
    generator, taken = np.random.default_rng(0), []
    num_units, num_blocks = len(blocks.num_elements), len(blocks)
    schedule.rates(None, 0.0)
    for step in range(1, HOST_STEPS + 1):
        draw = generator.random((7, num_units)) + 0.1
        measured = Measured(
            step=step, progress=(step - 1) / (2 * HOST_STEPS), elapsed_s=0.1 * step, lr=1e-4, num_tokens=1000,
            loss=2 / step**0.3, grad_norm=1.0, blocks=BlockSums(*draw[:4]), secant=Secants(draw[4], draw[5]),
            answer_grad_sq_K=draw[6][:num_blocks], answer_fisher=0.5, prompt_fisher=0.6, entropy=1.0, lens_entropy=2.0,
        )  # fmt: skip
        start = time.perf_counter()
        schedule.rates(measured, step / (2 * HOST_STEPS))
        taken.append(time.perf_counter() - start)
    return sum(taken) / len(taken)


def count(sizes: dict[str, Any], rows: int, width: int, prompt: int) -> dict[str, Any]:
    """FLOPs and bytes per step of each part, and its share of the constant schedule's step at the ceilings."""
    runs = {name: load_run(f"{name}_gsm8k", []) for name in ("fot", "graff")}
    shape = Shape(runs["fot"], sizes, rows, width, prompt)
    base = shape.flops(set())

    def part(needs: set[Need], every: int = 1) -> dict[str, float]:
        return {"flops": (shape.flops(needs) - base) / every, "bytes": 0.0}

    parts: dict[str, dict[str, dict[str, float]]] = {
        "fot": {
            "Fisher of the labelled tokens": part({Need.TOKENS}),
            f"Fisher of prompt tokens, every {SAMPLE_EVERY} steps": part({Need.PROMPT}, SAMPLE_EVERY),
            f"gradient of labelled tokens, every {SAMPLE_EVERY}": part({Need.ANSWER_GRADIENT}, SAMPLE_EVERY),
        },
        "graff": {
            "entropy behind the first layer": part({Need.LENS}),
            "secants": {"flops": 0.0, "bytes": float(shape.secant_bytes())},
        },
    }
    base_s = base / PEAK_FLOPS
    for each in (p for of in parts.values() for p in of.values()):
        each["share"] = max(each["flops"] / PEAK_FLOPS, each["bytes"] / PEAK_BYTES) / base_s
    blocks = shape.adapter.flat.blocks
    return {
        "shape": {"rows": rows, "width": width, "prompt": prompt, "blocks": len(blocks)},
        "step": {"flops": base, "ms_at_ceiling": 1e3 * base_s},
        "parts": parts,
        "share": {name: sum(p["share"] for p in of.values()) for name, of in parts.items()},
        "host_ms": {name: 1e3 * host_s(name, run, blocks) for name, run in runs.items()},
    }


def show(found: dict[str, Any], say: Callable[[str], None] = print) -> None:
    shape, step = found["shape"], found["step"]
    say(
        f"a step of {shape['rows']} x {shape['width']} tokens, {shape['blocks']} adapted matrices: "
        f"{step['flops'] / 1e12:.1f} TFLOP, {step['ms_at_ceiling']:.1f} ms at the ceiling"
    )
    for name, parts in found["parts"].items():
        for label, part in parts.items():
            size = f"{part['flops'] / 1e9:8.1f} GFLOP  {part['bytes'] / 1e9:6.2f} GB"
            say(f"{name:6} {label:42} {size}  {100 * part['share']:.3f} %")
        say(f"{name:6} {'together':42} {100 * found['share'][name]:36.3f} %   host {found['host_ms'][name]:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=64)
    parser.add_argument("--width", type=positive, default=256, help="tokens of a row, padding included")
    parser.add_argument("--prompt", type=positive, default=96, help="of them the prompt's")
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args()
    if args.prompt >= args.width:
        parser.error("--prompt is to leave tokens of --width to the answer")
    found = count(QWEN3, args.rows, args.width, args.prompt)
    show(found)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
