"""Train one run: `train` resolves names, sets the run up, owns its folder, and runs the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from fastpeft.config import RunConfig, run_from_values, run_values, save_run
from fastpeft.config.trackers import TRACKERS
from fastpeft.device_memory import high_water_bytes
from fastpeft.models.backbone import quiet_transformers
from fastpeft.ranks import join
from fastpeft.runs.events import Event, number
from fastpeft.runs.store import Result, RunFolder, default_name, write_json
from fastpeft.runs.system import Heartbeat, environment, git_commit
from fastpeft.tasks.trained_on import TrainedOn
from fastpeft.trackers import Choice, Trackers, choose
from fastpeft.trainer.build import Job, build_job, gpu_uuid
from fastpeft.trainer.checkpoint_files import Checkpoint
from fastpeft.trainer.follower import Follower, begin_together, give_state, refuse_ranks
from fastpeft.trainer.graphs import capture_steps
from fastpeft.trainer.interrupt import StopRequest
from fastpeft.trainer.loop import Loop, Prune
from fastpeft.trainer.micro_batches import out_of_memory_is_told
from fastpeft.trainer.prefix_cache import open_prefix_cache
from fastpeft.trainer.rank_orders import Orders
from fastpeft.trainer.resolve import Resolved, resolve
from fastpeft.trainer.resume import (
    began_in,
    check_same,
    check_same_data,
    cut_events,
    find_checkpoint,
    open_run,
    same_run,
)
from fastpeft.trainer.rng import rng_state, set_rng_state
from fastpeft.trainer.set_up import SetUp

__all__ = ["Reporter", "StopRequest", "train"]


class Reporter(Protocol):
    """Reports to the user. Methods may be called from several threads, and must return quickly."""

    def say(self, message: str) -> None:
        """Show a line that is not an event, such as one about the set-up."""

    def on_event(self, event: Event) -> None: ...


class _Silent:
    def say(self, message: str) -> None: ...

    def on_event(self, event: Event) -> None: ...


def train(
    run: RunConfig | None,
    *,
    results_dir: str | Path = "results",
    name: str | None = None,
    resume: bool = False,
    allow_stand_in: bool = True,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
    group: str | None = None,
    prune: Prune | None = None,
    score_test: bool = True,
) -> Result:
    """Train `run` to the end of its budget.

    Args:
        run: from fastpeft.load_run; None with `resume` takes the run stored in the folder.
        results_dir: parent of the run's folder.
        name: the folder's name; RUN-YYYYmmdd-HHMMSScc when absent.
        resume: continue the run `name` from its newest valid checkpoint.
        allow_stand_in: use the run's stand-in model and data if its own cannot be reached.
        reporter: receives every event.
        stop: request to stop after the current step, which SIGINT and SIGTERM also make while this runs.
        group: name that related runs share, stored in result.json.
        prune: called with the number and score of each evaluation before the final one; True ends the run.
        score_test: score the test split at the end, if there is one.

    Returns:
        The content of result.json. `status` is done, stopped, pruned or diverged.

    Raises:
        UserError: input that cannot be used; the folder of a new run is then removed. Also OutOfMemory during training,
            after which the run can be resumed from its last checkpoint.
    """
    reporter, stop = reporter or _Silent(), stop or StopRequest()
    began, ranks = time.perf_counter(), join()
    if ranks.rank > 0:
        return _follow(Orders(ranks, stop))
    folder = RunFolder.at(Path(results_dir), name or default_name(run.run_id if run else "run"))
    checkpoint = None
    try:
        if resume:
            finished, stored = open_run(folder, name)
            if finished is not None:
                if run is not None:
                    check_same(folder, stored, run)
                reporter.say(f"{folder.path} is finished: {_outcome(finished)}. Nothing is left to do")
                ranks.told({"result": asdict(finished)})
                return finished
            resolved = same_run(folder, stored, run, allow_stand_in)
            checkpoint = find_checkpoint(folder, reporter.say)
        else:
            assert run is not None
            folder.check_free()
            resolved = resolve(run, allow_stand_in)
        chosen = choose(TRACKERS.sections(resolved.run), reporter.say)
        refuse_ranks(resolved.run, ranks)
        ranks.told({"run": run_values(resolved.run), "score_test": score_test, "resumes": checkpoint is not None})
        with (
            stop,
            _torch_settings(resolved.run),
            out_of_memory_is_told(),
            quiet_transformers(keep_bars=True),
        ):
            _say_stand_in(reporter, resolved)
            orders = Orders(ranks, stop)
            with SetUp(folder, reporter.on_event, resume, checkpoint) as set_up:
                job = build_job(resolved.run, began_in(folder, checkpoint), score_test, orders)
                graphs = capture_steps(job)
                _prepare(job, folder, resolved, checkpoint, resume)
            result = _new_result(job, resolved, folder, group)
            result.setup_s = time.perf_counter() - began
            loop = Loop(job, folder, set_up.open_log(), result, stop, prune, graphs)
            if checkpoint is not None:
                give_state(ranks, checkpoint)
            result = _run(loop, checkpoint, chosen, reporter.say)
            orders.end()
            ranks.told({"result": asdict(result)})
            return result
    finally:
        folder.unlock()


def _prepare(job: Job, folder: RunFolder, resolved: Resolved, checkpoint: Checkpoint | None, resume: bool) -> None:
    """The rest of the set-up: synchronize the ranks, open the prefix cache, write the folder's files."""
    begin_together(job)
    keep_prefix(job, folder)
    if resume:
        job.notes += check_same_data(folder, job.trained_on, checkpoint)
        cut_events(folder, checkpoint)
    if TrainedOn.read(folder.path) is None:
        job.trained_on.write(folder.path)  # before run.yaml, so that every resumable run has it
    save_run(resolved.run, folder.config)
    write_json(folder.environment, environment() | _device_facts(job))


