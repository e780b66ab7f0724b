"""CUDA graphs: a whole step is captured once for each bucket of batches, and replayed as one launch.

A small model's forward and backward pass, penalty, clipping, guard and update are about a thousand launches, and a GPU
waits for the host between them. A replay repeats the captured operations on the same addresses. So batch, learning rate
and item count are copied into tensors with fixed addresses, random numbers come from the generator's counter on the
device, and the step's measurements are read from a table afterwards.

A step is replayed if its batch is one full micro-batch of a bucket. Any other step, such as an epoch's short last batch
or a batch split for lack of memory, launches each operation, on the same buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fastpeft import phases
from fastpeft.data.batches import Batch, micro_batches
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.models.fast.attention_functions import stop_using, use_for_sequences
from fastpeft.signals import Measured, Rates, Signals
from fastpeft.trainer.buckets import Bucket, StaticBatch, find_buckets, shape_of
from fastpeft.trainer.build import Job
from fastpeft.trainer.graph_choice import told
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.rng import generator_states, set_generator_states
from fastpeft.trainer.step import train_step

MOST_AHEAD = 2
"""Replays that the host may be ahead of the device. More would not keep the device busier, and would overrun a budget
in seconds by as many steps."""
WARM_STEPS = 2
"""Steps before a capture, in which kernels are compiled and libraries allocate their workspaces."""
TOLERANCE = 0.02
"""Largest relative distance between the gradients of a replay and of the launched step. Another summation order in bf16
stays within it; other random numbers do not."""
LEAST_SHARE = 0.5
"""Least share of an epoch's steps that buckets must take. Fewer do not justify the memory that captured steps hold."""
_MEASURES = ("loss", "penalty", "penalty_share", "grad_norm", "skipped")


class NotCaptured(Exception):
    """Steps are not captured; the message says why."""


# ---- the capture -------------------------------------------------------------------------------


class Captured(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Captured]
"""Runs a step a few times, and returns its captured form."""


class CudaCapture:
    """Captures into graphs that share one memory pool, which is safe because they are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._replayed: deque[torch.cuda.Event] = deque()

    def __call__(self, step: Callable[[], None]) -> Captured:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_STEPS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process, such as a tracker's, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                step()
        except BaseException:
            generator = torch.cuda.default_generators[self._device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())  # the old one still counts as captured
            raise
        return _CudaStep(graph, self._keep_pace)

    def _keep_pace(self) -> None:
        self._replayed.append(torch.cuda.Event())
        self._replayed[-1].record(torch.cuda.current_stream(self._device))
        if len(self._replayed) > MOST_AHEAD:
            self._replayed.popleft().synchronize()


@dataclass(frozen=True)
class _CudaStep:
    graph: torch.cuda.CUDAGraph
    keep_pace: Callable[[], None]

    def replay(self) -> None:
        self.graph.replay()
        self.keep_pace()


class _HeldRates:
    """Stands in for the schedule in a captured step: the learning rate is read from a device tensor."""

    def __init__(self, device: torch.device) -> None:
        self.lr = torch.zeros((), dtype=torch.float64, device=device)

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        return Rates(lr=float("nan"), lr_on_device=self.lr)


@dataclass(frozen=True)
class BucketStep:
    """The step of one bucket."""

    inputs: StaticBatch
    step: Callable[[], None]
    """Launches each operation."""
    captured: Captured
    has: tuple[str, ...]
    """The entries of _MEASURES that the step has."""


class GraphedSteps:
    """The captured steps of `job`, one a bucket."""

    def __init__(self, job: Job, capture: Capture) -> None:
        """Capture all buckets, then restore what the warm-up steps changed.

        Raises:
            NotCaptured: a step that cannot be captured, or whose replay computes another gradient.
        """
        self._job, self._capture = job, capture
        device = job.device
        self._rates = _HeldRates(device)
        self._table = torch.zeros(len(_MEASURES), dtype=job.adapter.flat.data.dtype, device=device)
        self.num_replayed = 0
        self.steps: dict[Bucket, BucketStep] = {}
        """Largest bucket first."""
        buckets = find_buckets(job.task, job.batches)
        with everything_restored(job):
            for i, (bucket, rows) in enumerate(buckets.items()):
                phases.progress(i, len(buckets), "buckets")
                batch = job.task.collate(rows, device)
                self.steps[bucket] = self._capture_bucket(bucket, batch, job.task.num_items(rows))

    def describe(self) -> str:
        rows = self._job.batches.batch_size
        if self._job.batches.encoded.varlen:
            tokens = ", ".join(map(str, sorted({bucket.num_tokens for bucket in self.steps})))
            filled = f"one behind another, filled up to {tokens} tokens"
        else:
            widths = ", ".join(str(bucket.num_tokens // rows) for bucket in reversed(self.steps))
            filled = f"padded to {widths} tokens"
        return f"a step is one CUDA graph, for batches of {rows} rows {filled}"

    # ---- the step --------------------------------------------------------------------------

    def bucket_of(self, batches: MicroBatches) -> Bucket | None:
        """The bucket that replays these micro-batches; None if the step has to launch each operation."""
        rows = batches.only_rows
        if rows is None:
            return None
        shape, num_items = shape_of(self._job.batches.encoded, rows), batches.num_items
        return next((bucket for bucket in self.steps if bucket.shape == shape and bucket.takes(num_items)), None)

    def take(self, bucket: Bucket, batches: MicroBatches, progress: float) -> tuple[Signals, Rates]:
        """Replay the optimizer step of these micro-batches. The host waits at most for the step before the last one."""
        rates = self._job.schedule.rates(None, progress)
        (batch,) = batches
        found = self.steps[bucket]
        self.fill(found.inputs, batch, batches.num_items, rates.lr)
        found.captured.replay()
        self.num_replayed += 1
        table = self._table.clone()  # the next replay overwrites it
        measured: dict[str, Any] = {name: table[_MEASURES.index(name)] for name in found.has}
        return Signals(num_tokens=batch.num_tokens, **measured), rates

    def fill(self, inputs: StaticBatch, batch: Batch, num_items: int, lr: float) -> None:
        """Copy the next replay's inputs to the addresses that it reads."""
        inputs.fill(batch, num_items)
        self._rates.lr.fill_(lr)

    # ---- capturing -------------------------------------------------------------------------

    def _capture_bucket(self, bucket: Bucket, batch: Batch, num_items: int) -> BucketStep:
        if batch.rows is not None and len(batch.rows) != num_items:
            raise NotCaptured("the loss is a mean over something else than the labelled tokens")
        inputs = StaticBatch(bucket, batch)
        has: list[str] = []

        def step() -> None:
            has[:] = self._launch(inputs)

        self.fill(inputs, batch, num_items, self._job.run.training.learning_rate)
        captured = self._capture(step)
        found = BucketStep(inputs, step, captured, tuple(has))
        self._check(found)
        return found

    def _launch(self, inputs: StaticBatch) -> list[str]:
        """Launch every operation of a step. Returns the entries of _MEASURES that it writes to the table."""
        job, flat = self._job, self._job.adapter.flat
        step = job.adapter, self._rates, job.optimizer, job.task.loss, [inputs.batch()], inputs.num_items
        signals, _ = train_step(*step, progress=0.0)
        measured = {name: getattr(signals, name) for name in _MEASURES}
        nothing = torch.zeros((), device=flat.data.device)
        torch.stack([nothing if value is None else value for value in measured.values()], out=self._table)
        return [name for name, value in measured.items() if value is not None]

    def _check(self, found: BucketStep) -> None:
        """Raise NotCaptured unless a replay gives the launched step's gradient from the same state."""
        job = self._job
        results = []
        for run in (found.step, found.captured.replay):
            with everything_restored(job):
                run()
                results.append((job.adapter.flat.grad.clone(), self._table.clone()))
        launched, replayed = results
        if not all(map(_alike, launched, replayed)):
            raise NotCaptured("a replayed step gives another gradient than the same step launch by launch")


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are non-finite in the same places, as after an fp16 overflow, and close elsewhere."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    return float((a - b).norm()) <= TOLERANCE * float(a.norm())


