"""Builds a Job, all that the loop works with, from a run's configuration. The budget clock has not started yet."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastpeft import phases
from fastpeft.adapters import Adapter, method_class
from fastpeft.budget import BudgetClock, Due, EnergyMeter
from fastpeft.budget.energy import WINDOW_S
from fastpeft.config import Budget, ConfigError, Interval, RunConfig, parse_budget, parse_interval
from fastpeft.config.methods import METHODS
from fastpeft.data import token_cache
from fastpeft.data.batches import Batches
from fastpeft.device_memory import TokenLimits, free_memory, is_out_of_memory
from fastpeft.errors import UserError
from fastpeft.kernels import dispatch
from fastpeft.models.backbone import Backbone, layer_shape
from fastpeft.models.precision import DTYPES, Precision, choose_precision, name_of
from fastpeft.models.sharded_base import ShardedBase, load_sharded
from fastpeft.ranks import Ranks
from fastpeft.schedules import Schedule, make_schedule
from fastpeft.signals import Blocks
from fastpeft.tasks import Task, load_task
from fastpeft.tasks.trained_on import TrainedOn
from fastpeft.trainer.ahead import Ahead
from fastpeft.trainer.evaluation_plan import EvaluationPlan, plan_evaluations
from fastpeft.trainer.graph_choice import choose_graphs
from fastpeft.trainer.head_layer import check_head
from fastpeft.trainer.memory_plan import MemoryPlan, make_plan
from fastpeft.trainer.optim import Optimizer, adam_moments, make_optimizer
from fastpeft.trainer.padding import lay_out, make_batches
from fastpeft.trainer.prefix_cache import PrefixCache
from fastpeft.trainer.probes.hooks import NoProbes, Probes, make_probes
from fastpeft.trainer.rank_orders import NO_ORDERS, SMALLER_EVALUATION, Orders

_HOST = torch.device("cpu")


@dataclass
class Job:
    """One run, ready to train."""

    run: RunConfig
    task: Task
    trained_on: TrainedOn
    adapter: Adapter
    schedule: Schedule
    optimizer: Optimizer
    probes: Probes | NoProbes
    batches: Batches
    clock: BudgetClock
    evaluation_due: Due
    evaluations: EvaluationPlan
    backbone: Backbone
    plan: MemoryPlan
    device: torch.device
    precision: Precision
    ahead: Ahead | None
    """Prefetches batches on a thread; None on a CPU."""
    notes: list[str]
    """Notes on this set-up for the user."""
    prefix_cache: PrefixCache | None = None
    """Outputs of the layers below the first adapter, if training.cache_prefix is set and there is a run folder."""
    orders: Orders = NO_ORDERS
    """Orders from rank 0 to the other ranks."""

    @property
    def ranks(self) -> Ranks:
        return self.orders.ranks

    @property
    def limits(self) -> TokenLimits:
        return self.plan.limits

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype


def build_job(
    run: RunConfig, precision: Precision | None = None, score_test: bool = True, orders: Orders = NO_ORDERS
) -> Job:
    """Load data and model, attach the adapter, tokenise, plan the memory.

    Args:
        precision: the precision that a resumed run began in; when absent training.precision chooses, which may measure.
        score_test: if false, a test split is ignored.
        orders: those of the ranks. All ranks call this together.

    Raises:
        UserError: data, model or configuration that cannot be used.
    """
    ranks = orders.ranks
    device = ranks.device()
    task, backbone, adapter, precision, shard = _load(run, precision, orders, device)
    if run.training.fit_head:
        check_head(adapter.model, backbone, task)
    phases.begin("tokenise", "tokenising")
    with token_cache.in_use(run.dataset.cache_tokens) as cache_notes:
        task.encode(backbone, device)
    if not score_test:
        task.has_test, task.test_cost = False, 0.0
    checked = _check(task, adapter, backbone, orders) if run.model.check else []
    checked += lay_out(run, task, adapter, backbone, device)
    schedule = _schedule(run, adapter)
    optimizer = make_optimizer(adapter.flat, run.optimizer, precision.dtype)
    checked += choose_graphs(run, task, adapter, optimizer, schedule, ranks.size, device)
    batches = make_batches(run, task)
    clock = _clock(run, batches, device, ranks)
    phases.begin("memory", "measuring what a token takes")
    plan = make_plan(run.training, run.evaluation, adapter, task, batches, optimizer.loss_scale, shard)
    evaluations = _first_evaluations(run)
    job = Job(
        run=run,
        task=task,
        trained_on=task.trained_on(),
        adapter=adapter,
        schedule=schedule,
        optimizer=optimizer,
        probes=make_probes(schedule.needs, adapter, optimizer, ranks),
        batches=batches,
        clock=clock,
        evaluation_due=Due(evaluations.interval, len(batches)),
        evaluations=evaluations,
        backbone=backbone,
        plan=plan,
        device=device,
        precision=precision,
        ahead=Ahead(lambda rows: task.collate(rows, device)) if device.type == "cuda" else None,
        notes=[*task.notes, *cache_notes, *backbone.notes, *checked, *_notes(run)],
        orders=orders,
    )
    job.notes += [*adapter.describe(), plan.describe(), *plan.notes, *untuned(adapter, device, precision.dtype)]
    job.notes += [precision.note] if precision.note else []
    if clock.budget.kind in ("seconds", "joules"):
        _expect_final(job) if ranks.rank == 0 else _keep_busy(job)
    return job


class _Loaded(NamedTuple):
    task: Task
    backbone: Backbone
    adapter: Adapter
    precision: Precision
    shard: ShardedBase | None


def _load(run: RunConfig, precision: Precision | None, orders: Orders, device: torch.device) -> _Loaded:
    """Load the data and the model, and attach the adapter."""
    ranks = orders.ranks
    is_shared = run.training.shard_base and ranks.size > 1
    if is_shared:
        orders.in_step = ranks
    phases.begin("data", f"reading {run.dataset.path or run.dataset.name}")
    task = load_task(run.dataset, run.evaluation, run.training.seed)
    phases.begin("model", f"loading {run.model.name}")
    precision = _agreed(precision, run, device, ranks)
    dtype = precision.dtype
    torch.manual_seed(run.training.seed)
    method = method_class(run.method)
    if is_shared:
        backbone, shard = load_sharded(lambda: task.load_model(run.model, dtype, _HOST), ranks, device)
    else:
        backbone, shard = task.load_model(run.model, dtype, device, method.trains_backbone), None
    adapter = method.build(run.adapter, METHODS.own_section(run), backbone)
    adapter.model.train()
    return _Loaded(task, backbone, adapter, precision, shard)


def _schedule(run: RunConfig, adapter: Adapter) -> Schedule:
    rate, moments = run.training.learning_rate, adam_moments(run.optimizer)
    return make_schedule(run.schedule, rate, _blocks(adapter, run), adam=moments, seed=run.training.seed)


def _first_evaluations(run: RunConfig) -> EvaluationPlan:
    """The plan until the cost of an evaluation is known: `auto` is then every fifth of the budget."""
    interval = parse_interval(run.evaluation.every)
    return EvaluationPlan(Interval("fraction", 0.2) if interval.unit == "auto" else interval)


def _agreed(precision: Precision | None, run: RunConfig, device: torch.device, ranks: Ranks) -> Precision:
    """`precision`, or the one that rank 0 has chosen or measured."""
    if ranks.rank == 0:
        precision = precision or choose_precision(run.training.precision, device, lambda: layer_shape(run.model))
    told = ranks.told(precision and name_of(precision.dtype))
    return precision or Precision(DTYPES[told])


def _clock(run: RunConfig, batches: Batches, device: torch.device, ranks: Ranks) -> BudgetClock:
    """The budget clock. Raises ConfigError for a budget in joules without an energy meter."""
    meter, budget = _open_meter(device, ranks), _budget(run, batches)
    if budget.kind == "joules" and ranks.rank == 0 and not meter.works:
        raise _no_meter(run, meter.reason)
    return BudgetClock(budget, meter=meter)


def _check(task: Task, adapter: Adapter, backbone: Backbone, orders: Orders) -> list[str]:
    """Check the model. Too little memory for it gives a note and no error: training may still fit, row by row."""
    phases.begin("check", "checking the model")
    try:
        task.check(adapter.model, backbone)
        return []
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    orders.refuse_retry("while the model was checked", "Set model.check=off")
    free_memory()  # outside of the handler, whose traceback holds the outputs
    return ["the memory is too short to check the model: whether a row's outputs change with its batch is not known"]


def _blocks(adapter: Adapter, run: RunConfig) -> Blocks:
    """The adapter's blocks, with the optimizer's learning-rate ratios for the other parameters."""
    layout = adapter.flat.layout
    is_head = [place >= layout.num_adapter for place, _ in layout.others]
    others = tuple(run.optimizer.head_lr_ratio if head else 1.0 for head in is_head)
    return replace(adapter.flat.blocks, rate_ratios=(1.0,) * layout.num_matrices + others)


def gpu_uuid(device: torch.device) -> str | None:
    """NVML's identifier of the device; None for the CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _open_meter(device: torch.device, ranks: Ranks) -> EnergyMeter:
    """The energy meter. Rank 0 measures for all ranks: its host's CPUs, or the GPUs of all ranks."""
    uuid = gpu_uuid(device)
    if ranks.size == 1:
        return EnergyMeter.open(uuid)
    found = ranks.gathered({"uuid": torch.tensor(list((uuid or "").encode()), dtype=torch.uint8)})
    if ranks.rank > 0:
        return EnergyMeter(None, "rank 0 counts for all")
    if ranks.local_size < ranks.size:
        return EnergyMeter(None, "the ranks are on several hosts, and joules are counted on one")
    uuids = list(dict.fromkeys(bytes(each["uuid"].tolist()).decode() for each in found))
    return EnergyMeter.open(uuid, more=uuids[1:])


