"""Measures which form and tiles of each operation are fastest on a GPU, and writes the GPU's table for `dispatch`.

A candidate first has to agree with the split form. Each is timed once, and those slower than SLOWER times the fastest
are dropped. The split form is always kept. The rest are timed in turns, and the smallest median wins, but the split
form is replaced only by a candidate that is faster by MARGIN. A candidate that does not compile or does not fit the GPU
is only counted.

Only device time is measured: calls are queued behind a pause of the device, so that launch overhead is hidden.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastpeft.kernels import dispatch, gradient_norm, lora_linear
from fastpeft.kernels.dispatch import Choice, Key
from fastpeft.kernels.ops.lora_linear import configs
from fastpeft.kernels.ops.sensitivity import op as sensitivity

Run = Callable[[], list[torch.Tensor]]
Measure = Callable[[Run], float]
"""Microseconds of one call."""

MODELS: dict[str, tuple[tuple[int, int], ...]] = {
    "minilm": ((384, 384), (384, 1536), (1536, 384)),
    "deberta-v3-base": ((768, 768), (768, 3072), (3072, 768)),
    "deberta-v3-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "qwen3-0.6b": ((1024, 2048), (1024, 1024), (2048, 1024), (1024, 3072), (3072, 1024)),
    "hidden-4096": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
"""(in, out) of the linear layers of each model."""

OPERATIONS = ("lora_forward", "lora_backward", "lora_factors", "gradient_norm")
RANKS = (8, 16, 64)
BUCKETS = (2048, 8192, 1024, 4096, 16384)
"""Values of T, in the order of measurement."""
REPEATS = 7
SLOWER, MARGIN = 1.25, 0.02
LONGER_PAUSE = 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative L2 distance from the split form, which itself has rounding errors."""


@dataclass(frozen=True)
class Problem:
    """An operation at one shape."""

    operation: str
    num_in: int
    num_out: int
    rank: int
    """0 where the operation has none."""
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> Key:
        return dispatch.key_of(self.operation, self.dtype, self.num_in, self.num_out, self.rank, self.num_tokens)


@dataclass
class Outcome:
    """The result of tuning one problem."""

    problem: Problem
    choice: Choice
    num_candidates: int
    faults: Counter[str] = field(default_factory=Counter)
    """Number of rejected candidates, by reason."""


def problems(
    shapes: Iterable[tuple[int, int]],
    ranks: Iterable[int] = RANKS,
    buckets: Iterable[int] = BUCKETS,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Problem]:
    """All operations at all shapes. The most common ones come first, because tuning may be stopped early."""
    shapes, found = list(dict.fromkeys(shapes)), []
    for rank in ranks:
        for num_tokens in buckets:
            for num_in, num_out in shapes:
                for operation in OPERATIONS:
                    own_rank = 0 if operation == "gradient_norm" else rank
                    found.append(Problem(operation, num_in, num_out, own_rank, num_tokens, dtype))
    return list(dict.fromkeys(found))


def candidates(problem: Problem) -> list[Choice]:
    """Every form with each of its tile sizes; the split form comes first."""
    if problem.operation == "gradient_norm":
        tiles = sensitivity.DIRECT_FP32 if problem.dtype == torch.float32 else sensitivity.DIRECT
        return [Choice("split"), *(Choice("fused", config) for config in tiles)]
    forms = [form for form in configs.FORMS[problem.operation] if form != "split"]
    return [Choice("split"), *(Choice(form, config) for form in forms for config in configs.CONFIGS[form])]


def tune(
    todo: Iterable[Problem],
    device: torch.device,
    path: Path,
    about: dict[str, str],
    *,
    until: Callable[[], bool] = lambda: False,
    measure: Measure | None = None,
    repeats: int = REPEATS,
) -> Iterator[Outcome]:
    """Tune one problem after another; the table at `path` is rewritten after each.

    Problems in an existing table with the same `about`, dates aside, are skipped. Stops once `until()` is true.

    Raises:
        ValueError: `path` exists and is not a table.
    """
    rows = known_rows(path, about)
    for problem in todo:
        if problem.key in rows:
            continue
        if until():
            return
        outcome = tune_one(problem, device, measure or DeviceTimer(device), repeats)
        rows[problem.key] = outcome.choice
        dispatch.write_table(path, rows, about)
        yield outcome


def known_rows(path: Path, about: dict[str, str]) -> dict[Key, Choice]:
    """Rows of the table at `path` if its header equals `about`, dates aside; else none."""
    if not path.is_file():
        return {}
    rows = dispatch.read_table(path)
    before = json.loads(path.read_text(encoding="utf-8"))
    same = all(before.get(name) == value for name, value in about.items() if name != "date")
    return rows if same else {}


