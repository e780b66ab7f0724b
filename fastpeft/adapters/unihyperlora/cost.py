"""FLOPs by formula, in the convention of torch's counter: two per multiply-add, elementwise operations not counted.

The counter itself misses the default attention kernel of a CPU, gathers and fastpeft's own operations. With the math
kernel of attention it agrees with these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastpeft.adapters.unihyperlora.dictionary import Shape
from fastpeft.adapters.unihyperlora.sites import Site, role_of
from fastpeft.models.lm_head import output_embeddings
from fastpeft.models.targets import BLOCK


def extra_flops(sites: Sequence[Site], shape: Shape) -> int:
    """FLOPs per token of the adapter in its dense form, the costlier one. Projection and logits count once per tensor
    that sites read; the sum of atoms and the output projection count per site."""
    together = shape.projector != "spectral"
    inputs = {(s.layer, s.reads) if together else s.name: s.num_in for s in sites}
    q, m = shape.width, shape.num_atoms
    return sum(2 * d * q + 2 * q * m for d in inputs.values()) + sum(2 * m * q + 2 * q * s.num_out for s in sites)


def host_flops(model: nn.Module, num_tokens: int) -> float:
    """FLOPs per token at sequence length `num_tokens`: linear layers, both products of attention, and the head of a
    language model. A classifier's head is left out, because it reads only about one token of a text."""
    total, head = 0, output_embeddings(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (BLOCK.search(name) or module is head):
            total += 2 * module.in_features * module.out_features
            if module is not head and role_of(name) == "query":
                total += 4 * num_tokens * module.out_features
    return total
