"""`fastpeft doctor --tune`: measure the kernels on this GPU, with a progress line and a final table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastpeft._version import __version__
from fastpeft.errors import UserError
from fastpeft.kernels import dispatch, tune
from fastpeft.kernels.tune import Measure, Outcome

DEFAULT_MODELS = ("deberta-v3-base", "qwen3-0.6b")


def tune_gpu(models: Sequence[str], limit_minutes: float, console: Console | None = None) -> None:
    """Tune the first GPU for the shapes of `models`. Each measurement is saved at once, and survives an interruption.

    Raises:
        UserError: no GPU, no Triton, an unknown model, a table that cannot be read or written.
    """
    shapes = shapes_of(models or DEFAULT_MODELS)
    device = usable_device()
    gpu = dispatch.gpu_name(device.index)
    try:
        path = dispatch.table_path(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise UserError(f"doctor --tune cannot keep a table: {error}") from None
    console = console or Console(highlight=False)
    console.print(f"{gpu}: the shapes of {', '.join(models or DEFAULT_MODELS)}, at most {limit_minutes:g} minutes")
    run_tuning(tune.problems(shapes), device, path, about(gpu), limit_minutes, console)


def run_tuning(
    todo: list[tune.Problem],
    device: torch.device,
    path: Path,
    described: dict[str, str],
    limit_minutes: float,
    console: Console,
    measure: Measure | None = None,
    repeats: int = tune.REPEATS,
) -> list[Outcome]:
    """Tune and show the progress. The table is also printed after Ctrl-C, and the KeyboardInterrupt propagates."""
    outcomes: list[Outcome] = []
    try:
        known = len({p.key for p in todo} & tune.known_rows(path, described).keys())
        with console.status("") as status:
            found = tune.tune(
                todo, device, path, described, until=tune.minutes(limit_minutes), measure=measure, repeats=repeats
            )
            for outcome in found:
                outcomes.append(outcome)
                status.update(f"{known + len(outcomes)} of {len(todo)}: {_words(outcome)}")
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"doctor --tune cannot keep {path}: {error}") from None
    finally:
        if outcomes:
            console.print(as_table(outcomes))
    left = len(todo) - known - len(outcomes)
    console.print(f"{len(outcomes)} measured, {known} known before, {left} left; {path}")
    if left:
        console.print("the time is over: call it again to go on, or give it more with --minutes")
    faults = sum((outcome.faults for outcome in outcomes), Counter())
    if faults:
        console.print("passed over: " + ", ".join(f"{count} x {why}" for why, count in faults.most_common()))
    return outcomes


def usable_device() -> torch.device:
    """The first GPU. Raises UserError without a GPU or without Triton."""
    if not torch.cuda.is_available():
        built = "this is a CPU build of torch" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(
            f"doctor --tune needs a CUDA device, and there is none: {built}. On a CPU there is nothing to "
            "tune; `fastpeft doctor` says what it has found"
        )
    if not dispatch.has_triton():
        raise UserError("doctor --tune measures Triton kernels, and triton cannot be imported: pip install triton")
    return torch.device("cuda", 0)


def shapes_of(names: Iterable[str]) -> list[tuple[int, int]]:
    """Distinct (in, out) of the linear layers of `names`: models of tune.MODELS, or shapes such as 768x3072."""
    shapes: list[tuple[int, int]] = []
    for name in names:
        written = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", name)
        if name not in tune.MODELS and written is None:
            known = ", ".join(tune.MODELS)
            raise UserError(f"--model {name}: not known; there are {known}, or write in and out, such as 768x3072")
        shapes += tune.MODELS[name] if written is None else [(int(written[1]), int(written[2]))]
    return list(dict.fromkeys(shapes))


def about(gpu: str) -> dict[str, str]:
    """Metadata of a table. Entries from other versions of the packages are measured again."""
    import triton

    date = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {"torch": str(torch.__version__), "triton": triton.__version__, "fastpeft": __version__}
    return {"gpu": gpu, **versions, "date": date}


def as_table(outcomes: list[Outcome]) -> Table:
    """A line for each operation and shape: the time of each form, and the form that was chosen."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("operation", "in", "out", "rank", "T", "dtype", "microseconds of each form", "taken", "tiles"):
        table.add_column(name, justify="right" if name in ("in", "out", "rank", "T") else "left")
    for outcome in outcomes:
        operation, dtype, *sizes = outcome.problem.key
        times = ", ".join(f"{form} {us:.1f}" for form, us in sorted(outcome.choice.microseconds.items()))
        config = outcome.choice.config
        tiles = "" if config is None else "x".join(str(n) for n in vars(config).values())
        table.add_row(operation, *map(str, sizes), dtype, times, outcome.choice.form, tiles)
    return table


def _words(outcome: Outcome) -> str:
    problem = outcome.problem
    return f"{problem.operation} {problem.num_in}x{problem.num_out} rank {problem.rank} T {problem.num_tokens}"
