"""A frozen base whose layers are sharded over the ranks by torch's fully_shard (FSDP2).

Each rank holds a shard of every weight of the model's repeated layers. The weights of a layer are gathered for its
forward or backward pass and freed after it. Embeddings, the norm after the last layer, and heads are replicated on
every rank, because a language model's loss reads the head outside of any module's forward pass. Layers have to be
sharded before an adapter is attached, so that the adapter's parameters are not sharded.

Gathering is a collective: afterwards all ranks have to run the same number of passes through the model, and a layer's
weight may only be read inside the layer's own pass.
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
    """How a base is sharded. Sizes in bytes."""

    ranks: Ranks
    whole: int
    """Size of all sharded layers together."""
    own: int
    """Size of the shards on the rank that holds the most."""
    gathered: int
    """Size of gathered weights on a rank at one time: those of the current layer, the buffer that they were gathered
    into, and the buffer of the next layer. Counting the tensors allocated in a pass does not include them."""
    everywhere: int
    """Size of the replicated parts: embeddings, norms, heads."""


def load_sharded(load: Callable[[], Backbone], ranks: Ranks, device: torch.device) -> tuple[Backbone, ShardedBase]:
    """Shard the frozen layers of the model that `load` returns, and move everything to `device`. A collective call.

    The ranks of a host load in turn, so that the host holds one whole base at a time. A device never holds more than
    one whole layer.

    Args:
        load: returns a frozen model, on the host.

    Raises:
        UserError: the model has no list of layers, or its layers share a weight with another module.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh, loaded = init_device_mesh(device.type, (ranks.size,)), None
    for turn in range(ranks.most(ranks.local_size)):
        if turn == ranks.local_rank:
            backbone = load()
            loaded = backbone, _shard(backbone, mesh, ranks, device)
            gc.collect()  # frees whole weights in reference cycles from the host
        ranks.most(turn)  # all wait for the rank whose turn it is
    assert loaded is not None
    backbone, shard = loaded
    for layer in blocks_of(backbone.model):  # FSDP reuses its first gather tensors: make them outside of inference mode
        layer.unshard()  # pyright: ignore[reportCallIssue] (of the class that fully_shard gives a layer)
        layer.reshard()  # pyright: ignore[reportCallIssue]
    return backbone, shard


def largest_of(shard: ShardedBase | None, value: int) -> int:
    """The maximum of `value` over all ranks of a sharded base, by a collective call; without sharding `value`."""
    return value if shard is None else shard.ranks.most(value)


def is_sharded(weight: torch.Tensor | None) -> bool:
    """Whether this rank holds only a shard of the weight, as it does outside of the layer's pass."""
    return hasattr(weight, "to_local")


def _shard(backbone: Backbone, mesh: Any, ranks: Ranks, device: torch.device) -> ShardedBase:
    """Shard the layers, without communication."""
    from torch.distributed.fsdp import fully_shard

    model = backbone.model
    layers = blocks_of(model)
    _check(model, layers)
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    everywhere = sum(weight.nbytes for weight in model.parameters()) - sum(sizes)
    gather = _Gather(ranks)
    for layer in layers:
        scalars = {weight for weight in layer.parameters() if weight.ndim == 0}  # scalars cannot be sharded
        made = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        made.set_custom_all_gather(gather)  # pyright: ignore[reportArgumentType] (all that is called of it is there)
    model.to(device)  # pyright: ignore[reportArgumentType] (the signature of transformers' own takes no device)
    # The parent of the layers has no weight of its own to gather. Wrapping it lets FSDP prefetch the next layer's
    # weights while the current layer is computed.
    entry = backbone.entry_points[-1] if len(backbone.entry_points) > 1 else model.base_model
    fully_shard(entry, mesh=mesh, ignored_params=set(entry.parameters()))
    # The first rank's shards are the largest: if the rows cannot be divided evenly, the last ranks get fewer.
    own = sum(_largest_part(weight, ranks.size) for layer in layers for weight in layer.parameters())
    return ShardedBase(ranks, sum(sizes), own, 3 * max(sizes), everywhere)


class _Gather:
    """FSDP's all-gather, which reports a terminated rank like every other collective."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # Hidden from peak_memory's count, in which gathered weights would make short and long passes incomparable.
        with _disable_current_modes():
            return torch.empty(size, dtype=dtype, device=device)

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
