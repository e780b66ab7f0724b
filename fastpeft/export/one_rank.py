"""An adapter's updates in the form that every reader reads right: one rank, one scale of alpha / rank, no patterns.

PEFT knows ranks and scales of each matrix (rank_pattern, alpha_pattern, use_rslora); many readers ignore some of them
in silence. Smaller ranks are padded with zeros, which changes no product.

Shape suffixes: R rank, I in, O out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.inject import ADAPTER_NAME
from fastpeft.models.layers import is_fused
from fastpeft.models.lm_head import bare_model

PREFIX = "base_model.model."
"""Of every tensor's name in PEFT's file."""
_BLOCK = re.compile(r"^(?:.*\.)?layers\.\d+\.(.+)$")


@dataclass(frozen=True)
class Update:
    """W x + scale b_OR a_RI x. fp32, on the CPU."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float


@dataclass(frozen=True)
class OneRank:
    """Updates of one rank and one scale."""

    rank: int
    scale: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """a_RI and b_OR by the module's path in the bare model."""

    @property
    def alpha(self) -> float | int:
        """What a reader divides by the rank. An int where it is whole: some readers declare it as one."""
        alpha = self.scale * self.rank
        return int(alpha) if alpha == int(alpha) else alpha


@torch.no_grad()
def read_updates(model: nn.Module) -> dict[str, Update]:
    """Of a PEFT model, by module, without the ranks at the end that are zero, as pruning and trimming leave them.

    Raises:
        UserError: a layer that is more than s B A.
    """
    found = {}
    for name, module in bare_model(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        factors = module.factors(ADAPTER_NAME) if is_fused(module) else None
        if factors is None:
            raise UserError(f"{name}: is {type(module).__name__}, and no plain LoRA layer; export with --merge")
        a_RI, b_OR = (factor.detach().float().cpu() for factor in factors[:2])
        live_R = (a_RI != 0).any(1) & (b_OR != 0).any(0)
        rank = int(live_R.nonzero().max()) + 1 if live_R.any() else 1
        found[name] = Update(a_RI[:rank], b_OR[:, :rank], factors[2])
    return found


def to_one_rank(updates: dict[str, Update], rank: int) -> OneRank:
    """Pad to `rank`. Where the scales differ, the largest is kept and B takes what lies between."""
    scale = max(update.scale for update in updates.values())
    factors = {}
    for name, update in updates.items():
        a_RI = update.a_RI.new_zeros(rank, update.a_RI.shape[1])
        b_OR = update.b_OR.new_zeros(update.b_OR.shape[0], rank)
        a_RI[: update.a_RI.shape[0]] = update.a_RI
        b_OR[:, : update.b_OR.shape[1]] = update.b_OR * (update.scale / scale)
        factors[name] = a_RI, b_OR
    return OneRank(rank, scale, factors)


def complete(updates: dict[str, Update], stacked: Sequence[tuple[str, ...]], model: nn.Module) -> dict[str, Update]:
    """Add updates of zero to the siblings of those that are there, so that each group of projections is whole.

    Args:
        stacked: names of projections of one parent, such as q_proj, k_proj and v_proj.
    """
    modules = dict(bare_model(model).named_modules())
    whole = dict(updates)
    for name in updates:
        parent, _, last = name.rpartition(".")
        for group in stacked:
            for path in (f"{parent}.{other}" for other in group if last in group):
                sibling = modules.get(path)
                if path not in whole and isinstance(sibling, nn.Linear):
                    a_RI = torch.zeros(1, sibling.in_features)
                    whole[path] = Update(a_RI, torch.zeros(sibling.out_features, 1), updates[name].scale)
    return whole


def peft_config(config: dict[str, Any], plain: OneRank) -> dict[str, Any]:
    """adapter_config.json: `config` with the one rank and scale, and the modules by their names."""
    return config | {
        "r": plain.rank,
        "lora_alpha": plain.alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": sorted(plain.factors),
    }


def peft_tensors(plain: OneRank) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": factor.contiguous()
        for name, factors in plain.factors.items()
        for letter, factor in zip("AB", factors)
    }


# ---- mlx-lm's own two files --------------------------------------------------------------------


def mlx_config(plain: OneRank, num_layers: int) -> dict[str, Any]:
    """adapter_config.json. The scale is in lora_b: mlx-lm multiplies by `scale` as it stands.

    `keys` are paths inside a block. mlx-lm then expects the module in each block, and one that the file lacks stays the
    base model's.
    """
    keys = sorted({path_in_block(name) for name in plain.factors})
    parameters = {"rank": plain.rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    return {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}


def mlx_tensors(plain: OneRank) -> dict[str, torch.Tensor]:
    """adapters.safetensors: lora_a is I x R, lora_b R x O."""
    return {
        f"{name}.lora_{letter}": tensor.t().contiguous()
        for name, (a_RI, b_OR) in plain.factors.items()
        for letter, tensor in (("a", a_RI), ("b", plain.scale * b_OR))
    }


def path_in_block(name: str) -> str:
    """self_attn.q_proj of model.layers.3.self_attn.q_proj; the whole name outside of the blocks."""
    found = _BLOCK.match(name)
    return found.group(1) if found else name
