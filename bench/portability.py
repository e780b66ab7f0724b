"""Transfer of a UniHyperLoRA adapter to hosts that it was not trained on.

    python bench/portability.py --host MODEL [--source-data DIR --target-data DIR] [--steps 500] [--seeds 0,1,2]

For each seed and projector a source adapter is trained on MODEL, and moved to MODEL cut to half of its layers and to
MODEL cut to two thirds of its width. Rows, on each target: zero-shot (frozen adapter, ridge head) and after --steps
steps on delta, against no adapter, an adapter of the same size with fresh atoms, and SAT-LoRA, HF-SAT-LoRA, LoRA r 8
and full fine-tuning trained on the target for as many steps. Scores are means over seeds with 95 % t-intervals. MODEL
is a folder of a BERT-shaped encoder, or of a causal language model (`--run unihyperlora_gsm8k`), of which only the
depth is cut, to --depth of its layers, and which keeps its own head. Without MODEL the three small encoders that ship
are used, of different widths and depths, each pretrained separately. `loss` is of the validation rows.

`--count` trains nothing and prints the cost of the update on hosts of BERT's kind, counted on the meta device: FLOPs
per token, and the update's arithmetic and traffic against the host's arithmetic at an H200's ceilings (bf16, nothing
fused with the linear layers).

Writes bench/results/portability-TIME.json; hosts and runs are in a temporary folder, or --work DIR, where finished runs
are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from scipy.stats import t as student

from bench.cut_hosts import cut_depth, cut_width, is_decoder
from bench.interleave import names_in, rates_in
from fastpeft.adapters.unihyperlora import file_format
from fastpeft.adapters.unihyperlora.cost import extra_flops, host_flops
from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Shape
from fastpeft.adapters.unihyperlora.sites import find_sites
from fastpeft.config import RunConfig, apply_stand_in, load_run, with_values
from fastpeft.runs.store import Result, RunFolder
from fastpeft.standins import embedded_path
from fastpeft.trainer import train
from fastpeft.trainer.build import build_job
from fastpeft.trainer.transferring import final_loss, zero_shot

PROJECTORS = ("coordinate", "spectral", "probe")
STAND_INS = ("embedded/deberta-small", "embedded/deberta-deep")
BASELINES: dict[str, dict[str, Any]] = {
    "head alone": {"method": "unihyperlora", "unihyperlora.train": "none"},
    "SAT-LoRA": {"method": "sat_lora", "training.learning_rate": 3e-4},
    "HF-SAT-LoRA": {"method": "hf_sat_lora", "training.learning_rate": 3e-4},
    "LoRA r 8": {"method": "lora", "adapter.rank": 8, "adapter.alpha": 16.0, "training.learning_rate": 5e-4},
    "full": {"method": "full", "training.learning_rate": 2e-5},
}
FIGURES = ("zero-shot", "after", "zero-shot loss", "loss after")
Scores = dict[tuple[str, str, str], list[float]]
"""(target, row, figure) -> one value per seed."""


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.scores: Scores = defaultdict(list)
        self.facts: dict[tuple[str, str], dict[str, float]] = {}
        host = Path(options.host) if options.host else embedded_path("embedded/deberta-tiny")
        assert host is not None
        self.host = host
        self.began = time.strftime("%Y%m%d-%H%M%S")

    def targets(self) -> dict[str, Path]:
        own = {"the source itself": self.host}
        if not self.options.host:
            return own | {name: path for name in STAND_INS if (path := embedded_path(name)) is not None}
        share = self.options.depth
        name = "half the depth" if share == 0.5 else f"{share:.0%} of the depth"
        own |= {name: cut_depth(self.host, self.work / "shallow", share)}
        if is_decoder(self.host):
            return own
        return own | {"two thirds of the width": cut_width(self.host, self.work / "narrow", 2 / 3)}

    def run(self, host: Path, data: str | None, seed: int, **values: Any) -> RunConfig:
        own = {
            "model.name": str(host),
            "training.seed": seed,
            "training.threads": self.options.threads,
            "budget": f"{self.options.steps}steps",
            "evaluation.every": "end",
            "wandb.mode": "disabled",
            "adapter.target_modules": "all-linear",
            "schedule.warmup_steps": self.options.steps // 10,
            "training.fit_head": not is_decoder(host),  # so that training starts from the zero-shot scores
            "unihyperlora.max_extra_flops": 1.0,  # the share is measured here, not limited
            "sat_lora.max_extra_flops": 1.0,
        }
        own |= {"dataset.path": data, "dataset.name": Path(data).name} if data else {}
        base = load_run(self.options.run)
        return with_values(base if self.options.host else apply_stand_in(base), own | values)

    def trained(self, run: RunConfig, name: str) -> Result:
        folder = RunFolder(self.work / name)
        done = folder.read_result() if folder.path.is_dir() else None
        if done is not None and done.status == "done":
            return done
        print(f"  {name}", flush=True)
        return train(run, results_dir=self.work, name=name)

    def note(self, target: str, row: str, figure: str, value: float | None) -> None:
        if value is not None:
            self.scores[target, row, figure].append(value)

    def one_seed(self, seed: int) -> None:
        options, targets = self.options, self.targets()
        for projector in options.projectors:
            values = {"unihyperlora.projector": projector, "budget": f"{options.source_steps}steps"}
            source = self.run(self.host, options.source_data, seed, **values)
            self.trained(source, f"source-{projector}-{seed}")
            file = self.work / f"source-{projector}-{seed}" / "adapter" / file_format.FILE
            for target, host in targets.items():
                self.moved(target, host, projector, file, seed)
        for target, host in targets.items():
            for row in options.baselines:
                if row == "head alone" and is_decoder(host):
                    continue  # it keeps the model's own head
                own_rate = {"training.learning_rate": options.rates[row]} if row in options.rates else {}
                values = BASELINES[row] | own_rate
                result = self.trained(
                    with_values(self.run(host, options.target_data, seed), values), f"{slug(target)}-{slug(row)}-{seed}"
                )
                self.after(target, row, result)

    def moved(self, target: str, host: Path, projector: str, file: Path, seed: int) -> None:
        run = self.run(host, self.options.target_data, seed)
        row = f"UniHyperLoRA, {projector}"
        moved = with_values(run, {"unihyperlora.adapter": str(file), "unihyperlora.train": "delta"})
        (without, adapted), *_ = zero_shot(build_job(moved))
        for name, found in (("no adapter", without), (row, adapted)):
            self.note(target, name, "zero-shot", found.score)
            self.note(target, name, "zero-shot loss", found.loss)
        fresh = redrawn(file, self.work / "fresh.safetensors", seed)
        (_, control), *_ = zero_shot(build_job(with_values(moved, {"unihyperlora.adapter": str(fresh)})))
        self.note(target, f"fresh atoms, {projector}", "zero-shot", control.score)
        self.note(target, f"fresh atoms, {projector}", "zero-shot loss", control.loss)
        self.after(target, row, self.trained(moved, f"{slug(target)}-{projector}-{seed}"))

    def write(self, topic: str) -> Path:
        options = self.options
        out = options.out or Path("bench/results") / f"{topic}-{self.began}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"target": t, "row": r, "figure": f, "values": v} for (t, r, f), v in self.scores.items()]
        facts = [{"target": t, "row": r, **found} for (t, r), found in self.facts.items()]
        named = {"host", "run", "source_data", "target_data"}  # folders of one machine are no results
        settings = {
            key: Path(str(value)).name if key in named else str(value)
            for key, value in vars(options).items()
            if key not in ("work", "out")
        }
        out.write_text(json.dumps({"settings": settings, "scores": rows, "facts": facts}, indent=1) + "\n")
        return out

    def after(self, target: str, row: str, result: Result) -> None:
        self.note(target, row, "after", result.metric.get("value"))
        self.note(target, row, "loss after", final_loss(RunFolder(self.work / result.name)))
        facts = {"MB": result.adapter_mb, "seconds a step": seconds_a_step(self.work / result.name)}
        known = {key: value for key, value in (facts | result.adapter_facts).items() if value is not None}
        self.facts[target, row] = known


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.lower())


def redrawn(file: Path, out: Path, seed: int) -> Path:
    """The same adapter with newly drawn atoms, as before training: an untrained update of the same size."""
    stored = file_format.decode(file)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1000)
        dictionary, fresh = Dictionary(stored.shape), Dictionary(stored.shape)
    file_format.restore(dictionary, stored)
    for own, other in zip(dictionary.atoms.parameters(), fresh.atoms.parameters()):
        own.data.copy_(other.data)
    out.write_bytes(file_format.encode(dictionary, stored.host, stored.codes))
    return out


def seconds_a_step(folder: Path) -> float | None:
    """Median seconds per step, from the event log."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    at = [event["elapsed_s"] for event in events if event["type"] == "step"]
    return statistics.median(b - a for a, b in pairwise(at)) if len(at) > 2 else None


