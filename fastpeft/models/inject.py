"""Insert LoRA layers into a model through PEFT, so that PEFT saves, merges and loads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import peft
import torch
from torch import nn

from fastpeft.config.methods import AdaLoraConfig, AdapterConfig
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, quiet_transformers
from fastpeft.models.fused_projections import join_settled
from fastpeft.models.layers import FusedLayer, PeftSvdLinear, SvdLinear, fused_class, svd_scale
from fastpeft.models.targets import BLOCK, KEYWORDS, match_targets, projection_of

ADAPTER_NAME = "default"
C = TypeVar("C", bound=peft.PeftConfig)

_EXPERTS = "PEFT adapts the experts' stacked weights in place of layers of such names"


@dataclass
class LowRankBlock:
    """One adapted matrix, W x + scale B A x."""

    name: str
    """Module path in the model without adapter, such as bert.encoder.layer.0.attention.self.query."""
    layer: int
    """Index of the transformer layer."""
    projection: str
    """End of the name that identifies the projection within a layer, such as query or intermediate.dense."""
    module: FusedLayer
    """The adapted layer; of PEFT's own class if fused_class has none for it."""
    kind: str = field(default="low_rank", init=False)

    @property
    def lora_a(self) -> nn.Parameter:
        return self.module.lora_A[ADAPTER_NAME].weight

    @property
    def lora_b(self) -> nn.Parameter:
        return self.module.lora_B[ADAPTER_NAME].weight

    @property
    def scale(self) -> float:
        return self.module.scaling[ADAPTER_NAME]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B, followed by the method's other parameters."""
        return self.lora_a, self.lora_b


class SvdBlock(LowRankBlock):
    """One matrix of AdaLoRA: A (rank x in), E (rank x 1) and B (out x rank)."""

    @property
    def lora_a(self) -> nn.Parameter:
        return self.module.lora_A[ADAPTER_NAME]

    @property
    def lora_b(self) -> nn.Parameter:
        return self.module.lora_B[ADAPTER_NAME]

    @property
    def lora_e(self) -> nn.Parameter:
        return cast(PeftSvdLinear, self.module).lora_E[ADAPTER_NAME]

    @property
    def scale(self) -> float:
        return svd_scale(self.module, ADAPTER_NAME)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self.lora_a, self.lora_b, self.lora_e


def inject_lora(
    backbone: Backbone, config: AdapterConfig, rank_stabilised: bool = False
) -> tuple[peft.PeftModel, list[LowRankBlock]]:
    """Wrap the backbone in a PeftModel with LoRA on the matched layers and a trainable head.

    `rank_stabilised`: scale by alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732) instead of alpha / rank.

    Raises:
        UserError: no linear layer matches (the message lists the available ones), or PEFT cannot adapt a layer that was
            given by name.
    """
    names = match_targets(backbone.model, backbone.head, config.target_modules)
    names = _adaptable(backbone, config.target_modules, names)
    lora = peft.LoraConfig(r=config.rank, use_rslora=rank_stabilised, **_common(backbone, config, names))
    model = _wrap(backbone, lora)
    for name in names:
        layer = _module(model, name)
        layer.__class__ = fused_class(layer) or type(layer)
    _join(model)
    return model, [LowRankBlock(n, _layer(n), projection_of(n), _module(model, n)) for n in names]


def inject_adalora(
    backbone: Backbone, config: AdapterConfig, adalora: AdaLoraConfig
) -> tuple[peft.PeftModel, list[SvdBlock]]:
    """As inject_lora, with AdaLoRA's layers at their initial rank and PEFT's rank allocator in the model.

    Raises:
        UserError: no linear layer matches.
    """
    names = match_targets(backbone.model, backbone.head, config.target_modules)
    names = _adaptable(backbone, config.target_modules, names)
    total = adalora.virtual_steps
    settings = peft.AdaLoraConfig(
        init_r=adalora.initial_rank,
        target_r=adalora.target_rank,
        total_step=total,
        tinit=round(adalora.initial_fraction * total),
        tfinal=round(adalora.final_fraction * total),
        deltaT=adalora.prune_every,
        beta1=adalora.beta1,
        beta2=adalora.beta2,
        orth_reg_weight=adalora.orthogonality,
        **_common(backbone, config, names),
    )
    model = _wrap(backbone, settings)
    blocks = []
    for name in names:
        layer = _module(model, name)
        blocks.append(SvdBlock(name, _layer(name), projection_of(name), layer))
        if type(layer) is PeftSvdLinear:  # a 4-bit layer keeps PEFT's class
            layer.__class__ = SvdLinear
        layer.ranknum[ADAPTER_NAME].requires_grad_(False)  # PEFT loses the flag when it casts to fp32
    return model, blocks


