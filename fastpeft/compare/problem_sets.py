"""Scores one run's weights on several problem sets, to separate what it learned from what it may have memorised.

The comparison follows arXiv:2405.00332, in which models overfitted to GSM8K score lower on new problems of its kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.config import RunConfig, load_run
from fastpeft.config.methods import METHODS
from fastpeft.config.tasks import TASKS
from fastpeft.errors import UserError
from fastpeft.runs.store import RunFolder, list_runs, read_json, recover_folder, write_json

if TYPE_CHECKING:
    import torch

    from fastpeft.tasks.base import OtherSet, Score

SETS = "sets.json"
_SPLITS = ("train", "dev", "validation", "test")
_OPTIONS = ("max_new_tokens", "calculator", "pass_at", "num_samples", "temperature", "top_p")


@dataclass(frozen=True)
class SetPlan:
    """Weights and the sets that they are scored on; made without torch."""

    folder: RunFolder
    run: RunConfig
    """The stored config, with the options of this call."""
    weights: Path
    which: str
    """best or last."""
    step: int | None
    """Step at which the weights were saved."""
    sets: dict[str, Path]


@dataclass(frozen=True)
class SetScore:
    name: str
    num: int
    exact_match: float
    interval: tuple[float, float]
    """Wilson's 95 % interval of `exact_match`."""
    more: dict[str, float]
    """Further metrics, as shares of all problems: no_answer, cut, no_room, pass@k."""


def make_plan(
    run: str, on: list[str], results_dir: Path = Path("results"), last: bool = False, pass_at: int | None = None
) -> SetPlan:
    """Args:
        run: a run's name under `results_dir`.
        on: PATH or NAME=PATH of each set: a file, or a folder with a test.* file or with one file only.
        last: take the last weights instead of the best.
        pass_at: k of pass@k, 0 for none; the run's own evaluation.pass_at when None.

    Raises:
        UserError: no such run, no such weights, a missing set, two sets of one name.
    """
    folder = RunFolder.at(results_dir, run)
    if not folder.config.is_file():
        names = ", ".join(other.path.name for other in list_runs(results_dir)) or "none"
        raise UserError(f"{run}: there is no such run in {results_dir}; there are: {names}")
    if pass_at is not None and pass_at < 0:
        raise UserError(f"--pass-at {pass_at}: give the k of pass@k, or 0 for none")
    config = load_run(folder.config)
    if pass_at is not None:
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, pass_at=pass_at))
    which, other = ("last", "best") if last else ("best", "last")
    saved_as = METHODS[config.method].saved_as
    weights = folder.weights(saved_as, best=not last)
    recover_folder(weights)
    if not weights.is_dir():
        has_other = folder.weights(saved_as, best=last).is_dir()
        fix = f"it has the {other} ones: {'leave out' if last else 'add'} --last" if has_other else "train it first"
        raise UserError(f"{folder.path} has no {which} weights; {fix}")
    found = folder.read_result()
    step = (read_json(weights / "best.json") or {}).get("step") if not last else found and found.steps
    return SetPlan(folder, config, weights, which, step, dict(_named(on)))


def _named(on: list[str]) -> Iterator[tuple[str, Path]]:
    taken: dict[str, Path] = {}
    for text in on:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            path = Path(text).expanduser()
            name = path.resolve().parent.name if path.stem in _SPLITS else path.resolve().stem
        else:
            path = Path(rest).expanduser()
        if not name or not (rest or not equals):
            raise UserError(f"--on {text}: expected PATH or NAME=PATH")
        if not path.exists():
            raise UserError(f"--on {text}: there is no file or folder {path}")
        if name in taken:
            raise UserError(f"--on {text}: {taken[name]} is named {name} too; write NAME={path}")
        taken[name] = path
        yield name, path


