"""Kills at random moments: SIGKILL of training, export and sweeps, and the outcome compared with an unbroken run's.

    python bench/chaos.py [--kills 200] [--cases "NAME; ..."] [--seed N] [--work DIR] [--json OUT]

Four kinds of task, each with another method, on the small models that ship: classification by IW-LoRA, word
problems by AdaLoRA, entities by UniHyperLoRA, conversations by LoRA. `fastpeft train` is killed at a moment drawn
uniformly from an unbroken run's duration, so that set-up, calibration, steps, checkpoints, evaluation, decoding and the
final save are all hit. It is then resumed, or started again where nothing can be resumed, and perhaps killed again. The
outcome must equal the unbroken run's: each file of the last and the best weights byte for byte, each step in the log
once, each evaluation's value. Then its export is killed the same way, and its files compared. A fifth case loads its
model and its rows from a hub on loopback, and starts with an empty cache.

In sweeps, workers are killed, and the sweep itself. All trials must then exist, none twice and none left running, and
the best trial's training must equal that of `fastpeft train` with the same settings, byte for byte.

Processes are forked from one that has imported everything, as a sweep's workers are. The bench needs the packages of
`fastpeft[test]`, and exits with 1 where anything differed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.chaos_sweeps import command, failed, lost, run_killed
from bench.report import about, json_path, print_table, write_json
from fastpeft.runs.events import read_events
from fastpeft.runs.store import RunFolder
from fastpeft.sweep.worker import forking_context, write_to
from tests.support.fake_hub import FakeHub
from tests.support.hub_files import GLUE, MODEL, deberta_files, glue_files

NUM_TRAIN, NUM_DEV = 128, 32
SETTINGS = (
    "budget=24steps", "training.batch_size=8", "training.checkpoint_steps=3", "training.precision=fp32",
    "training.threads=1", "schedule.warmup_steps=2", "evaluation.every=8steps", "wandb.mode=disabled",
)  # fmt: skip
MOST_ATTEMPTS = 60
"""Attempts at one run. The bench ends with an error where all of them were killed."""
MOST_EXPORT_KILLS = 3
"""Kills of one run's export."""
BEFORE = "before its log"
PACE_S = 0.1
"""Delay of the hub within each answer, so that a download takes about as long as the rest."""


@dataclass(frozen=True)
class Case:
    run: str
    model: str
    rows: str
    """module:function that generates its splits."""
    settings: str = ""
    export: str = ""
    """Options of `fastpeft export`."""
    from_hub: bool = False
    """Load the preset's own model and rows from the hub on loopback."""


CASES = {
    "classification, iw_lora": Case("iwlora_mnli", "deberta-tiny", "sentence_pairs:splits"),
    "word problems, adalora": Case(
        "linear_gsm8k", "qwen3-tiny", "problems:splits",
        "dataset.task=word-problems dataset.held_out=16 method=adalora adapter.rank=8 evaluation.max_new_tokens=8",
    ),
    "entities, unihyperlora": Case(
        "unihyperlora_conll2003", "deberta-tiny", "entities:splits",
        "dataset.task=token-classification unihyperlora.max_extra_flops=1.0", "--approximate 4",
    ),
    "conversations, lora": Case(
        "lora_alpaca", "qwen3-tiny", "dialogues:splits", "dataset.task=chat evaluation.max_new_tokens=8"
    ),
    "from a hub, lora": Case("lora_rte", "", "", "dataset.max_length=32", from_hub=True),
}  # fmt: skip
SWEEPS = "sweeps"
SWEPT = Case("lora_mnli", "deberta-tiny", "sentence_pairs:splits")


@dataclass
class Found:
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """Kills by the activity of the process."""
    differences: list[str] = field(default_factory=list)


# ---- processes -----------------------------------------------------------------------------


def call(arguments: list[str], log: str) -> None:
    """`fastpeft` with these arguments, in the forked process."""
    write_to(log)
    from fastpeft.cli.commands import main

    sys.argv = ["fastpeft", *arguments]
    main()