def _budget(run: RunConfig, batches: Batches) -> Budget:
    if run.budget is None:
        return Budget("steps", math.ceil(run.training.epochs * len(batches)))
    return parse_budget(run.budget)


def _no_meter(run: RunConfig, reason: str) -> ConfigError:
    needs = f"a budget in joules needs an energy meter, and none can be read here: {reason}"
    return ConfigError(f"budget {run.budget}", [f"{needs}. Give one in s, steps or tok"])


def _expect_final(job: Job) -> None:
    """Measure what the final evaluation and save will cost, and plan the evaluations before it.

    Raises:
        ConfigError: they would take more than half the budget.
    """
    phases.begin("timing", "timing what the final evaluation will take")
    clock = job.clock
    evaluation_s, clock.final_s = _measure_final(job)
    cost = f"take about {clock.final_s:.0f} s"
    final, power_w = clock.final_s, 1.0
    if clock.budget.kind == "joules":
        power_w = _measure_power(job)
        final = clock.final_j = clock.final_s * power_w
        cost = f"cost about {final:.0f} J"
    if final > clock.budget.limit / 2:
        limits = ["evaluation.max_examples"] + job.task.has_test * ["evaluation.max_test_examples"]
        raise ConfigError(
            f"budget {job.run.budget}",
            [
                f"the final evaluation and save alone would {cost}, more than half of it; give a larger budget, or "
                f"set {' and '.join(limits)}"
            ],
        )
    if parse_interval(job.run.evaluation.every).unit == "auto":
        share = evaluation_s * power_w / clock.budget.limit
        job.evaluations = plan_evaluations(share, job.task.num_validation)
        job.evaluation_due.interval = job.evaluations.interval


