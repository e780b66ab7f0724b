"""Reproduction of a paper's table: its methods and baselines on its tasks, claimed and measured figures side by side.

    python bench/reproduce.py --paper iwlora --scale stand-in
    python bench/reproduce.py --paper iwlora --scale real --model DIR --data DIR
    python bench/reproduce.py --paper fot|graff|unihyperlora --scale full

stand-in  a shipped model on generated rows, in place of one of the paper's tasks: iwlora 5 seeds of 120 s, about
          25 minutes on 2 cores, the others 3 seeds of 300 steps. It shows that the table can be produced.
real      a small pretrained encoder (`--model`) on the tasks' rows in `--data`, batches of 8 and equally many steps for
          each row, 3 seeds: MNLI and SST-2 for iwlora, MNLI for the schedules (5 seeds), Amazon and BoolQ for
          unihyperlora. About half an hour on 2 cores for a paper; other load does not change the table. `--budget` sets
          another budget.
full      the presets unchanged, with the paper's model and data from the hub: needs a GPU.

For unihyperlora this covers training on one host. bench/portability.py measures transfer to another.

Each run is `fastpeft train` in a process of its own, `--workers` at a time. Finished runs are not repeated and stopped
ones are resumed, so that the command can be interrupted and repeated. Seeds are the outermost loop: a table is
complete for the seeds that it has. The table goes to `--out` as Markdown, the whole report to RUNS/comparison.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.interleave import names_in
from fastpeft.compare.comparison import Comparison, Row
from fastpeft.compare.comparison_figures import p_text
from fastpeft.compare.found_runs import find_runs
from fastpeft.compare.report import report
from fastpeft.config import load_run
from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder, read_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scale:
    tasks: tuple[str, ...]
    num_seeds: int
    settings: tuple[str, ...]
    """Options and settings of `fastpeft train`."""
    needs_data: bool = False


@dataclass(frozen=True)
class Paper:
    baseline: str
    """Name of the baseline's preset, without its task."""
    methods: Mapping[str, str]
    """Name of a preset without its task -> method."""
    where: str
    """Model, settings and metric of the paper's claims."""
    scales: Mapping[str, Scale]
    claimed: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(preset without its task, task) -> the paper's score, as a share."""
    gains: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(preset without its task, task) -> the paper's difference to the baseline, where it gives no scores."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of the small encoder on SST-2, by bench/methods.py --tune and bench/schedules.py; for
    UniHyperLoRA's paper, and on MNLI for snac and bacon, the best of five, with a separate seed. The preset's own
    learning rate where absent."""

    def label(self, preset: str, task: str) -> str:
        """Name of the row in a comparison: the method where it is unique, else the run's preset."""
        methods = list(self.methods.values())
        return self.methods[preset] if methods.count(self.methods[preset]) == 1 else f"{preset}_{task}"

    def gain(self, preset: str, task: str) -> float | None:
        own, base = (self.claimed.get((name, task)) for name in (preset, self.baseline))
        return self.gains.get((preset, task)) if own is None or base is None else own - base