class Killer:
    def __init__(self, rng: random.Random, log: Path) -> None:
        self.rng, self.log, self._context = rng, log, forking_context()

    def start(self, arguments: list[str]) -> BaseProcess:
        process = self._context.Process(target=call, args=(arguments, str(self.log)))
        process.start()
        return process

    def whole(self, arguments: list[str]) -> float:
        """Seconds of the whole command, which is not killed."""
        began = time.monotonic()
        self._ends_well(self.start(arguments), arguments)
        return time.monotonic() - began

    def killed(self, arguments: list[str], within_s: float) -> bool:
        """Whether it was killed, at a moment drawn uniformly from `within_s` seconds; else it has ended by itself."""
        process = self.start(arguments)
        process.join(self.rng.uniform(0, within_s))
        if process.is_alive():
            process.kill()
            process.join()
            if process.exitcode == -9:
                return True
        self._ends_well(process, arguments)
        return False

    def _ends_well(self, process: BaseProcess, arguments: list[str]) -> None:
        process.join()
        if process.exitcode:
            raise SystemExit(failed(arguments, process.exitcode, self.log))


# ---- one case ------------------------------------------------------------------------------


def write_rows(case: Case, folder: Path) -> Path:
    module, _, function = case.rows.partition(":")
    splits = getattr(import_module(f"fastpeft.standins.{module}"), function)()
    folder.mkdir(parents=True)
    for split, name, count in (
        ("train", "train", NUM_TRAIN),
        ("validation", "dev", NUM_DEV),
        ("test", "test", NUM_DEV),
    ):
        if split in splits:
            lines = (json.dumps(row) + "\n" for row in splits[split][:count])
            (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def digests(folder: Path, *names: str) -> dict[str, str]:
    """Digests of every file in the folders `names`, or in `folder` itself."""
    found = [path for name in names or [""] for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def logged(folder: Path) -> dict[str, Any]:
    events = list(read_events(folder / "events.jsonl"))
    steps = [(event["step"], event["loss"], event["lr"]) for event in events if event["type"] == "step"]
    return {"steps": steps, "evaluations": [(e["step"], e["value"]) for e in events if e["type"] == "eval"]}


def at_work_on(folder: Path) -> str:
    """Activity of the killed process, by its last event."""
    path = folder / "events.jsonl"
    events = list(read_events(path)) if path.is_file() else []
    last = events[-1] if events else None
    if last is None:
        return BEFORE
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob(".writing-*")):
        return "writing a checkpoint"
    return str(last["text"] if last["type"] == "phase" else {"step": "a step"}.get(last["type"], last["type"]))


def differences(folder: Path, unbroken: Path) -> list[str]:
    found = []
    for adapter in ("adapter", "adapter_best"):
        own, other = digests(folder, adapter), digests(unbroken, adapter)
        found += [f"{name} differs" for name in sorted(own.keys() | other.keys()) if own.get(name) != other.get(name)]
    own, other = logged(folder), logged(unbroken)
    return found + [f"the log's {key} differ" for key in own if own[key] != other[key]]


class Chaos:
    def __init__(self, work: Path, killer: Killer, hub: FakeHub, say: Callable[[str], None]) -> None:
        self.work, self.killer, self.hub, self.say = work, killer, hub, say

    def settings(self, case: Case, folder: Path) -> list[str]:
        """--run and the settings over it."""
        found = ["--run", case.run, *SETTINGS, *case.settings.split()]
        if case.from_hub:
            return found
        rows = write_rows(case, folder / "data")
        return [*found, f"model.name=embedded/{case.model}", f"dataset.path={rows}", "dataset.name=rows"]

    def case(self, name: str, case: Case, kills: int) -> Found:
        """At least `kills` kills of training and export, each run compared with the unbroken one."""
        own = self.work / "".join(c if c.isalnum() else "_" for c in name)
        results, found = own / "results", Found()
        start = ["train", *self.settings(case, own), "--results-dir", str(results)]
        self.forget_downloads()
        seconds = self.killer.whole([*start, "--name", "unbroken"])
        export = ["export", "--results-dir", str(results), *case.export.split()]
        export_s = self.killer.whole([*export, "unbroken"])
        while found.kills.total() < kills:
            folder = results / f"run-{found.runs}"
            self.forget_downloads()
            self.train(start, folder, seconds, found)
            found.differences += [f"{folder.name}: {said}" for said in differences(folder, results / "unbroken")]
            for _ in range(MOST_EXPORT_KILLS):
                if (folder / "export").is_dir() or not self.killer.killed([*export, folder.name], export_s):
                    break
                found.kills["export"] += 1
            if not (folder / "export").is_dir():
                self.killer.whole([*export, folder.name])
            found.differences += self._exports(folder, results / "unbroken")
            found.runs += 1
            self.say(
                f"{name}: {found.runs} runs, {found.kills.total()} kills, differences: {found.differences or 'none'}"
            )
            shutil.rmtree(folder)
        return found

    def train(self, start: list[str], folder: Path, seconds: float, found: Found) -> None:
        place = ["--results-dir", str(folder.parent), "--name", folder.name]
        for _ in range(MOST_ATTEMPTS):
            is_begun = RunFolder(folder).config.is_file()
            arguments = ["train", "--resume", *place] if is_begun else [*start, "--name", folder.name]
            num_requests = len(self.hub.requests)
            if not self.killer.killed(arguments, seconds):
                return
            downloading = not is_begun and len(self.hub.requests) > num_requests
            at = at_work_on(folder)
            found.kills["a download" if downloading and at == BEFORE else at] += 1
        raise SystemExit(f"{folder}: {MOST_ATTEMPTS} attempts, and none was not killed")

    def sweeps(self, kills: int) -> Found:
        own, found = self.work / SWEEPS, Found()
        results, start = own / "results", self.settings(SWEPT, own)
        while found.kills.total() < kills:
            folder = results / f"sweep-{found.runs}"
            run_killed(command(start, results, folder.name), self.killer.rng, self.killer.log, found.kills)
            found.differences += [f"{folder.name}: {said}" for said in lost(folder)]
            (trained,) = json.loads((folder / "sweep.json").read_text())["runs"]
            again = ["train", "--run", str(folder / "best.yaml"), "--seed", "1", "--results-dir", str(results)]
            self.killer.whole([*again, "--name", "again"])
            said = differences(results / trained, results / "again")
            found.differences += [f"{trained}: {one}" for one in said]
            found.runs += 1
            self.say(f"sweeps: {found.runs}, {found.kills.total()} kills, differences: {found.differences or 'none'}")
            shutil.rmtree(results)
        return found

    def forget_downloads(self) -> None:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)

    def _exports(self, folder: Path, unbroken: Path) -> list[str]:
        own, other = digests(folder / "export"), digests(unbroken / "export")
        names = (own.keys() | other.keys()) - {"README.md", "export.json"}  # they name the run
        return [f"{folder.name}: export/{name} differs" for name in sorted(names) if own.get(name) != other.get(name)]


