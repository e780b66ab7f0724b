"""Write an export, load it back as a user would, compare, and only then put it where it was asked for."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastpeft._version import __version__
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.export.adapter_files import check_source, reader_notes, write_adapter
from fastpeft.export.card import card_text
from fastpeft.export.exported import Check, Exported, Layout, MetricChange
from fastpeft.export.loading import (
    base_name,
    load_base,
    load_exported,
    load_mlx,
    load_whole,
    save_merged,
    trained_model,
)
from fastpeft.export.plan import CheckError, ExportError, Plan
from fastpeft.export.readers import check_base, check_merged
from fastpeft.export.rope_keys import add_rope_keys
from fastpeft.export.tokenizer_files import save_tokenizer
from fastpeft.export.trained_task import TrainedTask, trained_task
from fastpeft.export.trim import Trimmed, trim_model
from fastpeft.models.backbone import Backbone
from fastpeft.runs.store import read_json, write_json
from fastpeft.tasks import Task
from fastpeft.tasks.base import ExportCheck

TOLERANCE, TOLERANCE_4_BIT = 1e-4, 1e-3
"""Largest difference of a logit, times the largest logit where that is over 1. Sound exports: about 1e-6; a base in 4
bits is multiplied by other code than the weights that it stands for."""

_WORDS = {"id2label": "labels"}
_SNAPSHOT_TRIES, _SNAPSHOT_WAIT_S = 10, 0.2


def export(plan: Plan, say: Callable[[str], None] = lambda _: None) -> Exported:
    """Carry out a plan. The target appears whole, by a rename, or not at all.

    Raises:
        UnavailableError: the base model or the data cannot be had.
        CheckError: what was written answers otherwise than the trained model.
        UserError: weights that cannot be read, a folder that cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _working_folder(plan.target) as work:
        _snapshot(plan.source, work / "source")
        try:
            exported = _build(plan, work / "source", work / "out", device, say)
        except RuntimeError as error:
            if device.type == "cpu" or not is_out_of_memory(error):
                raise
            exported = None
        if exported is None:  # outside of the handler, whose frames hold the model
            say("the GPU has no room for it: once more on the CPU")
            free_memory()
            shutil.rmtree(work / "out", ignore_errors=True)
            exported = _build(plan, work / "source", work / "out", torch.device("cpu"), say)
        with _writing(plan.target):
            (work / "out").rename(plan.target)
    return exported


def _build(plan: Plan, source: Path, out: Path, device: torch.device, say: Callable[[str], None]) -> Exported:
    _check_source(plan, source)
    trained = trained_task(plan, say)
    task, run = trained.task, plan.run
    before = trimmed = metric = layout = None
    if plan.reader is not None and plan.merge:
        check_merged(plan.reader, task.peft_task_type)
    backbone, model = _load_trained(plan, source, out, task, device)
    if plan.reader is not None:
        check_base(plan.reader, backbone.model.config.to_dict())
    rows, num_scored = trained.export_check(backbone), trained.num_scored(run.evaluation.max_examples)
    eos_token_ids, fitting = backbone.eos_token_ids, backbone.fitting
    if plan.trim is not None:
        if trained.has_rows:
            say(f"measuring {rows.metric} before trimming")
            before = rows.score(model, device)
        else:
            say("what trimming costs is not measured: that takes the run's own validation rows")
        trimmed = trim_model(model, plan.trim)
    wanted = rows.answers(model, backbone.tokenizer, device)
    if not plan.full:
        with _writing(plan.target):
            layout = _write_weights(plan, model, backbone, source, out, trimmed)
    del model, backbone
    loaded, tokenizer = _load(plan, out, task, fitting, device)
    check = _compare(plan, rows, wanted, rows.answers(loaded, tokenizer, device))
    if plan.merge:
        _check_settings(plan, loaded, task)
    if before is not None:
        say("measuring it after")
        metric = MetricChange(rows.metric, before, rows.score(loaded, device), rows.num_validation)
    exported = Exported(
        target=plan.target,
        stand_in=trained.stand_in or (plan.result is not None and plan.result.stand_in),
        check=check,
        mb_before=_megabytes(source),
        mb=_megabytes(out),
        trimmed=trimmed,
        metric=metric,
        max_length=rows.max_length,
        num_validation=num_scored,
        fitting=fitting,
        layout=layout,
        notes=reader_notes(plan),
    )
    with _writing(plan.target):
        write_json(out / "export.json", _facts(plan, exported, trained))
        card = out / "README.md"
        card.write_text(card_text(plan, exported, task, eos_token_ids), encoding="utf-8")
        for path in out.iterdir():
            shutil.copymode(card, path)  # safetensors writes files that only their owner reads
    return exported


def _check_source(plan: Plan, source: Path) -> None:
    """Refuse what the reader cannot hold before a model is loaded."""
    if plan.reader is None or plan.merge:
        return
    try:
        check_source(plan.reader, source)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            f"{plan.source}: the run's adapter cannot be loaded: {reason}. Export its other weights: --best or --last"
        ) from None


