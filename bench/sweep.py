"""Overhead of sweeps over their trials, and the gain of TPE with pruning over random search.

    python bench/sweep.py overhead          # 40 trials of a 2-second objective, 2 workers
    python bench/sweep.py search            # toy objectives with learning curves, 10 studies, and 100 for an interval
    python bench/sweep.py real [key=value ...]   # --run, both ways, in seconds of the trials' clocks

`overhead` sleeps in its trials, so that it measures the sweep's own time and the start of processes; run it
on a machine that is otherwise idle. `search` counts evaluations and does not sleep: its figures are the same on any
machine. `real` trains an epoch of the stand-in, or as key=value sets it, with the settings of `fastpeft sweep`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EVALUATIONS = 5
RATE, BATCH, PENALTY = "training.learning_rate", "training.batch_size", "regulariser.alpha"
SPACE: dict[str, dict[str, Any]] = {
    RATE: {"type": "loguniform", "low": 1e-5, "high": 1e-2},
    BATCH: {"type": "categorical", "choices": [16, 32, 64]},
    PENALTY: {"type": "loguniform", "low": 1e-5, "high": 1e-2},
}
SLEEP_S, OVERHEAD_TRIALS, WORKERS = 2.0, 40, 2
TRIALS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "search", "real"))
    parser.add_argument("--studies", type=int, default=10, help="search: pairs of studies")
    parser.add_argument("--trials", type=int, help="trials of random search")
    parser.add_argument("--run", default="lora_mnli", help="real: the preset; lora_mnli when absent")
    parser.add_argument("--out", type=Path, help="real: the results folder, so that it can be resumed")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="real: of every trial")
    arguments = parser.parse_intermixed_args()
    if arguments.what == "overhead":
        overhead(arguments.trials or OVERHEAD_TRIALS)
    elif arguments.what == "search":
        search(arguments.studies, arguments.trials or TRIALS)
    else:
        settings = arguments.settings or ["training.epochs=1"]
        out = arguments.out or Path("results/bench-sweep")
        real(arguments.run, arguments.trials or TRIALS, out, settings)


# ---- overhead ------------------------------------------------------------------------------


def sleep(spec: dict[str, Any], channel: Any) -> dict[str, Any]:
    """A trial that sleeps, and reports evaluations as a trainer does."""
    for evaluation in range(1, EVALUATIONS + 1):
        time.sleep(SLEEP_S / EVALUATIONS)
        if evaluation < EVALUATIONS:
            channel.report(evaluation, 0.5)
    return {"status": "done", "value": 0.5, "metric": "accuracy", "elapsed_s": SLEEP_S, "energy_j": None}


def start(spec: dict[str, Any], channel: Any) -> dict[str, Any]:
    """A trial that ends once everything is imported."""
    from fastpeft.trainer import train

    assert train
    return {}


class Silent:
    def say(self, message: str) -> None: ...

    def on_trial(self, row: Any) -> None: ...

    def on_standing(self, standing: Any) -> None: ...


def overhead(num_trials: int) -> None:
    from fastpeft.config import load_run
    from fastpeft.sweep.space import identity
    from fastpeft.sweep.study import open_storage, open_study
    from fastpeft.sweep.trials import Trials

    def timed_process(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    trainer_s = timed_process(f"import sys; sys.path.insert(0, {sys.path[0]!r}); from fastpeft.trainer import train")
    first_s, later_s = timed_worker(), statistics.median(timed_worker() for _ in range(5))
    run = load_run("lora_mnli", {"optuna.trials": num_trials, "optuna.pruner": "none", "optuna.space": SPACE})
    with tempfile.TemporaryDirectory() as folder:
        study, _ = open_study(open_storage(None, Path(folder)), "s", run.optuna, identity(run))
        options: dict[str, Any] = {"num_workers": WORKERS, "target": "bench.sweep:sleep"}
        began = time.perf_counter()
        assert Trials(run, study, Path(folder), Silent(), **options).run_all() == "done"
        took_s = time.perf_counter() - began
    own_s = num_trials * SLEEP_S / WORKERS
    print(
        f"{num_trials} trials of {SLEEP_S:g} s, {WORKERS} workers: {took_s:.1f} s, {took_s / own_s:.3f}x their own time"
    )
    print(f"a trainer's start: {trainer_s:.2f} s; a worker's: the first {first_s:.2f} s, then {later_s:.2f} s")


def timed_worker() -> float:
    """Seconds until a process is ready to train."""
    from fastpeft.sweep.worker import Worker, wait

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        worker = Worker("bench.sweep:start", {}, Path(folder) / "log")
        while worker.outcome() is None:
            wait([worker], 1.0)
        return time.perf_counter() - began


# ---- search --------------------------------------------------------------------------------


def curve(params: dict[str, Any], noise: Any) -> list[float]:
    """Accuracy at each evaluation: higher and reached sooner near the best learning rate and batch size, noise 0.003.

    The best is 0.9, at a learning rate of 3e-4 x sqrt(batch / 32). A factor of 2 costs 0.02; the penalty hardly counts.
    """
    off = math.log2(params[RATE] / (3e-4 * math.sqrt(params[BATCH] / 32)))
    final = 0.9 - 0.02 * off**2 / (1 + 0.05 * off**2) - 0.002 * abs(math.log10(params[PENALTY] / 1e-4))
    speed = 4.0 / (1 + 0.1 * off**2)
    shares = [(evaluation + 1) / EVALUATIONS for evaluation in range(EVALUATIONS)]
    rise = [(1 - math.exp(-speed * share)) / (1 - math.exp(-speed)) for share in shares]
    return [max(0.33, final) * r + 0.33 * (1 - r) + noise.normal(0, 0.003) for r in rise]


def run_study(sampler: str, pruner: str, seed: int, trials: int, target: float = math.inf) -> tuple[float, float]:
    """Best value found, and the time in units of whole trials. Ends after a time of `trials`, or at `target`."""
    import numpy as np
    import optuna

    from fastpeft.config import load_run
    from fastpeft.sweep.space import distributions
    from fastpeft.sweep.study import ask, best_of, make_pruner, make_sampler

    settings = {"optuna.space": SPACE, "optuna.sampler": sampler, "optuna.pruner": pruner, "optuna.seed": seed}
    config, noise = load_run("iwlora_mnli", settings).optuna, np.random.default_rng([seed, 1])
    study = optuna.create_study(direction="maximize", sampler=make_sampler(config, 0), pruner=make_pruner(config))
    space, spent = distributions(config.space), 0
    while spent < trials * EVALUATIONS:
        trial = ask(study, config, space)
        values, pruned = curve(trial.params, noise), False
        for evaluation, value in enumerate(values, start=1):
            spent += 1
            if evaluation < EVALUATIONS:
                trial.report(value, evaluation)
                pruned = bool(trial.should_prune())
                if pruned:
                    break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        study.tell(trial, max(values))
        if max(values) >= target:
            break
    best = best_of(study)
    assert best is not None
    assert best.value is not None
    return best.value, spent / EVALUATIONS


def search(studies: int, trials: int) -> None:
    """For each study: the best of `trials` random trials, then the time until TPE with pruning has a trial as good."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ways = [("tpe", "median"), ("tpe", "halving"), ("tpe", "none"), ("random", "median")]
    limit = 2 * trials
    shares: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for seed in range(studies):
        best, spent = run_study("random", "none", seed, trials)
        assert spent == trials
        for way in ways:
            found, took = run_study(*way, seed + 1000, limit, target=best)
            shares[way].append(took / trials if found >= best else math.inf)
        print(
            f"study {seed}:",
            ", ".join(f"{way[0]} {way[1]} {found[-1]:.2f}" for way, found in shares.items()),
            flush=True,
        )
    print(f"time until as good as the best of {trials} random trials, in their time; {studies} studies")
    print("| search | median | quarter | three quarters | within half |\n|---|---|---|---|---|")
    for (sampler, pruner), found in shares.items():
        low, middle, high = statistics.quantiles(found, n=4)
        within = sum(share <= 0.5 for share in found)
        print(f"| {sampler}, {pruner} | {middle:.2f} | {low:.2f} | {high:.2f} | {within} of {studies} |")


