"""SAT-LoRA: matrices of one shape share a dictionary of rank-one atoms, of which each token uses the top r.

    y = W x + (alpha / r) sum_{j in top-r of V x} T[l, j] (v_j . x) u_j

U (M x out) and V (M x in) are quantised to 8 bits, in training and in the file. T is a learned table, layers x atoms.
The papers that compare with SAT-LoRA give no definition. This is the project's reconstruction. It is trained separately
for each architecture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import nn

from fastpeft.adapters.adapter import Adapter
from fastpeft.adapters.blocks import ParameterBlock
from fastpeft.adapters.flat import FlatParameters
from fastpeft.adapters.routed import Route, RoutedHost
from fastpeft.adapters.unihyperlora.attach import COUNTED_TOKENS
from fastpeft.adapters.unihyperlora.cost import host_flops
from fastpeft.adapters.unihyperlora.heads import head_of, load_head, refuse_new_tokens, save_head
from fastpeft.adapters.unihyperlora.quantise import dequantise, quantise, straight_through
from fastpeft.adapters.unihyperlora.sites import Site, find_sites
from fastpeft.config.methods import AdapterConfig, SatLoraConfig
from fastpeft.errors import UserError
from fastpeft.kernels import gather_atoms, route_atoms
from fastpeft.models.backbone import Backbone

NAME = "sat_lora"
FILE = f"{NAME}.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Folded:
    v: dict[str, torch.Tensor]
    """(M, in), by the key of the dictionary."""
    u: Sequence[torch.Tensor]
    """(M, out) of each site, multiplied by the site's gains."""


class SatHost(RoutedHost[Folded]):
    def __init__(self, backbone: Backbone, adapter: SatLora) -> None:
        names = [site.name for site in adapter.sites]
        super().__init__(backbone.model, names, backbone.entry_points)
        self._adapter = adapter

    def fold(self) -> Folded:
        adapter = self._adapter
        v = {key: straight_through(p, 8) for key, p in adapter.v.items()}
        u = {key: straight_through(p, 8) for key, p in adapter.u.items()}
        gains_SM = adapter.gains() * adapter.scale
        return Folded(v, [gains_SM[i, :, None] * u[key] for i, key in enumerate(adapter.keys)])

    def reader(self, folded: Folded, place: int) -> torch.Tensor:
        return folded.v[self._adapter.keys[place]]

    def route(self, folded: Folded, place: int, x_TI: torch.Tensor, weight_T: torch.Tensor | None) -> Route:
        v_MI = self.reader(folded, place)
        one = v_MI.new_ones(len(v_MI))
        return Route(
            *route_atoms(x_TI.to(v_MI.dtype), v_MI, one, torch.zeros_like(one), self._adapter.top_k, gated=False)
        )

    def add(self, folded: Folded, place: int, route: Route, y_TO: torch.Tensor) -> None:
        y_TO.add_(gather_atoms(route.c_TK, route.index_TK, folded.u[place]).to(y_TO.dtype))