def interval(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} +- {half:.3f}"


def table(bench: Bench) -> str:
    lines = []
    for target in dict.fromkeys(target for target, _, _ in bench.scores):
        heads = "".join(f"{figure:>18}" for figure in FIGURES)
        lines += ["", target, f"{'':28}{heads}{'MB':>8}{'FLOP %':>8}{'atoms':>7}{'s/step':>8}"]
        for row in dict.fromkeys(row for at, row, _ in bench.scores if at == target):
            shown = [
                interval(found) if (found := bench.scores.get((target, row, figure))) else "-" for figure in FIGURES
            ]
            facts = bench.facts.get((target, row), {})
            wanted = {"MB": (1, 3), "extra_flops": (100, 1), "active_atoms": (1, 2), "seconds a step": (1, 3)}
            mb, flops, atoms, seconds = (
                f"{facts[key] * factor:.{digits}f}" if key in facts else "-" for key, (factor, digits) in wanted.items()
            )
            cells = "".join(f"{cell:>18}" for cell in shown)
            lines.append(f"{row:28}{cells}{mb:>8}{flops:>8}{atoms:>7}{seconds:>8}")
    return "\n".join(lines)


SHAPES = {"TinyBERT": (312, 4, 1200), "MiniLM-L6": (384, 6, 1536), "BERT-base": (768, 12, 3072),
          "BERT-large": (1024, 24, 4096)}  # fmt: skip