# ---- real ----------------------------------------------------------------------------------


def real(run: str, trials: int, out: Path, settings: list[str]) -> None:
    """Both searches by `fastpeft sweep`; each continues where it stopped."""
    times: dict[str, list[tuple[float, float]]] = {}
    for name, search in (("random", ["optuna.sampler=random", "optuna.pruner=none"]), ("tpe", [])):
        command = [sys.executable, "-m", "fastpeft", "sweep", "--run", run, "--name", name, "--trials-only"]
        command += ["--trials", str(trials), "--results-dir", str(out), *settings, *search]
        subprocess.run(command, check=True)
        times[name] = curve_of(out / name / "trials")
    best = max(value for _, value in times["random"])
    whole = times["random"][-1][0]
    reached = next((seconds for seconds, value in times["tpe"] if value >= best), math.inf)
    print(json.dumps({"random_best": best, "random_s": whole, "tpe_reaches_it_s": reached, "share": reached / whole}))


def curve_of(trials: Path) -> list[tuple[float, float]]:
    """(seconds of all trials so far, best value) after each trial that was not pruned."""
    found, spent_s, best = [], 0.0, -math.inf
    for path in sorted(trials.glob("*/result.json")):
        result = json.loads(path.read_text())
        spent_s += result["elapsed_s"] + result["setup_s"]
        if result["status"] == "done":
            best = max(best, result["best"]["value"])
        found.append((spent_s, best))
    return found


if __name__ == "__main__":
    main()
