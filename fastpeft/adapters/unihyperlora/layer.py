"""A host with a dictionary in it: y = W x + Phi_out sum_k c_k alpha g u_k.

Shape suffixes: T tokens, I in, O out, Q canonical width, K active atoms a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fastpeft.adapters.routed import Route, RoutedHost
from fastpeft.adapters.unihyperlora.dictionary import Dictionary, Folded
from fastpeft.adapters.unihyperlora.mixer import conditions
from fastpeft.adapters.unihyperlora.projectors import Fixed
from fastpeft.adapters.unihyperlora.sites import Site
from fastpeft.kernels import RouterCount, gather_atoms, route_atoms


class Host(RoutedHost[Folded]):
    """
    Args:
        fixed: projections by a site's name; empty for the coordinate projector.
        task: number of the task embedding; None for the mean of all.
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
        self._fixed = [fixed.get(site.name) for site in sites]
        self._widths = dict.fromkeys(d for site in sites for d in (site.num_in, site.num_out))

    def fold(self) -> Folded:
        return self.dictionary.fold(self._conditions_SC, self.task, self._widths)

    def reader(self, folded: Folded, place: int) -> torch.Tensor:
        fixed = self._fixed[place]
        return folded.phi[self.sites[place].num_in] if fixed is None else fixed.phi_in

    def route(self, folded: Folded, place: int, x_TI: torch.Tensor, weight_T: torch.Tensor | None) -> Route:
        fixed, v_MQ = self._fixed[place], folded.v_MQ
        z_TQ = (x_TI @ self.reader(folded, place).to(x_TI.dtype)).to(v_MQ.dtype)
        if fixed is not None and fixed.offset is not None:
            z_TQ = z_TQ + fixed.offset
        weight_T = None if weight_T is None else weight_T.to(z_TQ.dtype)
        top_k = self.dictionary.shape.top_k
        return Route(*route_atoms(z_TQ, v_MQ, folded.slope_M, folded.bias_M, top_k, count=self.count, weight=weight_T))

    def add(self, folded: Folded, place: int, route: Route, y_TO: torch.Tensor) -> None:
        fixed = self._fixed[place]
        phi_OQ = folded.phi[self.sites[place].num_out] if fixed is None else fixed.phi_out
        y_TQ = gather_atoms(route.c_TK, route.index_TK, folded.gain_u[place])
        y_TO.addmm_(y_TQ.to(y_TO.dtype), phi_OQ.to(y_TO.dtype).t())
