"""Transfer of a UniHyperLoRA adapter to another host model: zero-shot, and after a few steps on its bias.

Baselines are the host without the adapter, and LoRA at equal cost. Zero-shot means that the adapter is frozen and no
step is taken. A classifier's output layer is fitted by ridge regression on the frozen model's features of training
rows; a language model keeps its own head. The same is done without the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from fastpeft.adapters.unihyperlora.file_format import decode
from fastpeft.adapters.unihyperlora.method import UniHyperLora
from fastpeft.config import ConfigError, RunConfig, with_values
from fastpeft.models.backbone import quiet_transformers
from fastpeft.runs.curves import is_validation
from fastpeft.runs.events import number, read_events
from fastpeft.runs.store import Result, RunFolder, default_name, write_json
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.fitted_head import fit_head
from fastpeft.trainer.interrupt import StopRequest
from fastpeft.trainer.resolve import resolve
from fastpeft.trainer.run import Reporter, train

STEPS = 500
LORA_RATE = 5e-4
METHOD = "unihyperlora"


@dataclass(frozen=True)
class Row:
    """One row of the results table."""

    what: str
    steps: int
    score: float | None
    loss: float | None = None
    """Loss on the validation rows. For a language model it is more sensitive than the share of right answers."""
    seconds: float | None = None
    """Seconds on the budget clock."""
    adapter_mb: float | None = None
    extra_flops: float | None = None
    active_atoms: float | None = None
    run: str | None = None
    """Name of the run's folder."""


@dataclass(frozen=True)
class Transfer:
    adapter: str
    source: dict[str, Any]
    model: str
    dataset: str
    metric: str
    fitted_to: int
    """Number of answers that the heads were fitted to; 0 if the model keeps its own head."""
    stand_in: bool
    rows: list[Row]


def transfer(
    run: RunConfig,
    file: Path,
    *,
    steps: int = STEPS,
    lora_rate: float = LORA_RATE,
    results_dir: Path = Path("results"),
    name: str | None = None,
    allow_stand_in: bool = True,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Transfer:
    """Attach the adapter in `file` to the model of `run`, score it, train its bias, and train the baselines.

    Args:
        run: the target: model, data, learning rates. Its method is ignored.
        steps: optimizer steps on the bias. LoRA then gets as many seconds as they took.
        lora_rate: learning rate of the LoRA run.
        name: prefix of the runs' folders, NAME-delta, NAME-head and NAME-lora.

    Returns:
        The content of NAME-transfer.json. After a stop request it lacks the runs that were not begun.

    Raises:
        UserError: a file that cannot be read, a model that cannot be adapted, a folder that exists already.
    """
    stored = decode(file)
    name = name or default_name(run.run_id)
    for part in ("delta", "head", "lora"):
        RunFolder.at(results_dir, f"{name}-{part}").check_free()
    resolved = resolve(run, allow_stand_in)
    fresh = {"method": METHOD, "unihyperlora.adapter": None}
    delta = {"unihyperlora.adapter": str(file), "unihyperlora.train": "delta"}
    say(f"zero-shot: {resolved.run.model.name} on {resolved.run.dataset.name}")
    with quiet_transformers():
        found, metric, dataset, fitted_to = zero_shot(build_job(with_values(resolved.run, fresh | delta)))
    outcome = Transfer(
        str(file), stored.host, resolved.run.model.name, dataset, metric, fitted_to, resolved.stand_in, found
    )
    options: dict[str, Any] = {
        "results_dir": results_dir, "reporter": reporter, "stop": stop, "group": name, "allow_stand_in": allow_stand_in,
    }  # fmt: skip

    def trained(what: str, part: str, values: dict[str, Any]) -> Result | None:
        if stop is not None and stop():
            return None
        say(f"{what}: {results_dir / f'{name}-{part}'}")
        result = train(with_values(resolved.run, values), name=f"{name}-{part}", **options)
        outcome.rows.append(_row(what, result, RunFolder.at(results_dir, result.name)))
        return result

    budget = {"budget": f"{steps}steps", "training.fit_head": fitted_to > 0}  # as for the zero-shot rows
    first = trained("adapter, delta trained", "delta", fresh | budget | delta)
    if fitted_to:
        trained("no adapter, head trained", "head", fresh | budget | {"unihyperlora.train": "none"})
    if first is not None and first.status == "done":
        lora = {"method": "lora", "adapter.rank": 8, "adapter.alpha": 16.0, "training.learning_rate": lora_rate}
        try:
            trained(
                "LoRA r 8, as many seconds", "lora", lora | budget | {"budget": f"{max(1.0, first.elapsed_s):.1f}s"}
            )
        except ConfigError:  # the final evaluation would take over half of it
            trained("LoRA r 8, as many steps", "lora", lora | budget)
    write_json(results_dir / f"{name}-transfer.json", asdict(outcome))
    return outcome


def zero_shot(job: Job) -> tuple[list[Row], str, str, int]:
    """(rows without and with the adapter, metric, dataset name, number of answers that the heads were fitted to)."""
    adapter = cast(UniHyperLora, job.adapter)
    fitted_to = 0

    def score() -> tuple[float, float]:
        nonlocal fitted_to
        fitted_to = fit_head(job)
        found = job.task.evaluate(adapter.model, job.limits, lambda: False, None)
        assert found is not None
        return found.value, found.loss

    with adapter.host.absent():
        without = Row("no adapter, zero-shot", 0, *score())
    size = adapter.adapter_bytes / 2**20
    moved = Row("adapter, zero-shot", 0, *score(), adapter_mb=size, extra_flops=adapter.overhead)
    return [without, moved], job.task.metric, job.task.name, fitted_to


def final_loss(folder: RunFolder) -> float | None:
    """Loss of the last evaluation on the validation rows; None if there was none."""
    losses = [number(event["loss"]) for event in read_events(folder.events) if is_validation(event)]
    return losses[-1] if losses else None


def _row(what: str, result: Result, folder: RunFolder) -> Row:
    facts = result.adapter_facts
    return Row(
        what,
        result.steps,
        result.metric.get("value"),
        final_loss(folder),
        round(result.elapsed_s, 2),
        result.adapter_mb,
        facts.get("extra_flops"),
        facts.get("active_atoms"),
        result.name,
    )