def score_sets(plan: SetPlan, say: Callable[[str], None]) -> list[SetScore]:
    """Score every set. Each score is merged into RUN/sets.json as soon as it is known.

    Raises:
        DataError: a set that cannot be read.
        UserError: the run's kind of task does not support further sets; no prompt of a set leaves room for an
            answer.
    """
    import torch

    from fastpeft.adapters import method_class
    from fastpeft.device_memory import UNMEASURED_TOKENS, TokenLimits
    from fastpeft.trainer.memory_plan import plan_evaluation

    run, result = plan.run, plan.folder.read_result()
    sets = _read_sets(plan, result.kind if result else "")
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, method = _dtype_of(plan, device), method_class(run.method)
    if result is not None and result.stand_in:
        say(f"STAND-IN: these are numbers of {run.model.name}, trained on {result.dataset}")
    say(f"loading {run.model.name} with {plan.weights}")
    backbone = next(iter(sets.values())).load_model(run.model, dtype, device, method.trains_backbone)
    adapter = method.build(run.adapter, METHODS.own_section(run), backbone)
    adapter.load(plan.weights)
    adapter.model.eval()
    limits = TokenLimits(UNMEASURED_TOKENS, UNMEASURED_TOKENS)

    def shrink(num_rows: int, width: int) -> int:
        say(limits.halve_evaluation(num_rows, width, "while a set was scored"))
        return limits.evaluation

    weights = {"which": plan.which, "step": plan.step, "sha256": _fingerprint(plan.weights.glob("*.safetensors"))}
    for one in sets.values():
        one.encode(backbone)
        if run.model.check:
            one.check(adapter.model, backbone)
    scores = []
    for name, one in sets.items():
        *_, more = plan_evaluation(
            run.evaluation.batch_tokens,
            partial(one.try_scoring, adapter.model),
            one.largest_batch,
            limits,
            adapter.model,
        )
        for note in [*one.notes, *more]:
            say(f"{name}: {note}")
        found = one.score(adapter.model, limits, shrink)
        scores.append(_score(name, found))
        _merge(plan, scores[-1], one, found, weights, str(dtype))
        say(f"{name}: {found.value:.4f} on {found.num_rows:,} problems in {found.decode_s:.0f} s")
    return scores


def _read_sets(plan: SetPlan, trained_on: str) -> dict[str, Any]:
    """Sets by name. `trained_on` is the kind of task in the run's result."""
    from fastpeft.tasks import kind_of, task_class

    run = plan.run
    kind = task_class(kind_of(run.dataset, trained_on))
    if not kind.scores_other_sets:
        others = ", ".join(name for name in TASKS.names if task_class(name).scores_other_sets)
        raise UserError(
            f"{plan.folder.path.name}: was trained on {kind.kind} ({run.dataset.name}), and --on scores {others}; name "
            "a run that was trained on that, or leave --on out"
        )
    return {
        name: kind.read_set(path, run.dataset, run.evaluation, run.training.seed) for name, path in plan.sets.items()
    }


def _score(name: str, found: Score) -> SetScore:
    num_right = round(found.value * found.num_rows)
    return SetScore(name, found.num_rows, found.value, wilson(num_right, found.num_rows), found.more)


def _dtype_of(plan: SetPlan, device: torch.device) -> torch.dtype:
    """The dtype of the training if recorded, else the one that training.precision selects here."""
    from fastpeft.models.backbone import layer_shape
    from fastpeft.models.precision import DTYPES, choose_precision

    noted = (read_json(plan.folder.environment) or {}).get("dtype")
    trained_in = next((dtype for dtype in DTYPES.values() if str(dtype) == noted), None)
    return (
        trained_in or choose_precision(plan.run.training.precision, device, lambda: layer_shape(plan.run.model)).dtype
    )


def _merge(plan: SetPlan, score: SetScore, other: OtherSet, found: Score, weights: dict[str, Any], dtype: str) -> None:
    path, run = plan.folder.path / SETS, plan.run
    entry = {
        "file": other.source,
        "sha256": _fingerprint([Path(other.source)]),
        "num": score.num,
        "num_skipped": other.num_skipped,
        "exact_match": score.exact_match,
        "interval_95": score.interval,
        **score.more,
        "weights": weights,
        "options": {
            **{key: getattr(run.evaluation, key) for key in _OPTIONS},
            "prompt": run.dataset.prompt,
            "max_length": run.dataset.max_length,
            "seed": run.training.seed,
            "dtype": dtype,
        },
        "decode_s": found.decode_s,
        "decode_tokens": found.decode_tokens,
    }
    write_json(path, (read_json(path) or {}) | {score.name: entry})


def _fingerprint(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (1927, doi:10.1080/01621459.1927.10502953)."""
    from scipy.stats import binomtest

    limits = binomtest(num_right, num).proportion_ci(method="wilson")
    return float(limits.low), float(limits.high)


def difference(score: SetScore, first: SetScore) -> tuple[float, float, float]:
    """(score - first, low, high of its 95 % interval), for independent sets: Newcombe's hybrid score (1998, method 10,
    doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I)."""
    (low, high), (first_low, first_high) = score.interval, first.interval
    apart = score.exact_match - first.exact_match
    down = math.hypot(score.exact_match - low, first_high - first.exact_match)
    up = math.hypot(high - score.exact_match, first.exact_match - first_low)
    return apart, apart - down, apart + up