@contextmanager
def hub_for(home: Path) -> Iterator[FakeHub]:
    """A hub for the processes that start from now on. They cache its files in `home`."""
    hub = FakeHub()
    hub.add("model", MODEL, deberta_files())
    hub.add("dataset", GLUE, glue_files())
    with hub.serve():
        hub.pace_s = PACE_S
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        yield hub


# ---- the command ---------------------------------------------------------------------------


def _write(out: Path, found: dict[str, Found], seed: int) -> None:
    """Write the results of the cases that have ended."""
    import torch

    cases = {name: {"runs": o.runs, "kills": dict(o.kills), "differences": o.differences} for name, o in found.items()}
    write_json(out, about(torch.device("cpu")) | {"seed": seed, "cases": cases})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least, over all cases")
    parser.add_argument("--cases", help=f"separated by semicolons, of: {'; '.join([*CASES, SWEEPS])}")
    parser.add_argument("--seed", type=int, help="of the moments; a fresh one when absent")
    parser.add_argument("--work", type=Path, help="a temporary folder when absent")
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    asked = [name.strip() for name in options.cases.split(";")] if options.cases else [*CASES, SWEEPS]
    if unknown := sorted(set(asked) - {*CASES, SWEEPS}):
        parser.error(f"--cases {'; '.join(unknown)}: expected some of {'; '.join([*CASES, SWEEPS])}")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        with hub_for(work / "hub_cache") as hub:
            killer = Killer(random.Random(seed), work / "output.log")
            chaos = Chaos(work, killer, hub, lambda text: print(text, flush=True))
            each = -(-options.kills // len(asked))
            found = {}
            for name in asked:
                found[name] = chaos.sweeps(each) if name == SWEEPS else chaos.case(name, CASES[name], each)
                if options.json:
                    _write(options.json, found, seed)
    lines = [[name, str(one.runs), str(one.kills.total()), str(len(one.differences))] for name, one in found.items()]
    print_table("killed, resumed, and compared with an unbroken run", ["", "runs", "kills", "differences"], lines)
    at = sum((one.kills for one in found.values()), Counter[str]())
    print("killed at: " + ", ".join(f"{what} {count}" for what, count in at.most_common()))
    if lost := [said for one in found.values() for said in one.differences]:
        raise SystemExit("\n".join(lost))


if __name__ == "__main__":
    main()