def _measure_power(job: Job) -> float:
    """Mean power in watts while evaluating, over a window that the meter resolves."""
    meter = job.clock.meter
    meter.start()
    _evaluate_for(1.5 * WINDOW_S, job)
    meter.stop()
    if meter.fault is not None or meter.mean_w <= 0:
        raise _no_meter(job.run, meter.fault or f"{meter.method} stands still")
    return meter.mean_w


def _evaluate_for(seconds: float, job: Job) -> None:
    until = time.perf_counter() + seconds
    while job.orders.in_step.told(time.perf_counter() < until):
        _measure_final(job)


def _keep_busy(job: Job) -> None:
    """What ranks 1 and up do while rank 0 measures: they evaluate too, so that the load is that of an evaluation."""
    _measure_final(job)
    if job.clock.budget.kind == "joules":
        _evaluate_for(1.5 * WINDOW_S, job)


def _measure_final(job: Job) -> tuple[float, float]:
    """(seconds of one evaluation on all rows, seconds of the final evaluation, the test split's and the saves)."""
    while (evaluation_s := _measure_evaluation(job)) is None:
        free_memory()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, job.optimizer.averaged():
        job.adapter.save(Path(folder))
    evaluation_s /= 1 if job.orders.in_step.size > 1 else job.ranks.size  # ranks in step each evaluate every row
    return evaluation_s, evaluation_s * (1 + job.task.test_cost) + 2 * (time.perf_counter() - start)


def _measure_evaluation(job: Job) -> float | None:
    """Seconds of an evaluation; None if it ran out of memory, in which case evaluation batches are now smaller."""
    job.adapter.model.eval()
    try:
        return job.task.time_evaluation(job.adapter.model, job.limits)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        job.orders.refuse_retry("while an evaluation was timed", SMALLER_EVALUATION)
        size = job.task.largest_evaluation_batch(job.limits)
        job.notes.append(job.limits.halve_evaluation(*size, "while an evaluation was timed"))
        return None
    finally:
        job.adapter.model.train()


def untuned(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A note if the kernels were not tuned for the run's shapes on its GPU."""
    if device.type != "cuda":
        return []
    groups = adapter.flat.groups
    shapes = {(group.a_KRI.shape[2], group.b_KOR.shape[1], group.a_KRI.shape[1]) for group in groups}
    try:
        tuned = dispatch.is_tuned(dispatch.gpu_name(device.index or 0), dtype, shapes)
    except ValueError as error:
        raise UserError(str(error)) from None
    if tuned or not shapes:
        return []
    return [
        "kernels are not tuned for this GPU and these shapes, so that cuBLAS computes the LoRA products: "
        "fastpeft doctor --tune measures what is faster"
    ]


def _notes(run: RunConfig) -> Iterator[str]:
    if METHODS[run.method].trains_backbone and any(key.startswith("adapter.") for key in run.overrides):
        yield f"adapter.* was set, but method {run.method} trains every weight and adapts no layer: it is ignored"
    for section in METHODS.section_keys:
        if section != METHODS[run.method].section and any(key.startswith(f"{section}.") for key in run.overrides):
            yield f"{section}.* was set, but method {run.method} does not read it: it is ignored"
