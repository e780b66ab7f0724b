"""Ranks 1 and up: they compute their share of each pass, and every update.

They have the same model, data, optimizer and schedule as rank 0, but no run folder, no log and no clock.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from fastpeft.adapters import method_class
from fastpeft.config import ConfigError, RunConfig
from fastpeft.device_memory import TokenLimits, free_memory
from fastpeft.errors import UserError
from fastpeft.ranks import Ranks
from fastpeft.tasks import Task
from fastpeft.trainer.build import Job
from fastpeft.trainer.calibrate import follow_calibration
from fastpeft.trainer.checkpoint_files import Checkpoint, State, joined, split
from fastpeft.trainer.loop import take_step
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.rank_orders import SMALLER_EVALUATION, Act, Order
from fastpeft.trainer.rng import GlobalRng, generator_states, set_generator_states

_SHARED = ("parameters", "adapter", "optimizer", "schedule", "probes", "rng")
"""Parts of a checkpoint that all ranks restore, in this order."""


def refuse_ranks(run: RunConfig, ranks: Ranks) -> None:
    """Raise ConfigError for a run that this number of ranks cannot train."""
    if ranks.size == 1:
        if run.training.shard_base:
            told = "training.shard_base shares the base out over several ranks: set --ranks, or leave it out"
            raise ConfigError("one rank", [told])
        return
    problems, alone = [], "train it without --ranks"
    reason = method_class(run.method).needs_one_rank
    if reason:
        problems.append(f"method {run.method} trains on one rank only: {reason}; {alone}")
    if run.training.cache_prefix:
        problems.append(f"training.cache_prefix keeps a file for one rank: set it off, or {alone}")
    if run.training.fit_head:
        problems.append(f"training.fit_head is done by one rank: set it off, or {alone}")
    if run.training.batch_size < ranks.size:
        problems.append(
            f"training.batch_size {run.training.batch_size} is shared by {ranks.size} ranks, of which some would have "
            f"no row: set it to {ranks.size} or more, or take fewer ranks"
        )
    if problems:
        raise ConfigError(f"{ranks.size} ranks", problems)


def begin_together(job: Job) -> None:
    """Broadcast rank 0's parameters and random state.

    Raises:
        UserError: this rank's data or model differ from rank 0's.
    """
    ranks = job.ranks
    if ranks.size == 1:
        return
    data, flat = job.trained_on.data, job.adapter.flat
    facts = {
        "data": data.to_json()["sha256"],
        "parameters": len(flat.data),
        "tokens": int(job.task.train.lengths.sum()),
    }
    different = [what for what, fact in ranks.told(facts).items() if fact != facts[what]]
    if different:
        raise UserError(
            f"rank {ranks.rank} has other {' and '.join(different)} than rank 0: dataset.path and model.name have to "
            "hold the same files on every host"
        )
    ranks.take_first(flat.data)
    states = ranks.given({str(i): state for i, state in enumerate(generator_states(job.device))})
    set_generator_states(job.device, [states[str(i)] for i in range(len(states))])
    job.notes.append(f"{ranks.size} ranks share each batch of {job.batches.batch_size} rows")


def give_state(ranks: Ranks, checkpoint: Checkpoint) -> None:
    """Rank 0 broadcasts the parts that the other ranks restore."""
    if ranks.size > 1:
        _shared_state(ranks, {name: checkpoint.parts[name] for name in _SHARED})


def _shared_state(ranks: Ranks, parts: State) -> State:
    tensors, values = split(parts)
    return joined(ranks.given(tensors), ranks.told(values))


class Follower:
    """Executes rank 0's orders until the run ends.

    Args:
        resumes: rank 0 restores a checkpoint, and broadcasts it.
    """

    def __init__(self, job: Job, resumes: bool) -> None:
        self._job = job
        self._samples: dict[int, Task] = {}
        if resumes:
            restored = _shared_state(job.ranks, {})
            parts = job.adapter.flat, job.adapter, job.optimizer, job.schedule, job.probes, GlobalRng()
            for name, part in zip(_SHARED, parts, strict=True):
                part.load_state_dict(restored[name])

    def run(self) -> None:
        job = self._job
        while True:
            order = job.orders.next()
            if order.act == Act.END:
                return
            if order.act == Act.STEP:
                self._step(*order.values)
            elif order.act == Act.CALIBRATE:
                follow_calibration(job, int(order.values[0]), self._warn)
            elif order.act == Act.FINISH_CALIBRATION:
                job.adapter.finish_calibration()
            elif order.act in (Act.EVALUATE, Act.SCORE_TEST):
                self._evaluate(order)

    def _step(self, position: float, progress: float, elapsed_s: float) -> None:
        job, step = self._job, int(position)
        take_step(job, MicroBatches(job, step, f"at step {step}", self._warn), progress, elapsed_s)
        job.schedule.told()  # rank 0 has logged the same

    def _evaluate(self, order: Order) -> None:
        """Take part in an evaluation of rank 0's parameters.

        Raises:
            RuntimeError: on the validation split, this rank's parameters differ from rank 0's.
        """
        job, (num_rows, evaluation, training) = self._job, order.values
        is_test, data = order.act == Act.SCORE_TEST, job.adapter.flat.data
        limits = TokenLimits(int(training), int(evaluation))
        free_memory()
        kept = data.clone()
        with nullcontext() if is_test else job.optimizer.averaged():
            own = data.clone()
            job.ranks.take_first(data)
            if not is_test and not torch.equal(own, data):
                raise RuntimeError(f"the parameters of rank {job.ranks.rank} are no longer those of rank 0")
            with job.orders.shared_out():
                task = self._task(int(num_rows))
                score = task.evaluate_test if is_test else task.evaluate
                score(
                    job.adapter.model,
                    limits,
                    job.orders.asked_to_stop,
                    lambda rows, width: self._shrink(limits, rows, width),
                )
        data.copy_(kept)
        job.orders.agree()
        free_memory()

    def _task(self, num_rows: int) -> Task:
        """The task with rank 0's sample of `num_rows` validation rows; 0 is all of them."""
        job = self._job
        if num_rows and num_rows not in self._samples:
            self._samples = {num_rows: job.task.sampled(num_rows, job.backbone, job.device)}
        return self._samples[num_rows] if num_rows else job.task

    def _shrink(self, limits: TokenLimits, num_rows: int, width: int) -> int:
        self._job.orders.refuse_retry("in an evaluation", SMALLER_EVALUATION)
        self._warn(limits.halve_evaluation(num_rows, width, "in an evaluation"))
        return limits.evaluation

    def _warn(self, message: str) -> None:
        print(f"rank {self._job.ranks.rank}: {message}", file=sys.stderr, flush=True)
