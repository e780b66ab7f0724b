"""Hosts of any width and depth with a dictionary of atoms in them, and what the equations say of them, term by term."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Shape
from fastpeft.adapters.unihyperlora.layer import Host
from fastpeft.adapters.unihyperlora.mixer import conditions
from fastpeft.adapters.unihyperlora.projectors import Fixed
from fastpeft.adapters.unihyperlora.quantise import straight_through
from fastpeft.adapters.unihyperlora.sites import Site, find_sites
from tests.support.tiny import classifier_model

SMALL = Shape(num_atoms=12, atom_width=20, width=5, alpha=3.0, tasks=("one", "two"))


def host_model(width: int = 32, layers: int = 2, seed: int = 0, family: str = "bert") -> Any:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": width + width // 2}
    return classifier_model(family, seed, **sizes).eval()


def sites_of(model: nn.Module) -> list[Site]:
    return find_sites(model, ["classifier"], "all-linear", [])


def dictionary(shape: Shape = SMALL, seed: int = 0, trained: bool = True) -> Dictionary:
    """With gains as training leaves them, and not 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Dictionary(shape)
        if trained:
            with torch.no_grad():
                made.mixer.second.normal_(std=0.3)
                made.mixer.delta.normal_(std=0.3)
                made.router.slope.normal_(1, 0.2)
                made.router.embedding.normal_()
    return made


def put_in(model: nn.Module, made: Dictionary, fixed: dict[str, Fixed] | None = None, task: int | None = 1) -> Host:
    model.requires_grad_(False)
    return Host(model, [model], sites_of(model), made, fixed or {}, task, pad_token=0)


class Literal:
    """y = W x + P_out sum_j g_j a_j u_j (v_j^T P_in x), with P of (d x d0) and one atom after the other, by hooks."""

    def __init__(
        self, model: nn.Module, made: Dictionary, fixed: dict[str, Fixed] | None = None, task: int = 1
    ) -> None:
        self.gates: list[torch.Tensor] = []
        """Of every site with an input of its own (T x K)."""
        model.requires_grad_(False)
        for site in sites_of(model):
            hook = self._hook(site, made, (fixed or {}).get(site.name), task)
            model.get_submodule(site.name).register_forward_hook(hook)

    def _hook(self, site: Site, made: Dictionary, fixed: Fixed | None, task: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            atoms, router, shape = made.atoms, made.router, made.shape
            psi = straight_through(atoms.psi, 8)
            if fixed is None:
                assert made.projector is not None
                p_in, p_out = made.projector(site.num_in) @ psi, made.projector(site.num_out) @ psi
                offset = 0.0
            else:
                p_in, p_out = fixed.phi_in.to(y.dtype) @ psi, fixed.phi_out.to(y.dtype) @ psi
                offset = 0.0 if fixed.offset is None else fixed.offset.to(y.dtype) @ psi
            u, v = straight_through(atoms.u, 8), straight_through(atoms.v, 8)
            z = args[0].reshape(-1, site.num_in) @ p_in + offset
            read = z @ v.t()
            logit = read * router.slope + straight_through(router.keys, 8) @ router.embedding[task]
            gain = made.mixer(conditions([site], y.device).to(y.dtype))[0]
            best = logit.topk(shape.top_k, dim=1).indices
            update, gates = torch.zeros(len(z), shape.atom_width, dtype=y.dtype), []
            for k in range(shape.top_k):
                j = best[:, k]
                own = logit.gather(1, j[:, None])[:, 0]
                soft = own.sigmoid()
                gate = (own > 0).to(y.dtype).detach() + soft - soft.detach()
                gates.append(gate)
                update = update + (gain[j] * gate * read.gather(1, j[:, None])[:, 0])[:, None] * u[j]
            if site.role not in ("key", "value"):  # which read what the query reads
                self.gates.append(torch.stack(gates, 1))
            return y + shape.alpha * (update @ p_out.t()).view_as(y)

        return hook