def _shares(table: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    return {(method, task): value / 100 for method, row in table.items() for task, value in row.items()}


_REAL = (
    *("training.threads=1", "training.batch_size=8", "training.fit_head=true", "dataset.max_length=96"),
    *("schedule.warmup_steps=30", "evaluation.every=end", "evaluation.max_examples=1000"),
)
"""Heads are fitted, since from randomly initialized ones some seeds stay at chance (bench/LOG.md)."""


_FOT = ("constant", "cosine", "linear", "wsd", "snac", "bacon", "fot")
_GRAFF = ("constant", "linear", "wsd", "salelr", "bats", "reactor", "graff")
_SCHEDULE_RATES = {
    **dict.fromkeys(("linear", "cosine", "fot", "graff"), 1e-3),
    **dict.fromkeys(("constant", "wsd"), 3.333e-4),
    **dict.fromkeys(("salelr", "bats"), 1e-3),  # linear's, multiplied by factors
    "reactor": 3.333e-4,  # starts as constant does
    **dict.fromkeys(("snac", "bacon"), 1e-1),  # multiplied by a share of signal
}


_CONFIGURATIONS = {"amazon": "books"}
"""Task -> configuration of its local data, for tasks with several."""


def _schedule_scales(*full: str) -> dict[str, Scale]:
    return {
        "stand-in": Scale(("gsm8k",), 3, ("--budget", "300steps", "training.threads=1")),
        "real": Scale(("mnli",), 5, (*_REAL, "--budget", "200steps"), needs_data=True),
        "full": Scale(("gsm8k",), 3, ("--no-stand-in", *full)),
    }


PAPERS = {
    "iwlora": Paper(
        baseline="lora",
        methods={"lora": "lora", "adalora": "adalora", "iwlora": "iw_lora", "full": "full"},
        claimed=_shares(
            {
                "lora": {"mnli": 84.6, "sst2": 93.2, "rte": 72.0},
                "adalora": {"mnli": 85.3, "sst2": 93.8, "rte": 73.4},
                "iwlora": {"mnli": 85.1, "sst2": 93.7, "rte": 73.2},
            }
        ),
        where="DeBERTa-v3-base, r 8, 3 epochs; accuracy, of RTE F1",
        scales={
            "stand-in": Scale(("mnli",), 5, ("--budget", "120s", "training.threads=1")),
            "real": Scale(("mnli", "sst2"), 3, (*_REAL, "--budget", "400steps"), needs_data=True),
            "full": Scale(("mnli", "sst2", "rte"), 5, ("--no-stand-in",)),
        },
        rates={"lora": 2e-3, "iwlora": 2e-3, "adalora": 2e-2, "full": 2e-4},
    ),
    "fot": Paper(
        baseline="bacon",
        methods=dict.fromkeys(_FOT, "lora"),
        where="Qwen3-0.6B in nf4, r 64, 2,000 steps; pass@1; +0.03 at 4,000 and +0.01 at 8,000 steps",
        gains={("fot", "gsm8k"): 0.05},
        rates={name: _SCHEDULE_RATES[name] for name in _FOT},
        scales=_schedule_scales("--budget", "2000steps", "model.quantisation=nf4"),
    ),
    "graff": Paper(
        baseline="constant",
        methods=dict.fromkeys(_GRAFF, "lora"),
        where="Qwen3-0.6B, r 64, 30 minutes; exact match",
        claimed=_shares(
            {
                "constant": {"gsm8k": 74.0},
                "salelr": {"gsm8k": 84.0},
                "bats": {"gsm8k": 88.5},
                "reactor": {"gsm8k": 90.8},
                "graff": {"gsm8k": 92.4},
            }
        ),
        scales=_schedule_scales("--budget", "1800s"),
        rates={name: _SCHEDULE_RATES[name] for name in _GRAFF},
    ),
    "unihyperlora": Paper(
        baseline="lora",
        methods={name: name for name in ("lora", "sat_lora", "hf_sat_lora", "unihyperlora")},
        where="TinyBERT, equal budget; the paper names no task",
        gains={("unihyperlora", f"{task}_tinybert"): 0.011 for task in ("conll2003", "boolq", "amazon")},
        rates={"lora": 1e-3, "sat_lora": 3e-3, "hf_sat_lora": 3e-3, "unihyperlora": 3e-4},
        scales={
            "stand-in": Scale(("amazon",), 3, ("--budget", "300steps", "training.threads=1")),
            "real": Scale(("amazon", "boolq"), 3, (*_REAL, "--budget", "150steps"), needs_data=True),
            "full": Scale(("conll2003_tinybert", "boolq_tinybert", "amazon_tinybert"), 3, ("--no-stand-in",)),
        },
    ),
}


@dataclass(frozen=True)
class Planned:
    own: str
    """Name of the preset without its task."""
    task: str
    seed: int

    @property
    def preset(self) -> str:
        return f"{self.own}_{self.task}"

    @property
    def name(self) -> str:
        return f"{self.preset}-seed{self.seed}"


def plan(paper: Paper, scale: Scale, num_seeds: int) -> Iterator[Planned]:
    for seed in range(num_seeds):
        for task in scale.tasks:
            for own in paper.methods:
                yield Planned(own, task, seed)


def command(one: Planned, paper: Paper, scale: Scale, options: argparse.Namespace) -> list[str] | None:
    """Command that trains this run or resumes it; None if it is finished."""
    folder = RunFolder(options.runs / one.name)
    result = folder.read_result()
    if result is not None and result.status in ("done", "diverged"):
        return None
    train = [sys.executable, "-m", "fastpeft", "train", "--results-dir", str(options.runs), "--name", one.name]
    if folder.config.is_file():
        return [*train, "--resume"]
    settings = [*scale.settings, "wandb.mode=disabled"]
    settings += ["--budget", options.budget] if options.budget else []  # a repeated option overrides
    if scale.needs_data:
        rows = options.data / one.task / _CONFIGURATIONS.get(one.task, "")
        settings += [f"model.name={options.model}", f"dataset.path={rows}"]
        settings += ["adapter.target_modules=all-linear"]
        settings += [f"training.learning_rate={rate}"] if (rate := paper.rates.get(one.own)) else []
    return [*train, "--run", one.preset, "--seed", str(one.seed), *settings]


def train_all(planned: Sequence[Planned], paper: Paper, scale: Scale, options: argparse.Namespace) -> None:
    def train(one: Planned) -> None:
        call = command(one, paper, scale, options)
        if call is None:
            return
        print(f"training {one.name}", flush=True)
        log = options.runs / f"{one.name}.log"
        with log.open("ab") as out:
            done = subprocess.run(call, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        if done.returncode:
            print(f"{one.name} ended with {done.returncode}: see {log}", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(train, planned))


def table(paper: Paper, comparison: Comparison, planned: Sequence[Planned]) -> list[str]:
    """Lines of Markdown, one for each method and task."""
    preset_of = {one.name: one for one in planned}
    base = paper.baseline
    names = ["task", "method", "seeds", f"claimed ({paper.where})", f"measured ({comparison.by})"]
    names += [f"claimed minus {base}", f"measured minus {base}, 95 % interval", "effect", "Holm's p", "time", "energy"]
    lines = [names, ["---"] * len(names)]
    for row in comparison.rows:
        one = preset_of[row.runs[0]]
        score = str(getattr(row, comparison.by))
        lines.append([row.task, row.label, str(len(row.by_seed)), *_cells(paper, row, one, score)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(paper: Paper, row: Row, one: Planned, score: str) -> list[str]:
    claimed, gain = paper.claimed.get((one.own, one.task)), paper.gain(one.own, one.task)
    test = row.seeds_test
    cells = ["-" if claimed is None else f"{claimed:.3f}", score]
    if one.own == paper.baseline:
        cells += ["-"] * 4
    else:
        cells.append("-" if gain is None else f"{gain:+.3f}")
        cells.append("-" if test is None else f"{test.difference:+.4f} ({test.low:+.4f} to {test.high:+.4f})")
        cells.append("-" if test is None or test.effect is None else f"{test.effect_name} {test.effect:.2f}")
        cells.append("-" if test is None or test.p_holm is None else p_text(test.p_holm))
    return [*cells, f"{row.seconds.value:,.0f} s", "-" if row.joules is None else f"{row.joules.value / 1000:,.1f} kJ"]


def provenance(runs: Path, planned: Sequence[Planned]) -> str:
    """Device, versions and commit recorded by the runs, each once, and the date."""
    found = [read_json(RunFolder(runs / one.name).environment) or {} for one in planned]
    facts: dict[str, set[str]] = {"device": set(), "commit": set(), "versions": set()}
    for environment in filter(None, found):
        packages = environment.get("packages", {})
        facts["device"].add(f"{environment.get('device')}, {environment.get('threads')} threads a run")
        facts["commit"].add(str(environment.get("git")))
        facts["versions"].add(", ".join(f"{name} {packages.get(name)}" for name in ("torch", "transformers", "peft")))
    said = "; ".join(f"{name} {' and '.join(sorted(values))}" for name, values in facts.items() if values)
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {said}."


def write_table(paper: Paper, planned: Sequence[Planned], options: argparse.Namespace) -> str:
    names = [one.name for one in planned if (options.runs / one.name / "run.yaml").is_file()]
    baseline = paper.label(paper.baseline, planned[0].task)
    made = report(find_runs(names, options.runs), options.runs, baseline=baseline)
    missing = len(planned) - sum(one.counts for one in made.found)
    lines = [f"# {options.paper}, {options.scale}", "", provenance(options.runs, planned), ""]
    lines += [f"{missing} of {len(planned)} runs are not done, and left out.", ""] if missing else []
    if options.scale == "stand-in":
        lines += [
            "STAND-IN: what is measured is of a small model on made-up text. It says nothing about the claims.",
            "",
        ]
    text = "\n".join([*lines, *table(paper, made.comparison, planned), ""])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    return text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", choices=PAPERS, required=True)
    parser.add_argument("--scale", choices=("stand-in", "real", "full"), required=True)
    parser.add_argument("--runs", type=Path, help="results/reproduce/PAPER-SCALE when absent")
    parser.add_argument("--out", type=Path, help="RUNS/table.md when absent")
    parser.add_argument("--seeds", type=int, help="how many, from 0")
    parser.add_argument("--tasks", help="comma-separated, of the scale's; all when absent")
    parser.add_argument("--budget", help="of every run, instead of the scale's: 2000steps, 30min")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", type=Path, help="real: the encoder's folder")
    parser.add_argument("--data", type=Path, help="real: a folder with mnli/ and sst2/")
    parser.add_argument("--table", action="store_true", help="train nothing, and make the table of what is done")
    options = parser.parse_args(arguments)
    scale = PAPERS[options.paper].scales[options.scale]
    if scale.needs_data and not (options.model and options.data):
        parser.error(f"--scale {options.scale} needs --model and --data")
    for path in [options.model, *([options.data / task for task in scale.tasks] if options.data else [])]:
        if path is not None and not path.is_dir():
            parser.error(f"{path}: there is no such folder")
    options.model, options.data = (path and path.resolve() for path in (options.model, options.data))
    options.runs = (options.runs or ROOT / "results" / "reproduce" / f"{options.paper}-{options.scale}").resolve()
    options.out = options.out or options.runs / "table.md"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    paper = PAPERS[options.paper]
    scale = paper.scales[options.scale]
    scale = replace(scale, tasks=tuple(names_in(options.tasks, scale.tasks)))
    planned = list(plan(paper, scale, options.seeds or scale.num_seeds))
    for preset in {one.preset for one in planned}:
        load_run(preset)  # unknown names fail before anything is trained
    options.runs.mkdir(parents=True, exist_ok=True)
    if not options.table:
        train_all(planned, paper, scale, options)
    try:
        print(write_table(paper, planned, options))
    except UserError as error:
        raise SystemExit(f"no table: {error}") from None
    print(f"written  {options.out} and {options.runs / 'comparison' / 'report.html'}")


if __name__ == "__main__":
    main()
