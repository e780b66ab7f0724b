"""Truncate LoRA updates to the rank that holds their energy.

The singular values of s B A come from the small core of two QR factorisations; the O x I product is
never formed. Energy is the sum of squared singular values, ||s B A||_F^2.

Shape suffixes: R rank, I in, O out, K kept rank.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.models.layers import LoraLinear
from fastpeft.models.lm_head import bare_model


@dataclass(frozen=True)
class Truncated:
    """b_OK @ a_KI is the best approximation of rank K of the update, scale included. float64."""

    a_KI: torch.Tensor
    b_OK: torch.Tensor
    energy_kept: float
    """Share of the update's energy, 0 to 1; 1 for an update that is zero."""

    @property
    def rank(self) -> int:
        return self.a_KI.shape[0]


def truncate(a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, share: float) -> Truncated:
    """The smallest rank, at least 1, whose truncation of scale * b_OR @ a_RI keeps `share` of its energy.

    Eckart & Young (Psychometrika 1, 1936): truncating the SVD is the best approximation of its rank.

    Raises:
        UserError: weights that are not finite.
    """
    left_OM, left_MR = torch.linalg.qr(b_OR.double())
    right_IN, right_NR = torch.linalg.qr(a_RI.double().t())
    core_MN = scale * left_MR @ right_NR.t()
    if not bool(core_MN.isfinite().all()):
        raise UserError("its weights are not finite, so there is nothing to trim")
    u_MM, sigma, v_MN = torch.linalg.svd(core_MN, full_matrices=False)
    energy = sigma.square().cumsum(0)
    total = float(energy[-1])
    kept = 1 if total == 0 else int((energy < share * total).sum()) + 1
    root = sigma[:kept].sqrt()
    return Truncated(
        a_KI=root[:, None] * (v_MN[:kept] @ right_IN.t()),
        b_OK=(left_OM @ u_MM[:, :kept]) * root,
        energy_kept=float(energy[kept - 1]) / total if total else 1.0,
    )


@dataclass(frozen=True)
class TrimmedMatrix:
    name: str
    rank_before: int
    rank: int
    energy_kept: float


@dataclass(frozen=True)
class Trimmed:
    """Every matrix of an adapter, in the model's order."""

    share: float
    matrices: list[TrimmedMatrix]
    factors: dict[str, Truncated]

    def summary(self) -> dict[str, Any]:
        """For export.json: total, min, median and max rank, and every matrix."""
        ranks = [m.rank for m in self.matrices]
        return {
            "share": self.share,
            "rank_before_total": sum(m.rank_before for m in self.matrices),
            "rank_total": sum(ranks),
            "rank_min": min(ranks),
            "rank_median": statistics.median(ranks),
            "rank_max": max(ranks),
            "matrices": [asdict(m) for m in self.matrices],
        }


@torch.no_grad()
def trim_model(model: nn.Module, share: float) -> Trimmed:
    """Truncate every LoRA layer of a PEFT model in place, its factors padded with zeros to the old rank."""
    matrices, factors = [], {}
    for name, module in bare_model(model).named_modules():
        if not isinstance(module, LoraLinear):
            continue
        a_RI, b_OR = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
        scale = module.scaling[ADAPTER_NAME]
        try:
            cut = truncate(a_RI.cpu(), b_OR.cpu(), scale, share)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        a_RI.zero_()
        b_OR.zero_()
        a_RI[: cut.rank] = cut.a_KI.to(a_RI)
        b_OR[:, : cut.rank] = (cut.b_OK / scale).to(b_OR)
        matrices.append(TrimmedMatrix(name, a_RI.shape[0], cut.rank, cut.energy_kept))
        factors[name] = cut
    return Trimmed(share, matrices, factors)


def trimmed_config(config: dict[str, Any], trimmed: Trimmed) -> dict[str, Any]:
    """adapter_config.json for the truncated factors, which hold the scale: every update is B A as it stands.

    r and lora_alpha are the largest rank. A reader that knows neither rank_pattern nor alpha_pattern, and
    divides lora_alpha by r, gets 1 for every matrix, which is right; so does PEFT, which knows both.
    """
    largest = max(m.rank for m in trimmed.matrices)
    pattern = {m.name: m.rank for m in trimmed.matrices if m.rank != largest}
    return config | {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
    }
