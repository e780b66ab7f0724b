"""A frozen base whose layers are shared out over the ranks, by torch's fully_shard (FSDP2).

Each rank holds its part of every weight of the layers that the model repeats. A layer's weights are gathered for its
pass, forward or backward, and let go behind it. Embeddings, the norm behind the last layer, and heads stay whole on
every rank: a language model's loss reads its head outside of any module's forward pass. Layers have to be shared out
before an adapter is attached, so that none of the adapter's parameters are.

Gathering is a collective: from here on every rank has to take as many passes through the model as the others, and no
weight of a layer may be read outside of the layer's own pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.errors import UserError
from fastpeft.models.backbone import Backbone
from fastpeft.models.checkpointed_layers import blocks_of
from fastpeft.ranks import Ranks


@dataclass(frozen=True)
class ShardedBase:
    """How a base is shared out. Sizes in bytes."""

    ranks: Ranks
    whole: int
    """Of all layers."""
    own: int
    """Of all layers, on the rank that has the most."""
    gathered: int
    """Of whole weights on a rank at a time: those of the layer that is computed, the buffer that they came in, and that
    of the next layer's. Counting the tensors that a pass makes does not find them."""
    everywhere: int
    """Of what every rank has whole: embeddings, norms, heads."""


def load_sharded(load: Callable[[], Backbone], ranks: Ranks, device: torch.device) -> tuple[Backbone, ShardedBase]:
    """Share out the frozen layers of the model that `load` gives, and move everything to `device`.

    The ranks of a host load one after another, so that it holds one whole base at a time; and a device has no more than
    one whole layer. Every rank has to call it.

    Args:
        load: gives a frozen model, on the host.

    Raises:
        UserError: a model without a list of layers, or whose layers share a weight with something else.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh, loaded = init_device_mesh(device.type, (ranks.size,)), None
    for turn in range(ranks.most(ranks.local_size)):
        if turn == ranks.local_rank:
            backbone = load()
            loaded = backbone, _shard(backbone, mesh, ranks, device)
            gc.collect()  # whole weights in circles of references would stay on the host
        ranks.most(turn)  # none goes on before the one whose turn it is
    assert loaded is not None
    backbone, shard = loaded
    for layer in blocks_of(backbone.model):  # FSDP keeps the tensors that it first gathers into: none of inference mode
        layer.unshard()  # pyright: ignore[reportCallIssue] (of the class that fully_shard gives a layer)
        layer.reshard()  # pyright: ignore[reportCallIssue]
    return backbone, shard


def largest_of(shard: ShardedBase | None, value: int) -> int:
    """Of the values of all ranks that take their passes together. Every one of them has to call it."""
    return value if shard is None else shard.ranks.most(value)


def is_sharded(weight: torch.Tensor | None) -> bool:
    """Whether this rank has a part of it only, as outside of its layer's pass."""
    return hasattr(weight, "to_local")


def _shard(backbone: Backbone, mesh: Any, ranks: Ranks, device: torch.device) -> ShardedBase:
    """Talks to no other rank."""
    from torch.distributed.fsdp import fully_shard

    model = backbone.model
    layers = blocks_of(model)
    _check(model, layers)
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    everywhere = sum(weight.nbytes for weight in model.parameters()) - sum(sizes)
    gather = _Gather(ranks)
    for layer in layers:
        scalars = {weight for weight in layer.parameters() if weight.ndim == 0}  # of which there are no parts
        made = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        made.set_custom_all_gather(gather)  # pyright: ignore[reportArgumentType] (all that is called of it is there)
    model.to(device)  # pyright: ignore[reportArgumentType] (the signature of transformers' own takes no device)
    # What calls the layers has no weight of its own to gather. With it they know each other, and the weights of the
    # next one come while one is computed.
    entry = backbone.entry_points[-1] if len(backbone.entry_points) > 1 else model.base_model
    fully_shard(entry, mesh=mesh, ignored_params=set(entry.parameters()))
    # The first rank's parts are the largest: where a weight's rows cannot be shared evenly, the last ranks have fewer.
    own = sum(_largest_part(weight, ranks.size) for layer in layers for weight in layer.parameters())
    return ShardedBase(ranks, sum(sizes), own, 3 * max(sizes), everywhere)


class _Gather:
    """FSDP's own all-gather, but that a rank which has ended is told as in all collectives."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        with _disable_current_modes():  # no part of what peak_memory counts: with weights that come and go in it, the
            return torch.empty(size, dtype=dtype, device=device)  # peak of a short pass says nothing of a long one's

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        return self._ranks.gather_into(output_tensor, input_tensor, group, async_op)


def _largest_part(weight: torch.Tensor, num_ranks: int) -> int:
    rows = len(weight) if is_sharded(weight) else 1
    return weight.nbytes if rows == 1 else weight.nbytes // rows * -(-rows // num_ranks)


def _check(model: nn.Module, layers: list[nn.Module]) -> None:
    kind = type(model).__name__
    if not layers:
        raise UserError(
            f"training.shard_base: {kind} has no list of layers that could be shared out over the ranks; set it off"
        )
    owner_of = {id(module): layer for layer in layers for module in layer.modules()}
    owners: dict[int, nn.Module | None] = {}
    for name, module in model.named_modules():
        owner = owner_of.get(id(module))
        for own, weight in module.named_parameters(recurse=False):
            if owners.setdefault(id(weight), owner) is not owner:
                raise UserError(
                    f"training.shard_base: {kind} has the weight {name}.{own} in a layer and elsewhere, and a layer's "
                    "weights are whole in its own pass only; set it off"
                )