def _follow(orders: Orders) -> Result:
    """`train` on ranks 1 and up: rank 0 sends the run."""
    ranks = orders.ranks
    told = ranks.told(None)
    if "result" in told:
        return Result(**told["result"])
    run = run_from_values(told["run"], told["run"]["run_id"])
    with orders.stop, _torch_settings(run), out_of_memory_is_told(), quiet_transformers():
        job = build_job(run, None, told["score_test"], orders)
        begin_together(job)
        Follower(job, told["resumes"]).run()
        if job.ahead is not None:
            job.ahead.close()
    return Result(**ranks.told(None)["result"])


def keep_prefix(job: Job, folder: RunFolder) -> None:
    """Open the cache of training.cache_prefix in the run's folder, if the run asks for one.

    Raises:
        UserError: the model or its adapters cannot be split so, or the disk has no room.
    """
    setting = job.run.training.cache_prefix
    if not setting:
        return
    sample = job.task.collate(job.batches.rows(0)[:2], job.device)
    cache = open_prefix_cache(setting, folder.path, job.adapter.model, job.adapter.adapted, job.batches.encoded, sample)
    job.prefix_cache = cache
    job.notes.append(cache.describe())


def _new_result(job: Job, resolved: Resolved, folder: RunFolder, group: str | None) -> Result:
    run, earlier = job.run, folder.read_result()
    return Result(
        run_id=run.run_id,
        name=folder.path.name,
        stand_in=resolved.stand_in,
        seed=run.training.seed,
        group=group or (earlier.group if earlier else None),
        method=run.method,
        model=run.model.name,
        dataset=job.task.name,
        kind=job.task.kind,
        labels=list(job.task.label_names),
        data=job.trained_on.data.to_json(),
        budget={"kind": job.clock.budget.kind, "limit": job.clock.budget.limit, "spent": 0.0},
        git=git_commit(),
    )


def _run(loop: Loop, checkpoint: Checkpoint | None, chosen: list[Choice], say: Callable[[str], None]) -> Result:
    """Run the loop with trackers and heartbeat, and close everything at its end."""
    job, folder, result = loop.job, loop.folder, loop.result
    folder.write_result(result)
    error = trackers = None
    try:
        trackers = Trackers(chosen, folder.path, say, loop.log.warn)
        skew = job.orders.pass_times.skew
        with Heartbeat(lambda **figures: loop.log.event("system", **figures, **skew()), gpu_uuid(job.device)):
            result.status = loop.run(checkpoint)
        if job.prefix_cache is not None and result.status != "stopped":
            job.prefix_cache.remove()
    except BaseException as caught:
        result.status, error = "failed", f"{type(caught).__name__}: {caught}"
        raise
    finally:
        _close(job, loop, folder, result, error)
        if trackers is not None:
            trackers.close()
        loop.log.close()
    return result


def _close(job: Job, loop: Loop, folder: RunFolder, result: Result, error: str | None) -> None:
    clock = job.clock
    clock.stop()
    if job.ahead is not None:
        job.ahead.close()
    loop.watch_meter()
    result.energy_j, result.energy_method = clock.meter.joules, clock.meter.method
    result.elapsed_s, result.tokens, result.steps = clock.elapsed_s, clock.tokens, clock.steps
    result.budget["spent"] = clock.spent
    sizes = [path.stat().st_size for path in folder.weights(job.adapter.saved_as).glob(job.adapter.weight_files)]
    if sizes:
        result.adapter_mb = round(sum(sizes) / 2**20, 3)
    result.adapter_facts = {name: value for name, value in job.adapter.facts().items() if math.isfinite(value)}
    result.peak_memory_mb = round(high_water_bytes(job.device) / 2**20, 1)
    folder.write_result(result)
    outcome = {key: getattr(result, key) for key in ("status", "metric", "best", "energy_j")}
    loop.log.event("end", **outcome, **({"error": error} if error else {}))


def _say_stand_in(reporter: Reporter, resolved: Resolved) -> None:
    if resolved.stand_in:
        reporter.say(
            f"STAND-IN: {resolved.run.model.name} on {resolved.run.dataset.name} ({resolved.reason}). "
            "The numbers say nothing about the model and the data that the preset names"
        )


def _outcome(result: Result) -> str:
    return f"{result.metric.get('name', 'metric')} {number(result.metric.get('value', 'nan')):.4f}"


def _device_facts(job: Job) -> dict:
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    meter = job.clock.meter
    energy = {"energy_method": meter.method} | ({"energy_reason": meter.reason} if meter.reason else {})
    precision = {"dtype": str(job.dtype), "precision_ratio": job.precision.ratio}
    return {"device": name, "ranks": job.ranks.size, **precision, "threads": torch.get_num_threads()} | energy


class _torch_settings:  # noqa: N801 (used like a function)
    """Sets the run's thread count, and restores the caller's thread count and random state on exit."""

    def __init__(self, run: RunConfig) -> None:
        self._threads = run.training.threads

    def __enter__(self) -> None:
        self._threads_before, self._rng_before = torch.get_num_threads(), rng_state()
        if self._threads:
            torch.set_num_threads(self._threads)

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._threads_before)
        set_rng_state(self._rng_before)
