"""Continue a run: open its folder, refuse other settings and other data, find its newest valid checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from fastpeft.config import RunConfig, apply_stand_in, load_run, run_values
from fastpeft.config.trackers import TRACKERS
from fastpeft.errors import UserError
from fastpeft.models.precision import DTYPES, Precision
from fastpeft.runs.store import Result, RunError, RunFolder, read_json
from fastpeft.tasks.trained_on import TrainedOn, changed_since
from fastpeft.trainer.checkpoint_files import Checkpoint, newest_checkpoint
from fastpeft.trainer.resolve import Resolved, resolve


def open_run(folder: RunFolder, name: str | None) -> tuple[Result | None, RunConfig]:
    """Lock a run's folder to resume it. Returns its result if it is finished, and its stored run."""
    if name is None:
        raise RunError("--resume needs --name: which run is to be continued?")
    if not folder.config.is_file():
        raise RunError(f"--resume: there is no run {folder.path}")
    folder.check_links()
    folder.lock()
    result = folder.read_result()
    return result if result and result.status == "done" else None, load_run(folder.config)


def same_run(folder: RunFolder, stored: RunConfig, run: RunConfig | None, allow_stand_in: bool) -> Resolved:
    """The stored run, with the settings of `run` that a resume may change. Raises UserError if others differ."""
    if run is not None:
        _refuse(folder, _differing(stored, resolve(run, allow_stand_in).run))
        training = dataclasses.replace(stored.training, shard_base=run.training.shard_base)
        trackers = {key: getattr(run, key) for key in TRACKERS.section_keys}
        stored = dataclasses.replace(stored, training=training, **trackers)
    return resolve(stored, allow_stand_in)


def check_same(folder: RunFolder, stored: RunConfig, run: RunConfig) -> None:
    """The check of `same_run` without contacting the hub: the stored run may be `run` or its stand-in."""
    asked = [run] if run.stand_in is None else [run, apply_stand_in(run)]
    _refuse(folder, min((_differing(stored, one) for one in asked), key=len))


def _differing(stored: RunConfig, run: RunConfig) -> list[str]:
    """Settings that differ. Trackers and the sharding of the base change no weight, so a resume may change them."""
    free = ("overrides", "stand_in", *TRACKERS.section_keys)
    asked, kept = (dict(_leaves(run_values(r))) for r in (run, stored))
    return [
        f"{key}: {kept.get(key)!r} was stored, {asked.get(key)!r} is asked for"
        for key in sorted(asked.keys() | kept.keys())
        if key.split(".")[0] not in free and key != "training.shard_base" and asked.get(key) != kept.get(key)
    ]


def _refuse(folder: RunFolder, differing: list[str]) -> None:
    if differing:
        raise UserError(
            f"{folder.path} was started with other settings; resume without them, or start a new run. "
            + "; ".join(differing)
        )


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every setting that is not a section."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def find_checkpoint(folder: RunFolder, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint. Changes nothing.

    Raises:
        CheckpointError: the checkpoint is of another version.
    """
    checkpoint, skipped = newest_checkpoint(folder.checkpoints)
    for fault in skipped:
        say(f"checkpoint passed over: {fault}")
    if checkpoint is None:
        say(f"{folder.path} has no valid checkpoint: starting over")
    else:
        say(f"resuming {folder.path} after step {checkpoint.step:,}")
    return checkpoint


def check_same_data(folder: RunFolder, now: TrainedOn, checkpoint: Checkpoint | None) -> list[str]:
    """Check that the data are unchanged. Returns a note if the run was begun by a version that stored no hash.

    Raises:
        UserError: the data are not those that the run began with.
    """
    found = changed_since(folder, now)
    if found:
        raise UserError(
            f"{folder.path}: the data are not those that the run was begun with: {'; '.join(found)}. Put back the data "
            "as they were and resume, or begin anew with another --name"
        )
    if checkpoint is not None and TrainedOn.read(folder.path) is None:
        return ["the run does not say which data it was begun with: whether these are the same, nobody can tell"]
    return []


def cut_events(folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Truncate the event log to its size at the checkpoint; without a checkpoint, to nothing."""
    if folder.events.exists():
        size = folder.events.stat().st_size
        with folder.events.open("r+b") as file:
            file.truncate(min(size, checkpoint.events_bytes if checkpoint else 0))


def began_in(folder: RunFolder, checkpoint: Checkpoint | None) -> Precision | None:
    """The precision that the run began in, so that it continues bit for bit; None if it starts over."""
    if checkpoint is None:
        return None
    dtype = next(dtype for dtype in DTYPES.values() if str(dtype) == checkpoint.parts["loop"]["dtype"])
    return Precision(dtype, ratio=(read_json(folder.environment) or {}).get("precision_ratio"))