def _load_trained(plan: Plan, source: Path, out: Path, task: Task, device: torch.device) -> tuple[Backbone, nn.Module]:
    """The base and the model on it; of a fully fine-tuned one, which is written to `out`, twice the same."""
    if not plan.full:
        backbone = load_base(plan.run.model, task, device)
        return backbone, trained_model(backbone, source)
    with _writing(plan.target):
        shutil.copytree(source, out)
        _complete_config(out / "config.json", task.model_settings())
    backbone = load_whole(out, task, device)
    with _writing(plan.target):
        save_tokenizer(backbone.tokenizer, out)
    return backbone, backbone.model


def _write_weights(
    plan: Plan, model: nn.Module, backbone: Backbone, source: Path, out: Path, trimmed: Trimmed | None
) -> Layout | None:
    out.mkdir()
    layout = None
    if plan.merge:
        save_merged(model, out)
        _complete_config(out / "config.json")
    else:
        layout = write_adapter(plan, model, source, out, trimmed)
    save_tokenizer(backbone.tokenizer, out)
    return layout


def _load(plan: Plan, out: Path, task: Task, fitting: list[str], device: torch.device) -> tuple[nn.Module, Any]:
    """What was written, as its reader takes it."""
    if plan.reader is not None and plan.reader.own_files and not plan.merge:
        return load_mlx(out, plan.run.model, task, device)
    return load_exported(out, plan.merge, plan.run.model, task, fitting, device)


def _complete_config(path: Path, settings: dict[str, Any] | None = None) -> None:
    """Add to a model's config.json what other readers look for, and what it leaves open of the task's `settings`, such
    as problem_type. What it says stays, and is checked later."""
    config = read_json(path)
    if config is not None:
        settings = {key: value for key, value in (settings or {}).items() if key not in config}
        write_json(path, add_rope_keys(settings | config))


def _compare(plan: Plan, rows: ExportCheck, wanted: torch.Tensor, found: torch.Tensor) -> Check:
    difference = float((wanted - found).abs().max()) if wanted.shape == found.shape else float("inf")
    allowed = TOLERANCE if plan.merge or plan.run.model.quantisation == "none" else TOLERANCE_4_BIT
    tolerance = allowed * max(1.0, float(wanted.abs().max()))
    if not difference <= tolerance:
        raise CheckError(
            f"{plan.source}: loaded from the export, the model's logits differ by up to {difference:.2e} from those of "
            f"the trained one on {len(wanted)} {rows.where}, and {tolerance:.0e} is allowed. Nothing was written. "
            "Is the base model still the one that the run was trained on?"
        )
    same = int((wanted.argmax(-1) == found.argmax(-1)).sum()) if wanted.shape[-1] > 1 else None
    return Check(len(wanted), rows.where, same, difference, tolerance)


def _check_settings(plan: Plan, loaded: nn.Module, task: Task) -> None:
    """That a reader of the merged model's config finds what the task's answers mean."""
    for key, wanted in task.model_settings().items():
        found = getattr(loaded.config, key, None)
        if found != wanted:
            raise CheckError(
                f"{plan.source}: its config says {_WORDS.get(key, key)} {found}, but the data {wanted}. Nothing was "
                "written. Is dataset.path still what the run was trained on?"
            )


def _facts(plan: Plan, exported: Exported, trained: TrainedTask) -> dict[str, Any]:
    """What export.json holds."""
    name, _ = base_name(plan.run.model)
    task = trained.task
    return {
        "run": plan.folder.path.name,
        "method": plan.run.method,
        "weights": plan.weights,
        "run_status": plan.status,
        "merged": plan.merge,
        "for": plan.reader.name if plan.reader else None,
        "layout": asdict(exported.layout) if exported.layout else None,
        "notes": list(exported.notes),
        "base_model": name,
        "revision": plan.run.model.revision,
        "quantisation": plan.run.model.quantisation,
        "dataset": task.name,
        "kind": task.kind,
        **task.facts(),
        "data": trained.noted.data.to_json(),
        "stand_in": exported.stand_in,
        "metric_of_the_run": plan.metric,
        "mb_before": exported.mb_before,
        "mb": exported.mb,
        "check": asdict(exported.check),
        "trim": exported.trimmed.summary() if exported.trimmed else None,
        "metric_by_trimming": asdict(exported.metric) if exported.metric else None,
        "versions": {"fastpeft": __version__}
        | {package: metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20


# ---- folders -------------------------------------------------------------------------------


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """Beside the target, so that a rename moves it; gone afterwards."""
    work = target.absolute().with_name(f".{target.absolute().name}.writing-{os.getpid()}")
    with _writing(target):
        work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _snapshot(source: Path, copy: Path) -> None:
    """A copy that no running trainer replaces. It does so by a rename, so the folder may be away for a moment."""
    reason: OSError | None = None
    for attempt in range(_SNAPSHOT_TRIES):
        try:
            shutil.copytree(source, copy)
            return
        except (OSError, shutil.Error) as error:
            shutil.rmtree(copy, ignore_errors=True)
            reason = error
            if attempt + 1 < _SNAPSHOT_TRIES:
                time.sleep(_SNAPSHOT_WAIT_S)
    raise ExportError(f"{source} cannot be copied: {reason}")
