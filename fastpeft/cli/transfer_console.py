"""What `fastpeft transfer` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fastpeft.trainer.transferring import Transfer


def transfer_table(outcome: Transfer) -> Group:
    """`fastpeft transfer`: one line per variant, and the definition of zero-shot."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("steps", outcome.metric, "loss", "time", "adapter", "extra FLOPs", "atoms a token"):
        table.add_column(name, justify="right")
    for row in outcome.rows:
        values = (
            f"{row.steps:,}",
            "-" if row.score is None else f"{row.score:.4f}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if row.seconds is None else f"{row.seconds:.1f} s",
            "-" if row.adapter_mb is None else f"{row.adapter_mb:.3f} MB",
            "-" if row.extra_flops is None else f"{row.extra_flops:.1%}",
            "-" if row.active_atoms is None else f"{row.active_atoms:.2f}",
        )
        table.add_row(row.what, *values)
    source = outcome.source.get("name") or "an unnamed host"
    head = (
        f"the head's output layer is fitted by ridge regression to {outcome.fitted_to:,} answers of the frozen model"
        if outcome.fitted_to
        else "the head is the model's own"
    )
    where = f"{outcome.adapter}, trained on {source}, on {outcome.model} and {outcome.dataset}"
    return Group(escape(where), "", table, "", f"zero-shot: no step is taken; {head}")
