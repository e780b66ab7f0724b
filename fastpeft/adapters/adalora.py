"""AdaLoRA (Zhang et al., arXiv:2303.10512): B diag(E) A, whose least important singular triplets are pruned.

The layers, the cubic decay of the rank budget and the ranking are PEFT's. PEFT's schedule needs a total number of
steps, which a training budget in seconds or joules does not give. Here the step is the spent share of the training
budget times `virtual_steps`. If several prunings fall between two real steps, only the last is carried out. The running
means of PEFT's allocator are views of two flat buffers, so that a step updates all matrices in a few operations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors.torch import save_file

from fastpeft.adapters.adapter import NOT_SAVED, Importance, head_parameters, read_weights
from fastpeft.adapters.flat import FlatParameters
from fastpeft.adapters.lora import Lora
from fastpeft.config.methods import AdaLoraConfig, AdapterConfig
from fastpeft.models.backbone import Backbone
from fastpeft.models.inject import ADAPTER_NAME, SvdBlock, in_order, inject_adalora
from fastpeft.signals import Rates, Signals


class AdaLora(Lora):
    svd_blocks: Sequence[SvdBlock]
    """The blocks; each has A, B and E."""

    def __init__(self, config: AdapterConfig, own: AdaLoraConfig, backbone: Backbone) -> None:
        self.config = own
        self.model, self.svd_blocks = inject_adalora(backbone, config, own)
        self.blocks = self.matrices = self.svd_blocks
        self.flat = FlatParameters(self.svd_blocks, head_parameters(self.model))
        self._inner = self.model.get_base_model()
        settings = self.model.peft_config[ADAPTER_NAME]
        assert isinstance(settings, peft.AdaLoraConfig)
        self._settings = settings
        self._allocator = cast(Any, self.model.base_model).rankallocator
        self._sensitivity = torch.zeros_like(self.flat.adapter)
        self._deviation = torch.zeros_like(self.flat.adapter)
        for name, parameter in self._inner.named_parameters():
            if ".lora_" in name:
                start = parameter.data.storage_offset()
                part = slice(start, start + parameter.numel())
                self._allocator.exp_avg_ipt[name] = self._sensitivity[part].view(parameter.shape)
                self._allocator.exp_avg_unc[name] = self._deviation[part].view(parameter.shape)
        self._pruned_until = 0
        self._kept_E = torch.ones_like(self._singular_values, dtype=torch.bool)

    @property
    def _singular_values(self) -> torch.Tensor:
        """View of the E of all matrices, concatenated."""
        return self.flat.data[self.flat.num_factors : self.flat.num_adapter]

    @property
    def _total_steps(self) -> int:
        """Total number of virtual steps."""
        total = self._settings.total_step
        assert total is not None
        return total

    def ranks(self) -> list[int]:
        """Number of unpruned ranks of each matrix. Synchronizes with the device."""
        return self._kept_E.view(len(self.svd_blocks), -1).sum(1).tolist()

    # ---- the step --------------------------------------------------------------------------

    def after_backward(self, signals: Signals, progress: float) -> None:
        """Add the gradient of the mean of ||A A^T - I||_F and ||B^T B - I||_F over all A and B (paper, eq. 4).

        The norms are not squared: that is PEFT's form.
        """
        weight = self.config.orthogonality / (2 * len(self.svd_blocks))
        total = torch.zeros((), device=self.flat.data.device)
        square = torch.zeros_like(total)
        for group in self.flat.groups:
            for rows_KRN, grad_KRN in (
                (group.a_KRI, group.grad_a_KRI),
                (group.b_KOR.mT, group.grad_b_KOR.mT),
            ):
                gram_KRR = rows_KRN @ rows_KRN.mT
                gram_KRR.diagonal(dim1=1, dim2=2).sub_(1)
                norm_K = gram_KRR.flatten(1).norm(dim=1)
                step_KRN = (gram_KRR @ rows_KRN) * (2 * weight / norm_K.clamp_min(1e-12))[:, None, None]
                grad_KRN.add_(step_KRN)
                total += norm_K.sum()
                square += step_KRN.square().sum()
        signals.penalty = total * weight
        signals.penalty_share = square.sqrt() / self.flat.adapter_grad.norm().clamp_min(1e-30)

    def after_step(self, signals: Signals, rates: Rates, progress: float) -> None:
        """Measure importances, and prune when it is due. After the last pruning, keep the pruned values at zero."""
        settings = self._settings
        step = min(self._total_steps, round(progress * self._total_steps) + 1)
        last = self._total_steps - settings.tfinal
        if step < last:
            assert signals.skipped is not None
            self._measure(signals.skipped)
        due = self._pruning_steps(self._pruned_until, min(step, last))
        if due and not bool(self._sensitivity.any()):
            return  # every step so far was skipped: without importances all ranks would be pruned
        if due:
            self._pruned_until = due[-1]
            budget, _ = self._allocator.budget_schedule(due[-1])
            pattern = self._allocator.mask_to_budget(self._inner, budget)
            kept = [pattern[f"{block.name}.lora_E.{ADAPTER_NAME}"] for block in self.svd_blocks]
            self._kept_E = torch.tensor(kept, device=self._kept_E.device).flatten()
            self.importance_version += 1
        elif self._pruned_until == last:
            self._singular_values.mul_(self._kept_E)

    def host_work(self) -> str | None:
        return "which ranks are pruned, and when, is decided on the host"

    def _measure(self, skipped: torch.Tensor) -> None:
        """Sensitivity |w dL/dw| of every weight, smoothed, and its smoothed deviation (paper, eq. 8 to 10)."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        importance = (self.flat.adapter * self.flat.adapter_grad).abs()
        sensitivity = beta1 * self._sensitivity + (1 - beta1) * importance
        deviation = beta2 * self._deviation + (1 - beta2) * (importance - sensitivity).abs()
        is_kept = skipped == 0
        self._sensitivity.copy_(torch.where(is_kept, sensitivity, self._sensitivity))
        self._deviation.copy_(torch.where(is_kept, deviation, self._deviation))

    def _pruning_steps(self, after: int, until: int) -> list[int]:
        """Virtual steps in (after, until] at which PEFT prunes."""
        settings = self._settings
        last = self._total_steps - settings.tfinal
        return [
            step
            for step in range(max(after, settings.tinit) + 1, until + 1)
            if step == last or (step < last and step % settings.deltaT == 0)
        ]

    # ---- results ---------------------------------------------------------------------------

    def importance(self) -> Importance | None:
        """Sensitivities are those of each matrix's singular values; weights are its share of the unpruned ranks."""
        ranks = self.ranks()
        values = self._sensitivity[self.flat.num_factors :].view(len(self.svd_blocks), -1).sum(1)
        return Importance(
            names=[block.name for block in self.svd_blocks],
            layer=[block.layer for block in self.svd_blocks],
            projection=[block.projection for block in self.svd_blocks],
            sensitivity=values.tolist(),
            weights=[rank / sum(ranks) for rank in ranks],
            ranks=ranks,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "sensitivity": self._sensitivity,
            "deviation": self._deviation,
            "kept": self._kept_E,
            "pruned_until": self._pruned_until,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sensitivity.copy_(state["sensitivity"])
        self._deviation.copy_(state["deviation"])
        self._kept_E.copy_(state["kept"])
        self._pruned_until = state["pruned_until"]
        self.importance_version = int(not bool(self._kept_E.all()))

    def save(self, folder: Path) -> None:
        """Write plain LoRA at one rank, the largest unpruned one; adalora/ gets PEFT's AdaLoRA format with lora_E."""
        live_KR = (self._singular_values != 0).view(len(self.svd_blocks), -1)
        live_KR[live_KR.sum(1) == 0, 0] = True  # PEFT takes no matrix of rank 0
        rank = int(live_KR.sum(1).max())
        state = {
            name: tensor
            for name, tensor in peft.get_peft_model_state_dict(self.model, save_embedding_layers=False).items()
            if ".lora_" not in name
        }
        for block, live_R in zip(self.svd_blocks, live_KR):
            num_live = int(live_R.sum())
            lora_a = block.lora_a.new_zeros(rank, block.lora_a.shape[1])
            lora_b = block.lora_b.new_zeros(block.lora_b.shape[0], rank)
            lora_a[:num_live] = (block.lora_a * block.lora_e).detach()[live_R]
            lora_b[:, :num_live] = block.lora_b.detach()[:, live_R]
            state |= {f"base_model.model.{block.name}.lora_{k}.weight": v for k, v in (("A", lora_a), ("B", lora_b))}
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in state.items()}, folder / _WEIGHTS)
        self._plain_config(rank).save_pretrained(str(folder))
        self._save_native(folder / "adalora", live_KR)

    def load(self, folder: Path) -> None:
        """Read PEFT's AdaLoRA format, which omits pruned ranks."""
        stored = read_weights(folder / "adalora")
        own = json.loads((folder / "adalora" / "adapter_config.json").read_text()).get("rank_pattern") or {}
        self.flat.adapter.zero_()
        for block in self.svd_blocks:
            live_R = torch.tensor(own.get(f"{block.name}.lora_E", [True] * block.lora_a.shape[0]))
            live_R = live_R.to(block.lora_a.device)
            a, b, e = (stored[f"base_model.model.{block.name}.lora_{k}"].to(block.lora_a) for k in "ABE")
            block.lora_a.data[live_R], block.lora_b.data[:, live_R], block.lora_e.data[live_R] = a, b, e
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.data.copy_(stored[NOT_SAVED.sub("", name)])

    def _plain_config(self, rank: int) -> peft.LoraConfig:
        own = self._settings
        shared = ("task_type", "target_modules", "modules_to_save", "trainable_token_indices", "lora_dropout")
        values: dict[str, Any] = {key: getattr(own, key) for key in (*shared, "base_model_name_or_path")}
        values["lora_alpha"] = rank * self.svd_blocks[0].scale  # annotated as int, but PEFT accepts any number
        return in_order(peft.LoraConfig(r=rank, inference_mode=True, **values))

    def _save_native(self, folder: Path, live_KR: torch.Tensor) -> None:
        if self.importance_version:
            rows = live_KR.tolist()
            self._settings.rank_pattern = {f"{block.name}.lora_E": row for block, row in zip(self.svd_blocks, rows)}
        self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        self._settings.rank_pattern = None

    def describe(self) -> list[str]:
        goal = f"AdaLoRA: rank {self.config.initial_rank} pruned to a mean of {self.config.target_rank}"
        return [*super().describe(), goal]


_WEIGHTS = "adapter_model.safetensors"