@contextmanager
def everything_restored(job: Job) -> Iterator[None]:
    """Restore parameters, gradients, optimizer and method state and random state on exit, bit for bit and at the same
    addresses, which a captured step reads."""
    buffers = {"data": job.adapter.flat.data, "summed": job.adapter.flat.summed}
    for name, part in (("optimizer", job.optimizer), ("adapter", job.adapter)):
        state = part.state_dict()
        buffers |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    generators = generator_states(job.device)
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
        set_generator_states(job.device, generators)


# ---- whether to capture -------------------------------------------------------------------------


def use_graphs(job: Job, capture: Capture) -> GraphedSteps:
    """Capture the steps of `job`.

    Raises:
        NotCaptured: steps launch each operation. The job is as it was.
    """
    if job.plan.checkpointed:
        raise NotCaptured("layers that are computed again in the backward pass set random numbers back on the host")
    share = _share_in_one_pass(job)
    if share < LEAST_SHARE:
        raise NotCaptured(
            f"{1 - share:.0%} of the batches are several micro-batches, or fewer rows than training.batch_size"
        )
    model: Any = job.backbone.model
    attention = getattr(model.config, "_attn_implementation", None)
    sample = job.task.collate(job.batches.rows(0)[:1], job.device)
    if "attention_mask" in sample.inputs and sample.sequences is None:
        use_for_sequences(model)  # transformers' own mask checks on the host for padding
    try:
        return GraphedSteps(job, capture)
    except (RuntimeError, NotCaptured) as error:
        reason = str(error).splitlines()[0]
        if is_out_of_memory(error):
            reason = "the memory is too short to keep a captured step"
        elif not isinstance(error, NotCaptured):
            reason = f"capturing it failed: {reason}"
    free_memory()  # outside of the handler, whose traceback holds what was captured
    if attention == "sdpa":
        stop_using(model)
    raise NotCaptured(reason)


def capture_steps(job: Job, make_capture: Callable[[torch.device], Capture] = CudaCapture) -> GraphedSteps | None:
    """The captured steps of a job. None if its rows were not given few shapes, or if capturing fails (with a note)."""
    if not job.batches.encoded.has_few_shapes:
        return None
    phases.begin("graphs", "capturing the step")
    try:
        graphs = use_graphs(job, make_capture(job.device))
    except NotCaptured as refused:
        job.task.train = job.batches.encoded = replace(job.task.train, only_widths=(), packings=())
        job.notes.append(told(str(refused)))
        return None
    job.notes.append(graphs.describe())
    return graphs


def _share_in_one_pass(job: Job) -> float:
    batches, limit = job.batches, job.limits.training
    whole = [
        len(rows) == batches.batch_size
        and len(micro_batches(batches.encoded, rows, limit)) == 1
        and shape_of(batches.encoded, rows) is not None
        for rows in batches.epoch(0)
    ]
    return sum(whole) / len(whole)
