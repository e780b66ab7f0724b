"""Schedules at equal budget, each at its tuned peak learning rate, against tuned linear: paired differences over seeds.

    python bench/schedules.py [--task gsm8k|mnli] [--budget 30s|300steps] [--seeds N] [--schedules fot,graff|all]
                              [--model PATH --data PATH] [--search-trials N] [--search-budget B] [--max-examples N]
                              [--rates linear=3e-3,...] [--workers N] [--json OUT] [--resume] [--quick] [key=value ...]

The schedules are the shipped presets NAME_TASK that differ from the baseline's only in schedule, optimizer and learning
rate. Without --schedules these are the presets named after a schedule; `all` adds their variants. linear is always
included. They train the presets' stand-in, or with --model and --data the preset itself on local files. `key=value`
sets a key of all runs.

Search: every schedule gets the same number of trials of training.learning_rate by the same rule
(bench/schedule_search.py), starting from its preset's, with a separate seed. Its runs are reported, and not compared.
Comparison: seed by seed, the schedules in shuffled order within a seed. One seed gives the same initial weights and
data order to all, which is checked. Differences are paired by seed, with 95 % t-intervals; `no difference` means that
the interval contains 0. A budget in seconds includes the final evaluation; the --workers processes, with one thread
each on a CPU, share the machine. A budget in steps excludes the schedule's own cost and the machine's noise.
Overhead: the trainer's own step relative to that of constant, in turns in one process on the same batches.

--json is written after every run; --resume continues from it, with more seeds, trials or schedules if given.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.interleave import choose_device, positive, rates_in
from bench.report import about, json_path, write_json
from bench.schedule_presets import Presets, run_of
from bench.schedule_report import BASELINE, rows_of, show, unlike
from bench.schedule_runs import measure_run, step_cost
from bench.schedule_search import at_edge, best_exponent, next_exponent, rate_at
from fastpeft.config import RunConfig, parse_budget
from fastpeft.errors import UserError
from fastpeft.runs.events import finite, number
from fastpeft.runs.store import read_json

TASKS = {
    "mnli": {"budget": "30s", "seeds": 5, "search_trials": 5, "max_examples": 0, "overhead_rounds": 100},
    "gsm8k": {"budget": "45s", "seeds": 3, "search_trials": 3, "max_examples": 128, "overhead_rounds": 30},
}
"""Defaults with which 13 schedules take about 40 minutes on two free cores."""
QUICK = {"budget": "4steps", "seeds": 2, "search_trials": 2, "max_examples": 16, "overhead_rounds": 5}
TUNING_SEED = 1000
FACTOR = 3.0
"""Ratio of neighbouring learning rates in the search, before it halves its step."""
SETTINGS = ("task", "budget", "search_budget", "tune_on", "max_examples", "model", "data", "quick", "overrides")
"""Options that must be the same for --resume."""


# ---- the bench -----------------------------------------------------------------------------


class Bench:
    def __init__(
        self, args: argparse.Namespace, runs: dict[str, RunConfig], constant: RunConfig | None, pool: Executor | None
    ) -> None:
        self.args, self.runs, self.constant, self.pool = args, runs, constant, pool
        self.report = self._begin()
        self.report["parts"].append(about(choose_device(None)))
        self.by_key = {_key(run): run for run in self.report["runs"]}

    def _begin(self) -> dict[str, Any]:
        args = self.args
        settings = {key: getattr(args, key) for key in SETTINGS}
        if args.resume and args.json.exists():
            earlier = read_json(args.json)
            if earlier is None:
                raise UserError(f"--resume: {args.json} is no JSON file of this bench")
            other = [key for key in SETTINGS if earlier.get("settings", {}).get(key) != settings[key]]
            if other:
                raise UserError(f"--resume: {args.json} was measured with another {', '.join(other)}")
            return earlier
        return {"settings": settings, "parts": [], "runs": [], "overhead": {}}

    def run(self) -> dict[str, Any]:
        args = self.args
        rates = self.search()
        order = [(seed, name) for seed in range(args.seeds) for name in _shuffled(self.runs, seed)]
        self._all([("compare", name, seed, rates[name], args.budget) for seed, name in order])
        self.overhead(rates)
        self._conclude(rates)
        return self.report

    # ---- search ----------------------------------------------------------------------------

    def search(self) -> dict[str, float]:
        """Tuned learning rate of each schedule, searched in rounds over all, so that drift affects them alike."""
        names = [name for name in self.runs if name not in self.args.rates]
        for done in range(self.args.search_trials):
            cells = []
            for name in _shuffled(names, done):
                k = next_exponent(self._scores(name, done))
                rate = rate_at(self.runs[name].training.learning_rate, FACTOR, k)
                cells.append(("search", name, TUNING_SEED, rate, self.args.search_budget))
            self._all(cells)
        return self.args.rates | {name: self._best(name) for name in names}

    def _scores(self, name: str, count: int) -> dict[float, float]:
        """Exponent -> score of the first `count` trials, lower is better. They follow the rule, also after a resume."""
        start, scores = self.runs[name].training.learning_rate, {}
        for _ in range(count):
            k = next_exponent(scores)
            run = self.by_key["search", name, TUNING_SEED, rate_at(start, FACTOR, k)]
            scores[k] = self._score(run)
        return scores

    def _score(self, run: dict[str, Any]) -> float:
        """Validation loss, or minus the validation metric; infinite for a diverged run."""
        value = run[self.args.tune_on]
        if value is None or run["status"] == "diverged":
            return float("inf")
        return number(value) if self.args.tune_on == "loss" else -number(value)

    def _best(self, name: str) -> float:
        scores = self._scores(name, self.args.search_trials)
        return rate_at(self.runs[name].training.learning_rate, FACTOR, best_exponent(scores))

    # ---- runs ------------------------------------------------------------------------------

    def _all(self, cells: list[tuple[str, str, int, float, str]]) -> None:
        """Run the cells without a result yet, and save each as it ends."""
        left = [cell for cell in cells if cell[:4] not in self.by_key]
        for cell, measured in self._measured(left):
            phase, name, seed, rate, budget = cell
            run = {"phase": phase, "schedule": name, "seed": seed, "rate": rate, "asked": budget}
            run |= measured | {"part": len(self.report["parts"]) - 1}
            self.by_key[_key(run)] = run
            self.report["runs"].append(run)
            self._save()
            _say_run(run)

    def _measured(self, cells: list) -> Iterator[tuple[tuple, dict[str, Any]]]:
        prepared = [(cell, run_of(self.runs[cell[1]], *cell[2:])) for cell in cells]
        if self.pool is None:
            for cell, run in prepared:
                yield cell, measure_run(run)
            return
        futures: dict[Future, tuple] = {self.pool.submit(measure_run, run): cell for cell, run in prepared}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def overhead(self, rates: dict[str, float]) -> None:
        """Each schedule's step over that of constant; constant over itself shows the noise."""
        rounds = self.args.overhead_rounds
        if not rounds or self.constant is None:
            return
        calls = 8 if torch.cuda.is_available() else 1
        base = run_of(self.constant, TUNING_SEED, rates.get("constant", rates[BASELINE]), self.args.budget)
        for name, run in self.runs.items():
            if name not in self.report["overhead"]:
                other = run_of(run, TUNING_SEED, rates[name], self.args.budget)
                self.report["overhead"][name] = step_cost(base, other, rounds, calls)
                print(f"overhead  {name:16} {self.report['overhead'][name]['ratio']:.4f}", flush=True)
                self._save()

    # ---- what comes out --------------------------------------------------------------------

    def _conclude(self, rates: dict[str, float]) -> None:
        args, report = self.args, self.report
        compared = [self.by_key["compare", name, seed, rates[name]] for seed in range(args.seeds) for name in self.runs]
        searched = [run for run in report["runs"] if run["phase"] == "search" and run["schedule"] in self.runs]
        baseline = self.runs[BASELINE]
        stand_in = "" if args.model else " (STAND-IN)"
        model = Path(baseline.model.name).name if args.model else baseline.model.name
        where = f"{model} on {baseline.dataset.name}{stand_in}"
        report["title"] = f"{where}, {args.budget}, {args.seeds} seeds"
        report["metric"] = next((run["metric_name"] for run in compared if run["metric_name"]), "metric")
        report["search"] = {
            "count": len(searched),
            "budget": args.search_budget,
            "seed": TUNING_SEED,
            "tune_on": args.tune_on,
            "run_s": sum(run["elapsed_s"] + run["setup_s"] for run in searched),
        }
        report["tuned"] = {name: self._tuned(name, rates[name]) for name in self.runs}
        report["rows"] = rows_of(compared, list(self.runs))
        report["unlike"] = unlike(compared)
        self._save()

    def _tuned(self, name: str, rate: float) -> dict[str, Any]:
        if name in self.args.rates:
            return {"rate": rate}
        scores, start = self._scores(name, self.args.search_trials), self.runs[name].training.learning_rate
        trials = []
        for k in scores:
            run = self.by_key["search", name, TUNING_SEED, rate_at(start, FACTOR, k)]
            value = run[self.args.tune_on]
            trials.append({"rate": run["rate"], "score": "diverged" if value is None else round(number(value), 4)})
        return {"rate": rate, "trials": finite(trials), "edge": at_edge(scores)}

    def _save(self) -> None:
        if self.args.json:
            write_json(self.args.json, self.report)