def _common(backbone: Backbone, config: AdapterConfig, names: list[str]) -> dict[str, Any]:
    return {
        "task_type": peft.TaskType(backbone.task_type),
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _shortest(names, backbone.model),
        "modules_to_save": list(backbone.head) or None,
        "trainable_token_indices": dict(backbone.new_tokens) or None,
    }


def in_order(settings: C) -> C:
    """Sort module names, because PEFT writes them in the order of a set, which differs between processes."""
    names = getattr(settings, "target_modules", None)
    if isinstance(names, set):
        vars(settings)["target_modules"] = sorted(names)
    return settings


def _wrap(backbone: Backbone, settings: peft.PeftConfig) -> peft.PeftModel:
    with quiet_transformers():
        return peft.get_peft_model(backbone.model, in_order(settings), adapter_name=ADAPTER_NAME)


def _join(model: nn.Module) -> None:
    """Group the projections that share an input, to compute them together."""
    tokens = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    with quiet_transformers():
        join_settled(model, input_ids=tokens, attention_mask=torch.ones_like(tokens))


def _module(model: peft.PeftModel, name: str) -> Any:
    return model.get_base_model().get_submodule(name)


def _adaptable(backbone: Backbone, wanted: str | list[str], names: list[str]) -> list[str]:
    """The layers that PEFT can adapt in place. Of layers selected by a keyword, such as all-linear, the others are left
    out with a note.

    Raises:
        UserError: a layer given by name cannot be adapted, or no layer remains.
    """
    faults = {name: fault for name in names if (fault := _why_not(backbone.model, name))}
    if not faults:
        return names
    kept = [name for name in names if name not in faults]
    lost = ", ".join(sorted({projection_of(name) for name in faults}))
    why = f"{type(backbone.model).__name__}'s {lost}: {next(iter(faults.values()))}"
    if wanted not in KEYWORDS or not kept:
        raise UserError(f"adapter.target_modules {wanted!r}: {why}. Name others, or take attention or all-linear")
    backbone.notes.append(f"{why}; {wanted} leaves them out")
    return kept


def _why_not(model: nn.Module, name: str) -> str | None:
    """Why PEFT cannot adapt this layer; None if it can."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    layer = model.get_submodule(name)
    if not _is_product(layer):
        return f"{type(layer).__name__} gives more than a matrix product"
    settings = peft.LoraConfig(target_modules=[name])
    try:
        _check_lora_target_modules_mamba(settings, model, name.rsplit(".", 1)[-1])
    except ValueError:
        return "Mamba's kernels read the weights of such layers past an adapter"
    try:
        convert_peft_config_for_transformers(settings, model, None)
    except ValueError:  # one half of a fused pair
        return _EXPERTS
    return _EXPERTS if settings.target_parameters else None


@torch.no_grad()
def _is_product(layer: nn.Module) -> bool:
    """False for a router, which may be a Linear that also selects experts."""
    kind = type(layer)
    if kind.forward is nn.Linear.forward or kind.__module__.startswith("bitsandbytes"):
        return True
    weight = cast(nn.Linear, layer).weight
    try:
        found = layer(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    except Exception:  # its input is not a tensor of features
        return False
    return torch.is_tensor(found) and found.shape == (1, weight.shape[0])


def _layer(name: str) -> int:
    found = BLOCK.search(name)
    return int(found.group(1)) if found else 0


def _shortest(names: list[str], model: nn.Module) -> list[str]:
    """Name endings if they match exactly `names` under PEFT's rules; else the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return endings if meant == set(names) else names
