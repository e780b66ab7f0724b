"""FLOPs by formula, as torch's counter has them: two a multiplication with its addition, elementwise work not counted.

The counter sees no attention of a CPU's default kernel, no gather and no operation of our own; under the math kernel of
attention it counts what these formulas say.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastpeft.adapters.unihyperlora.dictionary import Shape
from fastpeft.adapters.unihyperlora.sites import Site, role_of
from fastpeft.models.lm_head import output_embeddings
from fastpeft.models.targets import BLOCK


def extra_flops(sites: Sequence[Site], shape: Shape) -> int:
    """A token, of the dense form, which is the costlier one: projection and logits once for each tensor that sites
    read, the sum of atoms and the projection back for each site."""
    together = shape.projector != "spectral"
    inputs = {(s.layer, s.reads) if together else s.name: s.num_in for s in sites}
    q, m = shape.width, shape.num_atoms
    return sum(2 * d * q + 2 * q * m for d in inputs.values()) + sum(2 * m * q + 2 * q * s.num_out for s in sites)


def host_flops(model: nn.Module, num_tokens: int) -> float:
    """A token of a text of `num_tokens`: its linear layers, both products of attention, and a language model's head. A
    classifier's head reads a token or so of a text, and is left out."""
    total, head = 0, output_embeddings(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (BLOCK.search(name) or module is head):
            total += 2 * module.in_features * module.out_features
            if module is not head and role_of(name) == "query":
                total += 4 * num_tokens * module.out_features
    return total
