"""UniHyperLoRA as a method: training on a source host, or transfer to another host, where only `delta` is trained.

    L = L_task + lambda_F E[k] + lambda_Q ||delta||^2

E[k], the mean number of active atoms of a token and site, has the gradient of the gates' sigmoids (straight-through).
The gradient goes to the router and to the reading vectors of the atoms; the input of a site is treated as a constant.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch

from fastpeft.adapters.adapter import Adapter
from fastpeft.adapters.blocks import ParameterBlock
from fastpeft.adapters.flat import FlatParameters
from fastpeft.adapters.unihyperlora import file_format
from fastpeft.adapters.unihyperlora.attach import COUNTED_TOKENS, host_facts, overhead, projections
from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Shape
from fastpeft.adapters.unihyperlora.heads import head_of, load_head, refuse_new_tokens, save_head
from fastpeft.adapters.unihyperlora.layer import Host
from fastpeft.adapters.unihyperlora.probe import Codes, make_codes
from fastpeft.adapters.unihyperlora.quantise import straight_through
from fastpeft.adapters.unihyperlora.sites import find_sites
from fastpeft.config.methods import AdapterConfig, UniHyperLoraConfig
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone
from fastpeft.signals import Signals


class UniHyperLora(Adapter):
    export_format = "unihyperlora"
    routes = True
    weight_files = file_format.FILE
    needs_one_rank = "its budget of active atoms is counted over one rank's tokens"

    def __init__(self, config: AdapterConfig, own: UniHyperLoraConfig, backbone: Backbone) -> None:
        refuse_new_tokens(backbone)
        self.model, self.config = backbone.model, own
        self.sites = find_sites(self.model, backbone.head, config.target_modules, backbone.notes)
        device = next(self.model.parameters()).device
        stored = None if own.adapter is None else file_format.decode(Path(own.adapter).expanduser())
        shape = _shape(config, own) if stored is None else stored.shape
        self.dictionary = Dictionary(shape).to(device)
        self.codes: Codes | None = None
        if stored is not None:
            file_format.restore(self.dictionary, stored)
            self.codes = stored.codes
        elif shape.projector == "probe":
            self.codes = make_codes(self.model, backbone.tokenizer, self.sites, shape.width)
        task = shape.tasks.index(own.task) if own.task in shape.tasks else None
        fixed = projections(self.model, backbone.tokenizer, self.sites, shape, self.codes)
        pad = getattr(backbone.tokenizer, "pad_token_id", None)
        self.host = Host(self.model, backbone.entry_points, self.sites, self.dictionary, fixed, task, pad)
        self.facts_of_host = host_facts(self.model, self.sites) if stored is None else stored.host
        self.blocks = self._blocks()
        self.head_modules = list(backbone.head)
        self._head = head_of(self.model, backbone.head)
        self.flat = FlatParameters(self.blocks, self._head.values())
        self._active = torch.zeros(2, dtype=torch.float64, device=device)
        """Sum over steps of the mean number of active atoms per token and site; number of steps."""
        self.adapter_bytes = len(file_format.encode(self.dictionary, self.facts_of_host, self.codes))
        self.overhead = overhead(self.model, self.sites, shape)
        self._check_budgets()

    @classmethod
    def build(cls, config: AdapterConfig, own: UniHyperLoraConfig, backbone: Backbone) -> Self:
        return cls(config, own, backbone)

    def _blocks(self) -> list[ParameterBlock]:
        parts = self.dictionary.parts()
        self.dictionary.requires_grad_(False)
        trained = {"all": tuple(parts), "delta": ("delta",), "none": ()}[self.config.train]
        return [ParameterBlock(f"unihyperlora.{part}", 0, part, parts[part], "unihyperlora") for part in trained]

    def _check_budgets(self) -> None:
        """Raises UserError if file size or FLOPs exceed their limits."""
        own, faults = self.config, []
        if self.adapter_bytes > own.max_mb * 2**20:
            faults.append(
                f"the adapter's file has {self.adapter_bytes / 2**20:.3f} MB, over unihyperlora.max_mb {own.max_mb:g}: "
                "take fewer atoms (unihyperlora.num_atoms)"
            )
        if self.overhead > own.max_extra_flops:
            faults.append(
                f"the adapter adds {self.overhead:.1%} to the model's FLOPs, over unihyperlora.max_extra_flops "
                f"{own.max_extra_flops:g}: take a smaller unihyperlora.width or fewer layers (adapter.target_modules)"
            )
        if faults:
            raise UserError(f"{'; '.join(faults)}. A larger limit lifts it")

    # ---- hooks of the loop -------------------------------------------------------------------

    def discard_pass(self) -> None:
        self.host.count.reset()

    def after_backward(self, signals: Signals, progress: float) -> None:
        """Adds the gradients of lambda_F E[k] and lambda_Q ||delta||^2."""
        count, own = self.host.count, self.config
        norm_before = torch.linalg.vector_norm(self.flat.grad)
        penalty = torch.zeros((), device=self.flat.data.device)
        if count.num_active is not None:
            assert count.num_tokens is not None
            mean = count.num_active / count.num_tokens.clamp_min(1)
            penalty = penalty + own.budget_weight * mean
            self._active += torch.stack([mean.double(), torch.ones_like(mean.double())])
            if own.budget_weight and self.config.train == "all":
                self._backward_budget(own.budget_weight / count.num_tokens.clamp_min(1))
        delta = self.dictionary.mixer.delta
        if own.delta_weight and self.config.train != "none":
            value = straight_through(delta.detach(), 4)
            assert delta.grad is not None
            delta.grad.add_(value, alpha=2 * own.delta_weight)
            penalty = penalty + own.delta_weight * value.square().sum()
        count.reset()
        signals.penalty = penalty.detach()
        norm = torch.linalg.vector_norm(self.flat.grad)
        signals.penalty_share = ((norm - norm_before).abs() / norm.clamp_min(1e-30)).clamp_max(1)

    def _backward_budget(self, factor: torch.Tensor) -> None:
        """Backpropagate the gradient of E[k] from the folded tensors to the parameters."""
        count = self.host.count
        with torch.enable_grad():
            _, v_MQ = self.dictionary.atoms.fold()
            outputs = [v_MQ, self.dictionary.router.slope, self.dictionary.router.bias(self.host.task)]
        found = [count.grad_v, count.grad_slope, count.grad_bias]
        gradients = [torch.zeros_like(y) if g is None else g * factor for y, g in zip(outputs, found)]
        torch.autograd.backward(outputs, gradients)

    # ---- what is kept ------------------------------------------------------------------------

    @property
    def adapted(self) -> list[str]:
        return [site.name for site in self.sites]

    @property
    def active_atoms(self) -> float:
        """Active atoms per token and site, the mean over all steps; NaN before the first. Reads from the device."""
        total, steps = self._active.tolist()
        return total / steps if steps else math.nan

    def facts(self) -> dict[str, float]:
        return {
            "extra_flops": self.overhead,
            "active_atoms": self.active_atoms,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"active": self._active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._active.copy_(state["active"])

    def save(self, folder: Path) -> None:
        (folder / file_format.FILE).write_bytes(file_format.encode(self.dictionary, self.facts_of_host, self.codes))
        save_head(self._head, folder)

    def load(self, folder: Path) -> None:
        """Load the quantised values, which are the ones that were evaluated."""
        file_format.restore(self.dictionary, file_format.decode(folder / file_format.FILE))
        load_head(self._head, folder)

    def describe(self) -> list[str]:
        matched = Counter(site.role for site in self.sites)
        kinds = ", ".join(f"{role} x {count}" for role, count in matched.items())
        shape, trained = self.dictionary.shape, self.flat.num_adapter
        alone = {"delta": ", delta alone is trained", "none": ", the head alone is trained"}
        what = f"projector {shape.projector}{alone.get(self.config.train, '')}"
        source = f", from {self.config.adapter}" if self.config.adapter is not None else ""
        return [
            f"UniHyperLoRA on {len(self.sites)} matrices ({kinds}): {shape.num_atoms} atoms, canonical width "
            f"{shape.width}, {what}{source}: {trained:,} parameters, head {self.flat.data.numel() - trained:,}",
            f"budgets: adapter file {self.adapter_bytes / 2**20:.3f} of {self.config.max_mb:g} MB; extra FLOPs "
            f"{self.overhead:.1%} of {self.config.max_extra_flops:.0%} (texts of {COUNTED_TOKENS} tokens); at most "
            f"{shape.top_k} active atoms a token",
        ]


def _shape(config: AdapterConfig, own: UniHyperLoraConfig) -> Shape:
    return Shape(own.num_atoms, own.atom_width, own.width, own.top_k, own.projector, config.alpha, (own.task,))