"""(width, layers, width of the feed-forward network)."""
PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12
"""Of an H200: FLOP per second in bf16, bytes per second."""


def count() -> str:
    lines = [f"{'':12}{'host MFLOP':>12}{'extra':>9}{'%':>7}{'LoRA r 8 %':>12}{'host ns':>9}{'extra ns':>10}{'%':>6}"]
    for name, (width, layers, inner) in SHAPES.items():
        config = transformers.BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=12 if width % 64 else width // 64,
            intermediate_size=inner,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        sites = find_sites(model, ["classifier"], "all-linear", [])
        host, extra = host_flops(model, 128), extra_flops(sites, Shape(projector="probe"))
        lora = sum(2 * 8 * (site.num_in + site.num_out) for site in sites)
        read = {(site.layer, site.reads): site.num_in for site in sites}
        moved = 2 * (sum(read.values()) + 2 * sum(site.num_out for site in sites))  # y is read and written again
        times = host / PEAK_FLOPS * 1e9, (extra / PEAK_FLOPS + moved / PEAK_BYTES) * 1e9
        lines.append(
            f"{name:12}{host / 1e6:12.1f}{extra / 1e6:9.2f}{100 * extra / host:7.2f}{100 * lora / host:12.2f}"
            f"{times[0]:9.1f}{times[1]:10.1f}{100 * times[1] / times[0]:6.0f}"
        )
    return "\n".join(lines)


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", help="folder of a BERT-shaped encoder, or of a causal language model")
    parser.add_argument("--depth", type=float, default=0.5, help="share of the layers that a cut host keeps")
    parser.add_argument("--run", default="unihyperlora_sst2", help="preset whose rates are taken")
    parser.add_argument("--source-data", help="folder of train and dev files; with --target-data")
    parser.add_argument("--target-data")
    parser.add_argument("--source-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--projectors", type=lambda text: text.split(","), default=list(PROJECTORS))
    parser.add_argument("--baselines", type=lambda text: names_in(text, list(BASELINES)), default=list(BASELINES))
    parser.add_argument("--rates", type=rates_in, default={}, help="of baselines: 'LoRA r 8=1e-3,full=2e-4'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    parser = parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count what it costs, and train nothing")
    options = parser.parse_args()
    if unknown := sorted(options.rates.keys() - BASELINES.keys()):
        parser.error(f"--rates: unknown: {', '.join(unknown)}; there are {', '.join(BASELINES)}")
    if options.count:
        print(count())
        return
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, options.work or Path(temporary))
        bench.work.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            print(f"seed {seed}", flush=True)
            bench.one_seed(seed)
            print(f"{table(bench)}\n\nwritten {bench.write('portability')}", flush=True)


if __name__ == "__main__":
    main()
