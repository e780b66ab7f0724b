"""A host adapted by a dictionary: y = W x + Phi_out sum_k c_k alpha g u_k.

Shape suffixes: T tokens, I in, O out, Q canonical width, K active atoms per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fastpeft.adapters.routed import Route, RoutedHost
from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Folded
from fastpeft.adapters.unihyperlora.mixer import conditions
from fastpeft.adapters.unihyperlora.projectors import Fixed
from fastpeft.adapters.unihyperlora.sites import Site
from fastpeft.kernels import RouterCount, gather_atoms, route_atoms


class Usage:
    """Frequency with which tokens use each of M atoms at each of S sites."""

    def __init__(self, num_sites: int, num_atoms: int, device: torch.device) -> None:
        self._active_SM = torch.zeros(num_sites, num_atoms, device=device)
        self._tokens_S = torch.zeros(num_sites, device=device)

    def see(self, place: int, route: Route) -> None:
        active_TK = (route.c_TK != 0).float()
        if route.weight_T is not None:
            active_TK = active_TK * route.weight_T[:, None]
        self._active_SM[place].index_add_(0, route.index_TK.flatten(), active_TK.flatten())
        self._tokens_S[place] += len(active_TK) if route.weight_T is None else route.weight_T.sum()

    def means(self) -> torch.Tensor:
        """(S, M), fraction of the tokens that use each atom."""
        return self._active_SM / self._tokens_S[:, None].clamp_min(1)


class Host(RoutedHost[Folded]):
    """A host whose sites are adapted by `dictionary`.

    Args:
        fixed: projections by site name; empty for the coordinate projector.
        task: index of the task embedding; None for the mean of all.
    """

    def __init__(
        self,
        model: nn.Module,
        entry_points: Sequence[nn.Module],
        sites: Sequence[Site],
        dictionary: Dictionary,
        fixed: Mapping[str, Fixed],
        task: int | None = None,
        pad_token: int | None = None,
    ) -> None:
        super().__init__(model, [site.name for site in sites], entry_points, pad_token)
        self.sites, self.dictionary, self.task = sites, dictionary, task
        self.count = RouterCount()
        self._conditions_SC = conditions(sites, dictionary.atoms.u.device).to(dictionary.atoms.u.dtype)
        self.fixed = fixed
        self._usage: Usage | None = None
        self._fixed = [fixed.get(site.name) for site in sites]
        self._widths = dict.fromkeys(d for site in sites for d in (site.num_in, site.num_out))

    def fold(self) -> Folded:
        return self.dictionary.fold(self._conditions_SC, self.task, self._widths)

    def projections(self, folded: Folded, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Phi_in (I, Q) and Phi_out (O, Q) of a site."""
        fixed, site = self._fixed[place], self.sites[place]
        if fixed is None:
            return folded.phi[site.num_in], folded.phi[site.num_out]
        return fixed.phi_in, fixed.phi_out

    @contextmanager
    def watching(self) -> Iterator[Usage]:
        """Context in which the returned Usage records every forward pass."""
        self._usage = Usage(len(self.sites), self.dictionary.shape.num_atoms, self.dictionary.atoms.u.device)
        try:
            yield self._usage
        finally:
            self._usage = None

    def reader(self, folded: Folded, place: int) -> torch.Tensor:
        return self.projections(folded, place)[0]

    def route(self, folded: Folded, place: int, x_TI: torch.Tensor, weight_T: torch.Tensor | None) -> Route:
        fixed, v_MQ = self._fixed[place], folded.v_MQ
        z_TQ = (x_TI @ self.reader(folded, place).to(x_TI.dtype)).to(v_MQ.dtype)
        if fixed is not None and fixed.offset is not None:
            z_TQ = z_TQ + fixed.offset
        weight_T = None if weight_T is None else weight_T.to(z_TQ.dtype)
        top_k = self.dictionary.shape.top_k
        c_TK, index_TK = route_atoms(
            z_TQ, v_MQ, folded.slope_M, folded.bias_M, top_k, count=self.count, weight=weight_T
        )
        return Route(c_TK, index_TK, weight_T)

    def add(self, folded: Folded, place: int, route: Route, y_TO: torch.Tensor) -> None:
        if self._usage is not None:
            self._usage.see(place, route)
        _, phi_OQ = self.projections(folded, place)
        y_TQ = gather_atoms(route.c_TK, route.index_TK, folded.gain_u[place])
        y_TO.addmm_(y_TQ.to(y_TO.dtype), phi_OQ.to(y_TO.dtype).t())
