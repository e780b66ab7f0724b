"""One run with several seeds, one after another, within one budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpeft.config import ConfigError, RunConfig, load_run, parse_budget, with_values
from fastpeft.runs.store import Result, RunFolder, default_name
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.resume import check_same


def train_seeds(
    run: RunConfig,
    seeds: list[int],
    *,
    results_dir: str | Path = "results",
    name: str | None = None,
    resume: bool = False,
    stop: StopRequest | None = None,
    on_start: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[Result]:
    """Train `run` once for each seed, in the folders `<name>-seed<N>`, each with an equal share of the budget.

    Args:
        name: of the group; RUN-YYYYmmdd-HHMMSScc when absent.
        resume: in the group `name`, skip the seeds that are done, continue an unfinished one, start the others.
        stop: ends the current seed's run; later seeds are not started.
        on_start: called with each seed and its folder's name.
        options: those of `fastpeft.train`.

    Returns:
        The results of the seeds that were trained or are done, in order.

    Raises:
        UserError: as `train`. Raised before anything is trained if a folder exists already, a run to resume has other
            settings, or the shares are too small.
    """
    group = name or default_name(run.run_id)
    shares = share_budget(run, len(seeds))
    folders = [RunFolder.at(Path(results_dir), f"{group}-seed{seed}") for seed in seeds]
    runs = [with_values(shares, {"training.seed": seed}) for seed in seeds]
    for one, folder in zip(runs, folders):
        if not resume:
            folder.check_free()
        elif folder.config.is_file():
            check_same(folder, load_run(folder.config), one)
    results = []
    with stop or StopRequest() as stop:
        for seed, one, folder in zip(seeds, runs, folders):
            if stop():
                break
            if on_start is not None:
                on_start(seed, folder.path.name)
            goes_on = resume and folder.config.is_file()
            where = {"results_dir": results_dir, "name": folder.path.name, "group": group}
            results.append(train(one, resume=goes_on, stop=stop, **where, **options))
    return results


def share_budget(run: RunConfig, count: int) -> RunConfig:
    """`run` with 1/`count` of its budget. Without a budget, training.epochs holds for each seed.

    Raises:
        ConfigError: fewer whole steps or tokens than seeds.
    """
    if run.budget is None:
        return run
    budget = parse_budget(run.budget)
    share = budget.limit / count
    if budget.kind in ("steps", "tokens"):
        share = budget.limit // count
        if share < 1:
            raise ConfigError(f"budget {run.budget}", [f"{count} seeds cannot share it: one would get nothing"])
    unit = {"seconds": "s", "joules": "J", "tokens": "tok", "steps": "steps"}[budget.kind]
    return with_values(run, {"budget": f"{share:.12g}{unit}"})