class SatLora(Adapter):
    export_format = NAME
    routes = True
    weight_files = FILE
    label = "SAT-LoRA"

    def __init__(self, config: AdapterConfig, own: SatLoraConfig, backbone: Backbone) -> None:
        refuse_new_tokens(backbone)
        if config.rank > own.num_atoms:
            raise UserError(
                f"adapter.rank {config.rank}: is the number of atoms that a token uses, and there are "
                f"sat_lora.num_atoms {own.num_atoms}"
            )
        self.model, self.config, self.top_k = backbone.model, own, config.rank
        self.scale = config.alpha / config.rank
        self.sites = find_sites(self.model, backbone.head, config.target_modules, backbone.notes)
        self._device = next(self.model.parameters()).device
        self.keys = [self._key(site) for site in self.sites]
        self.u: dict[str, nn.Parameter] = {}
        self.v: dict[str, nn.Parameter] = {}
        for key, site in dict(zip(self.keys, self.sites)).items():
            self.u[key] = self._drawn(own.num_atoms, site.num_out, config.rank**-0.5)
            self.v[key] = self._drawn(own.num_atoms, site.num_in, site.num_in**-0.5)
        self.mixing = self._make_mixing()
        self._head = head_of(self.model, backbone.head)
        self.blocks = [
            *(ParameterBlock(f"{NAME}.{key}", 0, key, (self.u[key], self.v[key]), "atoms") for key in self.u),
            ParameterBlock(f"{NAME}.mixing", 0, "mixing", tuple(self.mixing.values()), "mixing"),
        ]
        self.flat = FlatParameters(self.blocks, self._head.values())
        self.host = SatHost(backbone, self)
        self.adapter_bytes = len(self._encoded())
        self.overhead = self._extra_flops() / host_flops(self.model, COUNTED_TOKENS)
        self._check_budgets()

    @classmethod
    def build(cls, config: AdapterConfig, own: SatLoraConfig, backbone: Backbone) -> Self:
        return cls(config, own, backbone)

    def _key(self, site: Site) -> str:
        """Key of the dictionary whose atoms a site uses."""
        shape = f"{site.num_out}x{site.num_in}"
        return shape if self.config.share_across_layers else site.name.replace(".", "_")

    def _drawn(self, num_atoms: int, width: int, std: float) -> nn.Parameter:
        return nn.Parameter((torch.randn(num_atoms, width) * std).to(self._device))

    def _make_mixing(self) -> dict[str, nn.Parameter]:
        """Parameters of the gains. The initial gains are 0."""
        return {"table": nn.Parameter(torch.zeros(len(self.sites), self.config.num_atoms, device=self._device))}

    def gains(self) -> torch.Tensor:
        """Gains, (sites, M)."""
        return straight_through(self.mixing["table"], 8)

    def _extra_flops(self) -> int:
        """FLOPs per token of the update, computed as dense products over all atoms."""
        inputs = {(s.layer, s.reads, key): s.num_in for s, key in zip(self.sites, self.keys)}
        return 2 * self.config.num_atoms * (sum(inputs.values()) + sum(site.num_out for site in self.sites))

    def _check_budgets(self) -> None:
        own = self.config
        if self.adapter_bytes > own.max_mb * 2**20:
            raise UserError(
                f"the adapter's file has {self.adapter_bytes / 2**20:.1f} MB, over sat_lora.max_mb {own.max_mb:g}: "
                "take fewer atoms (sat_lora.num_atoms), share_across_layers=on, or a larger limit"
            )
        if self.overhead > own.max_extra_flops:
            raise UserError(
                f"the adapter adds {self.overhead:.1%} to the model's FLOPs, over sat_lora.max_extra_flops "
                f"{own.max_extra_flops:g}: take fewer atoms (sat_lora.num_atoms), or a larger limit"
            )

    # ---- what is kept ------------------------------------------------------------------------

    @property
    def adapted(self) -> list[str]:
        return [site.name for site in self.sites]

    def facts(self) -> dict[str, float]:
        return {
            "extra_flops": self.overhead,
            "active_atoms": float(self.top_k),
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = {f"u.{key}": p for key, p in self.u.items()} | {f"v.{key}": p for key, p in self.v.items()}
        return named | {f"mixing.{name}": p for name, p in self.mixing.items()}

    def _encoded(self) -> bytes:
        tensors = {}
        for name, parameter in self._parameters().items():
            codes, scale = quantise(parameter.detach().cpu(), 8)
            tensors |= {name: codes, f"{name}.scale": scale}
        header = {
            "format": FORMAT,
            "method": self.label,
            "sites": self.adapted,
            "top_k": self.top_k,
            "scale": self.scale,
        }
        return serialise(tensors, metadata={NAME: json.dumps(header)})

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(self._encoded())
        save_head(self._head, folder)

    def load(self, folder: Path) -> None:
        """Load the quantised values, which are the ones that were evaluated."""
        stored = load_file(folder / FILE)
        for name, parameter in self._parameters().items():
            parameter.data.copy_(dequantise(stored[name], stored[f"{name}.scale"]))
        load_head(self._head, folder)

    def describe(self) -> list[str]:
        matched = Counter(site.role for site in self.sites)
        kinds = ", ".join(f"{role} x {count}" for role, count in matched.items())
        own, trained = self.config, self.flat.num_adapter
        return [
            f"{self.label} on {len(self.sites)} matrices ({kinds}): {own.num_atoms} atoms in each of {len(self.u)} "
            f"dictionaries: {trained:,} parameters, head {self.flat.data.numel() - trained:,}",
            f"budgets: adapter file {self.adapter_bytes / 2**20:.3f} of {own.max_mb:g} MB; extra FLOPs "
            f"{self.overhead:.1%} of {own.max_extra_flops:.0%} (texts of {COUNTED_TOKENS} tokens); {self.top_k} active "
            "atoms a token",
        ]
