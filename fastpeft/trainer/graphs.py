"""A whole step as one launch: captured once for each bucket of batches, and replayed.

Forward and backward pass, penalty, clipping, guard and update of a small model are some thousand launches, and a GPU
waits for the host between them. A CUDA graph is one launch. A replay does the very operations that were captured, on
the same addresses: so batch, learning rate and count of items are copied into tensors that stay where they are, random
numbers come from the generator's counter on the device, and what the step measured is read from a table behind it.

A step is replayed where its batch is one full micro-batch of a bucket. Any other one, such as an epoch's short last
batch or what was split for lack of memory, launches each operation, on the same buffers.
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
"""Replays that the host is ahead of the device. More would keep it no busier, and a budget in seconds would be found
spent when as many steps more had been launched."""
WARM_STEPS = 2
"""Before a capture: kernels are compiled, and libraries take their workspaces."""
TOLERANCE = 0.02
"""Relative distance of a replay's gradient from that of the launched step: sums in bf16 in another order stay within,
and other random numbers do not."""
LEAST_SHARE = 0.5
"""Of an epoch's steps, that a bucket has to take: fewer are not worth the memory that a captured step keeps."""
_MEASURES = ("loss", "penalty", "penalty_share", "grad_norm", "skipped")


class NotCaptured(Exception):
    """Why steps launch each operation, in words."""


# ---- what is captured --------------------------------------------------------------------------


class Captured(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Captured]
"""Runs a step a few times, and returns what repeats it."""


class CudaCapture:
    """Into graphs that share a pool of memory: one replay at a time, so that they may overlay each other."""

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
            generator.graphsafe_set_state(generator.clone_state())  # the one it had takes itself for captured
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
    """In the schedule's place: the rate that lies on the device."""

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
    """Of _MEASURES, those that the step has."""


class GraphedSteps:
    """The captured steps of `job`, one a bucket."""

    def __init__(self, job: Job, capture: Capture) -> None:
        """Captures. What the warm-up has changed is put back.

        Raises:
            NotCaptured: a step that cannot be, or that does something else when it is replayed.
        """
        self._job, self._capture = job, capture
        device = job.device
        self._rates = _HeldRates(device)
        self._table = torch.zeros(len(_MEASURES), dtype=job.adapter.flat.data.dtype, device=device)
        self.num_replayed = 0
        self.steps: dict[Bucket, BucketStep] = {}
        """The largest first."""
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
        """None where the step has to launch each operation."""
        rows = batches.only_rows
        if rows is None:
            return None
        shape, num_items = shape_of(self._job.batches.encoded, rows), batches.num_items
        return next((bucket for bucket in self.steps if bucket.shape == shape and bucket.takes(num_items)), None)

    def take(self, bucket: Bucket, batches: MicroBatches, progress: float) -> tuple[Signals, Rates]:
        """The optimizer step of these micro-batches. It waits for no more than the step before the last one."""
        rates = self._job.schedule.rates(None, progress)
        (batch,) = batches
        found = self.steps[bucket]
        self.fill(found.inputs, batch, batches.num_items, rates.lr)
        found.captured.replay()
        self.num_replayed += 1
        table = self._table.clone()  # the next replay writes over it
        measured: dict[str, Any] = {name: table[_MEASURES.index(name)] for name in found.has}
        return Signals(num_tokens=batch.num_tokens, **measured), rates

    def fill(self, inputs: StaticBatch, batch: Batch, num_items: int, lr: float) -> None:
        """Put what the next replay reads where it reads it."""
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
        """Every operation of a step. Returns which of _MEASURES it leaves in the table."""
        job, flat = self._job, self._job.adapter.flat
        step = job.adapter, self._rates, job.optimizer, job.task.loss, [inputs.batch()], inputs.num_items
        signals, _ = train_step(*step, progress=0.0)
        measured = {name: getattr(signals, name) for name in _MEASURES}
        nothing = torch.zeros((), device=flat.data.device)
        torch.stack([nothing if value is None else value for value in measured.values()], out=self._table)
        return [name for name, value in measured.items() if value is not None]

    def _check(self, found: BucketStep) -> None:
        """That a replay gives the gradient of the launched step, from the same state."""
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
    """Infinite in the same places, as after an overflow in fp16, and near each other elsewhere."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    return float((a - b).norm()) <= TOLERANCE * float(a.norm())


@contextmanager
def everything_restored(job: Job) -> Iterator[None]:
    """Afterwards parameters, gradients, the optimizer's and the method's state and all random numbers are what they
    were, bit for bit and where they were: a captured step reads them there."""
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


# ---- whether ------------------------------------------------------------------------------------


def use_graphs(job: Job, capture: Capture) -> GraphedSteps:
    """Capture the steps of `job`.

    Raises:
        NotCaptured: it launches each operation, and is as it was.
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
        use_for_sequences(model)  # transformers' own mask asks on the host whether there is padding
    try:
        return GraphedSteps(job, capture)
    except (RuntimeError, NotCaptured) as error:
        reason = str(error).splitlines()[0]
        if is_out_of_memory(error):
            reason = "the memory is too short to keep a captured step"
        elif not isinstance(error, NotCaptured):
            reason = f"capturing it failed: {reason}"
    free_memory()  # outside of the handler, whose frames hold what was captured
    if attention == "sdpa":
        stop_using(model)
    raise NotCaptured(reason)


def capture_steps(job: Job, make_capture: Callable[[torch.device], Capture] = CudaCapture) -> GraphedSteps | None:
    """The captured steps of a job that is to have them, as its rows' shapes tell; None where it has none, which is
    noted where it was to have them."""
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