def tune_one(problem: Problem, device: torch.device, measure: Measure, repeats: int = REPEATS) -> Outcome:
    """Time all candidates of one problem and choose one."""
    run, split = build(problem, device), Choice("split")
    with torch.no_grad(), _forced(problem, split):
        reference = [tensor.double() for tensor in run()]
    every, faults = candidates(problem), Counter[str]()
    first: dict[int, float] = {}
    for i, choice in enumerate(every):
        fault = None if choice == split else _fault(problem, run, choice, reference, device)
        if fault is not None:
            faults[fault] += 1
            continue
        with _forced(problem, choice):
            first[i] = measure(run)
    fast = [i for i, us in first.items() if i == 0 or us <= SLOWER * min(first.values())]
    times: dict[int, list[float]] = {i: [] for i in fast}
    for _ in range(repeats):
        for i in fast:
            with _forced(problem, every[i]):
                times[i].append(measure(run))
    medians = first | {i: statistics.median(values) for i, values in times.items() if values}
    best = min(fast, key=medians.__getitem__)
    if medians[best] > (1 - MARGIN) * medians[0]:
        best = 0
    forms: dict[str, float] = {}
    for i, us in medians.items():
        forms[every[i].form] = round(min(us, forms.get(every[i].form, us)), 3)
    return Outcome(problem, Choice(every[best].form, every[best].config, forms), len(every), faults)


@contextmanager
def _forced(problem: Problem, choice: Choice) -> Iterator[None]:
    """Use `choice` for the problem's operation, and the split form for all other operations that it calls."""
    with dispatch.forced(Choice("split"), *OPERATIONS), dispatch.forced(choice, problem.operation):
        yield


def _fault(
    problem: Problem, run: Run, choice: Choice, reference: list[torch.Tensor], device: torch.device
) -> str | None:
    """The reason to reject a candidate; None if it is valid."""
    try:
        with _forced(problem, choice):
            got = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # Triton and CUDA raise many types for a kernel that does not compile or fit
        return type(error).__name__
    for mine, theirs in zip(got, reference, strict=True):
        if not (mine.double() - theirs).norm() <= TOLERANCE[problem.dtype] * theirs.norm():
            return "differs from the split form"
    return None


# ---- problems as calls -----------------------------------------------------------------------


def build(problem: Problem, device: torch.device) -> Run:
    """A call of the problem's operation alone, on random tensors."""
    num_tokens, num_in, num_out = problem.num_tokens, problem.num_in, problem.num_out
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x_TI, dy_TO = random(num_tokens, num_in), random(num_tokens, num_out)
    if problem.operation == "gradient_norm":
        return lambda: [gradient_norm(x_TI, dy_TO)]
    weight_OI = random(num_out, num_in) / num_in**0.5
    a_RI = random(problem.rank, num_in, dtype=torch.float32) / num_in**0.5
    b_OR = random(num_out, problem.rank, dtype=torch.float32) / problem.rank**0.5

    def forward() -> torch.Tensor:
        return lora_linear(x_TI, weight_OI, None, a_RI, b_OR, 2.0)

    if problem.operation == "lora_forward":
        return lambda: [forward()]
    wanted = [x_TI] if problem.operation == "lora_backward" else [a_RI, b_OR]
    for tensor in wanted:
        tensor.requires_grad_()
    with torch.enable_grad(), dispatch.forced(Choice("split"), *OPERATIONS):
        y_TO = forward()
    return lambda: list(torch.autograd.grad(y_TO, wanted, dy_TO, retain_graph=True))


class DeviceTimer:
    """Device time of one call, in microseconds.

    If the pause ends before all calls are queued, launch overhead would be included. The measurement is then repeated
    with twice the pause, up to LONGER_PAUSE times the first.
    """

    def __init__(self, device: torch.device, calls: int = 8, pause_cycles: int = 400_000) -> None:
        """`pause_cycles` is the pause per call: 400,000 cycles are about 0.2 ms, enough for the host to launch it."""
        self._device, self._calls, self._pause_cycles = device, calls, pause_cycles * calls
        self._longest = LONGER_PAUSE * self._pause_cycles

    def __call__(self, run: Run) -> float:
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            while True:
                torch.cuda._sleep(self._pause_cycles)
                begin.record()
                for _ in range(self._calls):
                    run()
                end.record()
                late = begin.query()
                end.synchronize()
                if not late or self._pause_cycles >= self._longest:
                    break
                self._pause_cycles *= 2
        return begin.elapsed_time(end) * 1e3 / self._calls


def minutes(limit: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """A function that returns True once `limit` minutes have passed."""
    end = clock() + 60 * limit
    return lambda: clock() >= end
