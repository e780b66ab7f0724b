"""A UniHyperLoRA adapter as plain LoRA, approximately: its update under mean gates, cut to a rank by SVD.

Which atoms a token uses depends on the token, so that no single matrix is the update. With each atom's mean gate over
training rows in place of its gate, the update of a site is

    alpha Phi_out (sum_j p_j g_j u_j v_j^T) Phi_in^T,

of rank Q at most. What that costs is measured on the validation rows and said.

Shape suffixes: O out, I in, Q canonical width, M atoms, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import peft
import torch

from fastpeft.adapters.unihyperlora.method import UniHyperLora
from fastpeft.data.batches import micro_batches
from fastpeft.export.loading import base_name
from fastpeft.export.plan import ExportError, Plan
from fastpeft.models.backbone import quiet_transformers
from fastpeft.runs.store import read_json, replaced_folder, write_json
from fastpeft.trainer.build import Job, build_job

NUM_ROWS = 512
"""Training rows that the gates' means are taken over."""
CARD = "README.md"


@dataclass(frozen=True)
class Approximated:
    target: Path
    rank: int
    metric: str
    before: float
    after: float
    num_rows: int
    """Validation rows that both are of."""
    lost: float
    """Share of the mean update's energy that the rank leaves out, the largest of a site."""
    offset: bool
    """The projector has an offset, whose constant part no LoRA has."""


def approximate(plan: Plan, rank: int, say: Callable[[str], None] = lambda text: None) -> Approximated:
    """Write a PEFT LoRA of `rank` to the plan's target.

    Raises:
        ExportError: a method other than unihyperlora; a rank over the canonical width.
    """
    if plan.run.method != "unihyperlora":
        raise ExportError(f"--approximate: is for method unihyperlora, and this run is of {plan.run.method}")
    with quiet_transformers():
        job = build_job(plan.run)
        adapter = cast(UniHyperLora, job.adapter)
        width = adapter.dictionary.shape.width
        if not 1 <= rank <= width:
            raise ExportError(f"--approximate {rank}: the mean update has rank {width} at most; give 1 to {width}")
        adapter.load(plan.source)
        say(f"scoring the adapter on {len(job.task.validation):,} validation rows")
        before = _score(job, adapter.model)
        gates = mean_gates(job)
        factors, lost = {}, 0.0
        for place, site in enumerate(adapter.sites):
            a_RI, b_OR, share = factors_of(adapter, place, gates[place], rank)
            factors[site.name], lost = (a_RI, b_OR), max(lost, share)
        adapter.host.detach()
        model = _as_lora(job, adapter, factors, rank)
        say("scoring the approximation")
        after = _score(job, model)
        has_offset = any(one.offset is not None for one in adapter.host.fixed.values())
        found = Approximated(
            plan.target, rank, job.task.metric, before, after, len(job.task.validation), lost, has_offset
        )
        with replaced_folder(plan.target) as folder:
            model.save_pretrained(str(folder), save_embedding_layers=False)
            _name_base(plan, folder)
            (folder / CARD).write_text(card(plan, found))
    return found


def _score(job: Job, model: torch.nn.Module) -> float:
    found = job.task.evaluate(model, job.limits, lambda: False, None)
    assert found is not None
    return found.value


@torch.no_grad()
def mean_gates(job: Job) -> torch.Tensor:
    """Of each site, how often a token uses each atom: (sites, M)."""
    adapter = cast(UniHyperLora, job.adapter)
    total = len(job.task.train)
    rows = np.unique(np.linspace(0, total - 1, min(NUM_ROWS, total)).astype(np.int64))
    adapter.model.eval()
    with adapter.host.watching() as usage:
        for part in micro_batches(job.task.train, rows, job.limits.training):
            adapter.model(**job.task.collate(part, job.device).inputs)
    return usage.means()


@torch.no_grad()
def factors_of(
    adapter: UniHyperLora, place: int, gate_M: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (R x I) and B (O x R) of a site's mean update, and the share of its energy that is left out."""
    folded = adapter.host.fold()
    phi_in, phi_out = adapter.host.projections(folded, place)
    inner_QQ = (folded.gain_u[place] * gate_M[:, None]).t() @ folded.v_MQ
    q_out, r_out = torch.linalg.qr(phi_out.double())
    q_in, r_in = torch.linalg.qr(phi_in.double())
    left, values, right = torch.linalg.svd(r_out @ inner_QQ.double() @ r_in.t())
    energy = values.square()
    lost = float(energy[rank:].sum() / energy.sum().clamp_min(1e-300))
    root = values[:rank].sqrt()
    return ((right[:rank] * root[:, None]) @ q_in.t()).float(), (q_out @ (left[:, :rank] * root)).float(), lost


def _as_lora(
    job: Job, adapter: UniHyperLora, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int
) -> peft.PeftModel:
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        modules_to_save=adapter.head_modules or None,
        task_type=peft.TaskType(job.task.peft_task_type),
    )
    model = peft.get_peft_model(cast("peft.PeftModel", adapter.model), config)
    base = model.get_base_model()
    for name, (a_RI, b_OR) in factors.items():
        layer = base.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a_RI)  # type: ignore[index, operator]
        layer.lora_B["default"].weight.data.copy_(b_OR)  # type: ignore[index, operator]
    return model.eval()


def _name_base(plan: Plan, folder: Path) -> None:
    """A base that is found from any folder."""
    name, on_hub = base_name(plan.run.model)
    config = read_json(folder / "adapter_config.json")
    assert config is not None
    revision = plan.run.model.revision if on_hub else None
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": name, "revision": revision})


def card(plan: Plan, found: Approximated) -> str:
    """Which host, how, and what it cost."""
    name, _ = base_name(plan.run.model)
    offset = " The constant part of the probe projector is left out." if found.offset else ""
    return (
        f"# {plan.run.run_id}, approximated\n\n"
        f"A PEFT LoRA of rank {found.rank} for {name}. It stands for a UniHyperLoRA adapter, whose update depends\n"
        "on the token: each atom's gate is replaced by its mean over training rows, and the rank is cut by SVD,\n"
        f"which leaves out {found.lost:.2%} of a matrix's energy at most.{offset}\n\n"
        f"{found.metric} on {found.num_rows:,} validation rows: {found.before:.4f} before, {found.after:.4f} after.\n\n"
        "The exact adapter is the run's own file, which goes onto any supported host:\n\n"
        "```python\nimport fastpeft\n\n"
        f'fastpeft.load_adapter(model, "{plan.source}")\n```\n'
    )
