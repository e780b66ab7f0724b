"""What `fastpeft export` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastpeft.export.card import STAND_IN_WARNING
from fastpeft.export.exported import Exported
from fastpeft.export.plan import Plan
from fastpeft.runs.events import number

if TYPE_CHECKING:
    from fastpeft.export.approximate import Approximated


def opening(plan: Plan) -> Iterator[str]:
    """Before the work: which weights, and what is odd about the run."""
    metric = plan.metric
    known = f" ({metric['name']} {number(metric['value']):.4f} at step {metric['step']:,})" if "value" in metric else ""
    yield f"the {plan.weights} weights of {plan.folder.path}{known}"
    if plan.status == "running":
        yield "the run is still running: these are its weights so far, and later ones may be better"
    elif plan.status not in ("done", "stopped"):
        yield f"the run did not end well ({plan.status}): these are the weights that it saved"


def closing(plan: Plan, exported: Exported) -> Iterator[str]:
    check, trimmed, metric = exported.check, exported.trimmed, exported.metric
    if trimmed is not None:
        s = trimmed.summary()
        yield (
            f"trimmed   {len(trimmed.matrices)} matrices to {s['share']:.4g} of their energy: rank "
            f"{s['rank_min']} to {s['rank_max']}, median {s['rank_median']:g}; {s['rank_total']:,} of "
            f"{s['rank_before_total']:,} in total"
        )
    if metric is not None:
        yield (
            f"metric    {metric.name} {metric.before:.4f} before, {metric.after:.4f} after "
            f"({metric.after - metric.before:+.4f}) on {metric.num_rows:,} rows"
        )
        logged = number(plan.metric.get("value", metric.before))
        if metric.name == plan.metric.get("name") and abs(logged - metric.before) > 1e-9:
            yield (
                f"          the run logged {logged:.4f} for these weights: rounding, if it trained in bf16 or fp16; "
                "else its base model or its data have changed"
            )
    if exported.layout is not None and plan.reader is not None:
        yield (
            f"for       {plan.reader.name}: every update at rank {exported.layout.rank} and scale "
            f"{exported.layout.scale:g}, no patterns"
        )
    own_files = plan.reader is not None and plan.reader.own_files and not plan.merge
    how = "as mlx-lm does" if own_files else f"in {'transformers' if plan.merge else 'PEFT'}"
    apart = f"{check.difference:.1e}" if check.difference else "0"
    same = "" if check.num_same is None else f", the largest one the same on {check.num_same}"
    yield (
        f"checked   loaded {how}: largest difference of a logit {apart} on {check.num_rows} {check.where} "
        f"({check.tolerance:.0e} allowed){same}"
    )
    was = f" (adapter before: {exported.mb_before:.3f} MB)" if trimmed is not None or plan.merge else ""
    yield f"size      {exported.mb:.3f} MB{was}"
    yield f"written   {exported.target}: how to load it is in its README.md"
    yield from exported.notes
    if exported.stand_in:
        yield STAND_IN_WARNING


def approximated(found: Approximated) -> Iterator[str]:
    yield (
        f"metric    {found.metric} {found.before:.4f} before, {found.after:.4f} after "
        f"({found.after - found.before:+.4f}) on {found.num_rows:,} rows"
    )
    yield f"rank      {found.rank}, which leaves out {found.lost:.2%} of a matrix's mean update at most"
    yield f"written   {found.target}: an approximation, as its README.md says"
