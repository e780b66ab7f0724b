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
from safetensors.torch import load_file, save_file
from torch import nn

from fastpeft._version import __version__
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.export.card import card_text
from fastpeft.export.exported import Check, Exported, MetricChange
from fastpeft.export.loading import base_name, load_base, load_exported, load_whole, save_merged, trained_model
from fastpeft.export.plan import CheckError, ExportError, Plan
from fastpeft.export.trained_task import TrainedTask, trained_task
from fastpeft.export.trim import Trimmed, trim_model, trimmed_config
from fastpeft.models.backbone import Backbone
from fastpeft.runs.store import read_json, write_json
from fastpeft.tasks import Task
from fastpeft.tasks.base import ExportCheck

TOLERANCE, TOLERANCE_4_BIT = 1e-4, 1e-3
"""Largest difference of a logit, times the largest logit where that is over 1. Sound exports: about 1e-6; a base in 4
bits is multiplied by other code than the weights that it stands for."""

_WORDS = {"id2label": "labels"}
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
    trained = trained_task(plan, say)
    task, run = trained.task, plan.run
    before = trimmed = metric = None
    if plan.full:
        with _writing(plan.target):
            shutil.copytree(source, out)
            _complete_config(out / "config.json", task)
        backbone = load_whole(out, task, device)
        model = backbone.model
    else:
        backbone = load_base(run.model, task, device)
        model = trained_model(backbone, source)
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
            _write_weights(plan, model, backbone, source, out, trimmed)
    del model, backbone
    loaded, tokenizer = load_exported(out, plan.merge, run.model, task, fitting, device)
    check = _compare(plan, rows, wanted, rows.answers(loaded, tokenizer, device))
    if plan.merge:
        _check_settings(plan, loaded, task)
    if before is not None:
        say("measuring it after")
        metric = MetricChange(rows.metric, before, rows.score(loaded, device), rows.num_validation)
    stand_in = trained.stand_in or (plan.result is not None and plan.result.stand_in)
    sizes = _megabytes(source), _megabytes(out)
    exported = Exported(plan.target, stand_in, check, *sizes, trimmed, metric, rows.max_length, num_scored, fitting)
    with _writing(plan.target):
        write_json(out / "export.json", _facts(plan, exported, trained))
        card = out / "README.md"
        card.write_text(card_text(plan, exported, task, eos_token_ids), encoding="utf-8")
        for path in out.iterdir():
            shutil.copymode(card, path)  # safetensors writes files that only their owner reads
    return exported


def _write_weights(
    plan: Plan, model: nn.Module, backbone: Backbone, source: Path, out: Path, trimmed: Trimmed | None
) -> None:
    out.mkdir()
    if plan.merge:
        save_merged(model, out)
    else:
        name, on_hub = base_name(plan.run.model)
        config = read_json(source / _CONFIG)
        assert config is not None
        config |= {
            "base_model_name_or_path": name,
            "revision": plan.run.model.revision if on_hub else None,
            "modules_to_save": list(dict.fromkeys(config["modules_to_save"] or ())) or None,
        }
        if trimmed is None:
            shutil.copyfile(source / _WEIGHTS, out / _WEIGHTS)
        else:
            config = trimmed_config(config, trimmed)
            tensors = load_file(source / _WEIGHTS)
            for module, cut in trimmed.factors.items():
                tensors[f"base_model.model.{module}.lora_A.weight"] = cut.a_KI.float().contiguous()
                tensors[f"base_model.model.{module}.lora_B.weight"] = cut.b_OK.float().contiguous()
            save_file(tensors, out / _WEIGHTS, metadata={"format": "pt"})
        write_json(out / _CONFIG, config)
    backbone.tokenizer.save_pretrained(str(out))


def _complete_config(path: Path, task: Task) -> None:
    """Add what a trained model's config leaves open, such as problem_type; what it says is checked later."""
    config = read_json(path)
    if config is not None:
        write_json(path, {key: value for key, value in task.model_settings().items() if key not in config} | config)


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
