"""Put LoRA layers into a model through PEFT, so that saving, merging and loading stay PEFT's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import peft
import torch
from torch import nn

from fastpeft.config.methods import AdaLoraConfig, AdapterConfig
from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone, quiet_transformers
from fastpeft.models.fused_projections import join_settled
from fastpeft.models.layers import FusedLayer, PeftSvdLinear, SvdLinear, fused_class, svd_scale
from fastpeft.models.lm_head import output_embeddings

ADAPTER_NAME = "default"

_QUERY_VALUE = r"q|query|q_proj|query_proj|q_lin|v|value|v_proj|value_proj|v_lin"
_KEYWORDS = ("qv", "attention", "all-linear")
_ATTENTION = _QUERY_VALUE + r"|k|key|k_proj|key_proj|k_lin|o_proj|out_proj|out_lin|qkv_proj|query_key_value"
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass
class LowRankBlock:
    """One adapted matrix, W x + scale B A x."""

    name: str
    """Module path in the bare model, such as bert.encoder.layer.0.attention.self.query."""
    layer: int
    """Index of the transformer layer."""
    projection: str
    """Last part of the name that tells projections apart, such as query or intermediate.dense."""
    module: FusedLayer
    """PEFT's own class where fused_class knows none."""
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
        """A and B, and behind them what a method has of its own."""
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
        UserError: no linear layer matches; the message lists those that there are.
    """
    names = match_targets(backbone.model, backbone.head, config.target_modules)
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
    """The same with AdaLoRA's layers, at their initial rank, and PEFT's rank allocator in the model.

    Raises:
        UserError: no linear layer matches.
    """
    names = match_targets(backbone.model, backbone.head, config.target_modules)
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
        if type(layer) is PeftSvdLinear:  # over 4 bits it stays PEFT's
            layer.__class__ = SvdLinear
        layer.ranknum[ADAPTER_NAME].requires_grad_(False)  # PEFT forgets it where it turns 16 bits into 32
    return model, blocks


def _common(backbone: Backbone, config: AdapterConfig, names: list[str]) -> dict[str, Any]:
    return {
        "task_type": peft.TaskType(backbone.task_type),
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _shortest(names, backbone.model),
        "modules_to_save": list(backbone.head) or None,
    }


def _wrap(backbone: Backbone, settings: peft.PeftConfig) -> peft.PeftModel:
    with quiet_transformers():
        return peft.get_peft_model(backbone.model, settings, adapter_name=ADAPTER_NAME)


def _join(model: nn.Module) -> None:
    """Compute together the projections that share an input."""
    tokens = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    with quiet_transformers():
        join_settled(model, input_ids=tokens, attention_mask=torch.ones_like(tokens))


def _module(model: peft.PeftModel, name: str) -> Any:
    return model.get_base_model().get_submodule(name)


def match_targets(model: nn.Module, head: list[str], wanted: str | list[str]) -> list[str]:
    """Names of the linear layers that `adapter.target_modules` means, in the model's order; never a language model's
    head.

    Raises:
        UserError: a name, a word or a regular expression that matches none; the message names the nearest that does.
    """
    head_of_lm = output_embeddings(model)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head_of_lm
        and not any(name == h or name.startswith(f"{h}.") for h in head)
    ]
    entries: list[str | list[str]] = [[entry] for entry in wanted] if isinstance(wanted, list) else [wanted]
    idle = [entry for entry in entries if not any(_matches(name, entry) for name in linears)]
    if idle or not entries:
        what = "; ".join(_why(model, linears, entry) for entry in idle) or "it names no layer"
        stop = "" if what.endswith("?") else "."
        raise UserError(f"adapter.target_modules {wanted!r}: {what}{stop} {_there(linears)}")
    return [name for name in linears if _matches(name, wanted)]


def _why(model: nn.Module, linears: list[str], entry: str | list[str]) -> str:
    """That an entry matches nothing, and what it names instead, or the nearest name that there is."""
    word = entry if isinstance(entry, str) else entry[0]
    said = f"{word!r} matches no linear layer of this model"
    if isinstance(entry, list) and word in _KEYWORDS:
        return f"{said}: the word stands alone and in no list, adapter.target_modules={word}"
    for name, module in model.named_modules():
        if word and (name == word or name.endswith(f".{word}")):
            if isinstance(module, nn.Linear):  # all others have been looked at
                return f"{said}: it is of the head, which is not adapted"
            return f"{said}: it is a {type(module).__name__}"
    last = next(iter(re.findall(r"\w+", word)[-1:]), "")  # of a regular expression
    names = [*_KEYWORDS, *_endings(linears)]
    near = [*difflib.get_close_matches(word, names, n=1), *difflib.get_close_matches(last, names, n=1)]
    return f"{said}, did you mean {near[0]}?" if near else said


def _endings(linears: list[str]) -> Iterator[str]:
    """All that may stand for one of the layers in a list: its name, and what is behind each dot of it."""
    for name in linears:
        parts = name.split(".")
        yield from (".".join(parts[i:]) for i in range(len(parts)))


def _there(linears: list[str]) -> str:
    """What could be adapted, in words."""
    if not linears:
        return "It has none but its head: GPT-2 and its kin have Conv1D layers, which are not adapted; take method full"
    kinds = sorted({projection_of(name) for name in linears if _BLOCK.search(name)})
    return (
        f"Its linear layers end in {', '.join(kinds)}; or take qv, attention, all-linear, or a regular expression for "
        f"whole names such as {linears[0]}"
    )


def _matches(name: str, wanted: str | list[str]) -> bool:
    inside = _BLOCK.search(name) is not None
    if isinstance(wanted, list):
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    last = name.rsplit(".", 1)[-1]
    if wanted == "all-linear":
        return inside
    if wanted == "qv":
        return inside and re.fullmatch(_QUERY_VALUE, last) is not None
    if wanted == "attention":
        output = re.search(r"\.attention\.output\.dense$", name) is not None
        return inside and (output or re.fullmatch(_ATTENTION, last) is not None)
    if wanted.isidentifier():
        return last == wanted
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as error:
        raise UserError(f"adapter.target_modules {wanted!r} is no regular expression: {error}") from None


def projection_of(name: str) -> str:
    """What tells the matrices of one layer apart: `query`, `attention.output.dense`, `up_proj`."""
    inside = _BLOCK.split(name)[-1]
    last = inside.rsplit(".", 1)[-1]
    return inside if last == "dense" else last


def _layer(name: str) -> int:
    found = _BLOCK.search(name)
    return int(found.group(1)) if found else 0


def _shortest(names: list[str], model: nn.Module) -> list[str]:
    """Name endings if they mean exactly `names`, as other tools read them; else the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in endings
    }
    return endings if meant == set(names) else names