def _key(run: dict[str, Any]) -> tuple[str, str, int, float]:
    return run["phase"], run["schedule"], run["seed"], run["rate"]


def _shuffled(names: Any, seed: int) -> list[str]:
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order


def _say_run(run: dict[str, Any]) -> None:
    value, loss = (run[of] if run[of] is None else f"{number(run[of]):.4f}" for of in ("metric", "loss"))
    seconds = f"{run['elapsed_s']:.1f} s and {run['setup_s']:.1f} s of set-up"
    print(
        f"{run['phase']:8} seed {run['seed']:4} {run['schedule']:16} {run['rate']:9.3g}  {run['metric_name']} {value}"
        f"  loss {loss}  {run['steps']:5} steps  {seconds}" + ("  DIVERGED" if run["diverged"] else ""),
        flush=True,
    )


def plan(args: argparse.Namespace, runs: dict[str, RunConfig]) -> str:
    """Plan in words, with the duration for a budget in seconds, set-up excluded."""
    searched = args.search_trials * sum(name not in args.rates for name in runs)
    compared = args.seeds * len(runs)
    text = f"{len(runs)} schedules: {', '.join(runs)}\n"
    text += f"search: {searched} runs of {args.search_budget}; comparison: {compared} runs of {args.budget}"
    budgets = [(searched, parse_budget(args.search_budget)), (compared, parse_budget(args.budget))]
    if all(budget.kind == "seconds" for _, budget in budgets):
        seconds = sum(count * budget.limit for count, budget in budgets) / args.workers
        text += f"; {args.workers} at a time, {seconds / 60:.0f} min and their set-up"
    return text


