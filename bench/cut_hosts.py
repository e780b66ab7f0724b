"""Smaller hosts made of a larger one without training: fewer layers, or fewer units."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def is_decoder(host: Path) -> bool:
    """Whether the host is a causal language model, by its config."""
    architectures = transformers.AutoConfig.from_pretrained(host, local_files_only=True).architectures or [""]
    return architectures[0].endswith("ForCausalLM")


def cut_depth(host: Path, out: Path, share: float) -> Path:
    """Keep `share` of the layers, at least one: an encoder's lowest ones. A decoder loses the layers around its middle,
    since its last layers produce the head's input."""
    if (out / "config.json").is_file():
        return out
    causal = is_decoder(host)
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = auto.from_pretrained(host, local_files_only=True)
    config = model.config
    count = max(1, round(config.num_hidden_layers * share))
    if causal:
        low = (count + 1) // 2
        kept = [*range(low), *range(config.num_hidden_layers - count + low, config.num_hidden_layers)]
        model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept]
    else:
        model.encoder.layer = model.encoder.layer[:count]
    config.num_hidden_layers = count
    return _saved(model, host, out)


@torch.no_grad()
def cut_width(host: Path, out: Path, share: float) -> Path:
    """Keep `share` of a BERT's units. Whole heads: those with the largest value weights. Residual stream: the units
    with the largest leverage in as many leading left singular vectors of the weights that write to it."""
    if (out / "config.json").is_file():
        return out
    model: Any = transformers.AutoModel.from_pretrained(host, local_files_only=True)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    num_heads = max(1, round(config.num_attention_heads * share))
    width, inner = num_heads * size, round(config.intermediate_size * share)
    written = torch.cat([x for layer in model.encoder.layer for x in (
        layer.attention.output.dense.weight, layer.output.dense.weight,
    )], dim=1)  # fmt: skip
    left, _, _ = torch.linalg.svd(
        torch.cat([written, model.embeddings.word_embeddings.weight.t()], 1), full_matrices=False
    )
    units = _largest(left[:, :width].square().sum(1), width)
    embeddings = model.embeddings
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        table.weight.data, table.embedding_dim = table.weight.data[:, units].contiguous(), width
    _cut_norm(embeddings.LayerNorm, units)
    for layer in model.encoder.layer:
        inside, output = layer.attention.self, layer.attention.output
        strength = inside.value.weight.view(config.num_attention_heads, -1).square().sum(1)
        heads = _largest(strength, num_heads)
        own = (heads[:, None] * size + torch.arange(size)).flatten()
        for linear in (inside.query, inside.key, inside.value):
            _cut(linear, own, units)
        inside.num_attention_heads, inside.all_head_size = num_heads, width
        _cut(output.dense, units, own)
        kept = _largest(layer.intermediate.dense.weight.square().sum(1), inner)
        _cut(layer.intermediate.dense, kept, units)
        _cut(layer.output.dense, units, kept)
        _cut_norm(output.LayerNorm, units)
        _cut_norm(layer.output.LayerNorm, units)
    if getattr(model, "pooler", None) is not None:
        _cut(model.pooler.dense, units, units)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = width, num_heads, inner
    return _saved(model, host, out)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.topk(count).indices.sort().values


def _cut(linear: nn.Linear, rows: torch.Tensor, columns: torch.Tensor) -> None:
    linear.weight.data = linear.weight.data[rows][:, columns].contiguous()
    linear.bias.data = linear.bias.data[rows].contiguous()
    linear.out_features, linear.in_features = len(rows), len(columns)


def _cut_norm(norm: nn.LayerNorm, units: torch.Tensor) -> None:
    norm.weight.data, norm.bias.data = norm.weight.data[units].contiguous(), norm.bias.data[units].contiguous()
    norm.normalized_shape = (len(units),)


def _saved(model: Any, host: Path, out: Path) -> Path:
    model.save_pretrained(out)
    for name in _TOKENIZER:
        if (host / name).is_file():
            shutil.copyfile(host / name, out / name)
    return out
