"""The adapted matrices of a host: their depth, their role in a layer, and which of them share an input."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.targets import BLOCK, match_targets, projection_of

TYPES = ("query", "key", "value", "output", "feed_forward")
"""Types of matrices that the mixer distinguishes."""

ROLES = {
    "query": r"query|query_proj|q_proj|q_lin|q",
    "key": r"key|key_proj|k_proj|k_lin|k",
    "value": r"value|value_proj|v_proj|v_lin|v",
    "output": r"attention\.output\.dense|out_proj|o_proj|out_lin|o|self_attention\.dense",
    "gate": r"gate_proj",
    "up": r"intermediate\.dense|up_proj|fc1|lin1|wi|dense_h_to_4h",
    "down": r"output\.dense|down_proj|fc2|lin2|wo|dense_4h_to_h",
}
"""Role -> names of the linear layers that have it, as projection_of returns them."""

_INPUTS = {"query": "hidden", "key": "hidden", "value": "hidden", "gate": "up", "up": "up"}
"""Roles that read the same tensor within a layer."""


@dataclass(frozen=True)
class Site:
    """One adapted matrix."""

    name: str
    """Module path in the host."""
    layer: int
    role: str
    """A key of ROLES."""
    depth: float
    """Relative depth of its layer: 0 for the first layer, 1 for the last."""
    num_in: int
    num_out: int

    @property
    def type(self) -> int:
        """Index of its type in TYPES."""
        return min(list(ROLES).index(self.role), len(TYPES) - 1)

    @property
    def reads(self) -> str:
        """Kind of input. Sites with the same layer and the same kind read the same tensor."""
        return _INPUTS.get(self.role, self.role)


def role_of(name: str) -> str | None:
    projection = projection_of(name)
    return next((role for role, names in ROLES.items() if re.fullmatch(names, projection)), None)


def find_sites(model: nn.Module, head: list[str], wanted: str | list[str], notes: list[str]) -> list[Site]:
    """The sites selected by `adapter.target_modules`, in the model's order. Matching layers without a role are left out
    and reported in `notes`.

    Raises:
        UserError: no layer matches, or no matching layer has a role.
    """
    names = match_targets(model, head, wanted)
    roles = {name: role_of(name) for name in names}
    lost = sorted({projection_of(name) for name, role in roles.items() if role is None})
    if len(lost) and not any(roles.values()):
        looked_for = "; ".join(
            f"{role}: {names.replace(chr(92), '').replace('|', ', ')}" for role, names in ROLES.items()
        )
        raise UserError(
            f"{type(model).__name__}: none of its linear layers ({', '.join(lost)}) is a projection that UniHyperLoRA "
            f"knows the role of. It looks for {looked_for}. Take method lora"
        )
    if lost:
        notes.append(f"{', '.join(lost)}: not adapted, since their role in a layer is not known")
    last = max((int(m[1]) for name, _ in model.named_modules() if (m := BLOCK.search(name))), default=0)
    found = []
    for name, role in roles.items():
        if role is not None:
            layer = int(m[1]) if (m := BLOCK.search(name)) else 0
            num_in, num_out = _shape(model.get_submodule(name))
            found.append(Site(name, layer, role, layer / max(1, last), num_in, num_out))
    return found


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out); works for weights packed into 4 bits too."""
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