# ---- the command ---------------------------------------------------------------------------


def _budget(text: str) -> str:
    parse_budget(text)
    return text


def _checked(check: Callable[[str], Any], example: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return check(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write {example}") from None

    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    budget = _checked(_budget, "30s, 2m or 300steps")
    parser.add_argument("--task", choices=list(TASKS), default="mnli")
    parser.add_argument("--budget", type=budget, help="of a run; mnli 30s, gsm8k 45s")
    parser.add_argument("--seeds", type=positive, help=f"how many; mnli 5, gsm8k 3; the search has seed {TUNING_SEED}")
    parser.add_argument("--schedules", help="comma-separated, or all")
    parser.add_argument("--model", help="a local model instead of the stand-in; with --data")
    parser.add_argument("--data", help="local data as dataset.path takes it; with --model")
    parser.add_argument("--search-trials", type=positive, help="rates a schedule; mnli 5, gsm8k 3")
    parser.add_argument("--search-budget", type=budget, help="of a trial; that of a run")
    parser.add_argument("--tune-on", choices=["loss", "metric"], default="loss", help="of the validation split")
    parser.add_argument("--rates", type=rates_in, default={}, help="of these schedules, instead of a search")
    parser.add_argument("--max-examples", type=int, help="most rows of a split scored; mnli all, gsm8k 128")
    parser.add_argument("--overhead-rounds", type=int, help="of two turns; 0 measures none; mnli 100, gsm8k 30")
    parser.add_argument("--workers", type=positive, help="runs at a time; on a GPU 1, else a core each, at most 4")
    parser.add_argument("--json", type=json_path)
    parser.add_argument("--resume", action="store_true", help="go on from --json")
    parser.add_argument("--quick", action="store_true", help="every code path, no figures worth reading")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    args = parser.parse_intermixed_args(argv)
    defaults = TASKS[args.task] | (QUICK if args.quick else {})
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.search_budget = args.search_budget or args.budget
    if args.workers is None:
        args.workers = 1 if torch.cuda.is_available() or args.quick else min(4, os.cpu_count() or 1)
    if args.seeds > TUNING_SEED:
        parser.error(f"--seeds: at most {TUNING_SEED}")
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if args.resume and not args.json:
        parser.error("--resume goes on from --json, which is not given")
    if args.json and args.json.exists() and not args.resume:
        parser.error(f"--json {args.json} is there: --resume goes on from it")
    return args


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Pool of worker processes; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    args = parse_args()
    try:
        presets = Presets(args)
        chosen = presets.choose(args.schedules)
        unknown = sorted(args.rates.keys() - chosen.keys())
        if unknown:
            raise UserError(f"--rates {', '.join(unknown)}: not among the schedules {', '.join(chosen)}")
        with _pool(args.workers) as pool:
            bench = Bench(args, chosen, presets.found.get("constant"), pool)
            print(plan(args, chosen), flush=True)
            report = bench.run()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print(f"stopped{'; the same command with --resume goes on' if args.json else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    show(report)
    raise SystemExit(1 if report["unlike"] else 0)


if __name__ == "__main__":
    main()
