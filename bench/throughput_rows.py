"""Training of the rows of bench/throughput.py: fastpeft in its own loop, the peers in their trainers' loops.

Both stop between two steps and ask `Turns` whether to continue, so that whole iterations of the loop are timed: batch,
forward, backward, update, and everything else in a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from bench.hf_trainer import load_model, trainer_settings, with_lora
from bench.throughput_inputs import Inputs
from bench.throughput_presets import (
    LEVERS,
    PACKED,
    PEERS,
    PREFIX,
    PRESETS,
    PRODUCT,
    Peer,
    Plan,
    Preset,
    levers_of,
    with_settings,
)
from fastpeft.config import RunConfig
from fastpeft.data.batches import Batches, TokenRows
from fastpeft.models.backbone import quiet_transformers
from fastpeft.models.precision import DTYPES
from fastpeft.models.targets import match_targets
from fastpeft.runs.events import Event, EventLog, number
from fastpeft.runs.store import Result, RunFolder
from fastpeft.runs.system import Heartbeat
from fastpeft.tasks import load_task
from fastpeft.trainer.build import Job, build_job, gpu_uuid
from fastpeft.trainer.graphs import capture_steps
from fastpeft.trainer.loop import Loop
from fastpeft.trainer.micro_batches import out_of_memory_is_told
from fastpeft.trainer.run import keep_prefix

Pause = Callable[[int, int], bool]
"""(steps taken, their tokens without padding) -> whether to stop, called between two steps, as
bench.throughput_worker.Turns."""


def train(row: str, plan: Plan, folder: Path, seed: int, pause: Pause, curve: bool = False) -> list[float]:
    """Train until `pause` returns true. Returns the steps' losses if `curve`."""
    inputs = Inputs.read(folder)
    with tempfile.TemporaryDirectory() as own:
        if row.startswith(PRODUCT):
            return _train_product(plan.run(folder, seed, levers_of(row)), row, inputs, Path(own), pause)
        run, preset = plan.run(folder, seed), PRESETS[plan.preset]
        return _train_peer(PEERS[row], run, preset, inputs, Path(own), pause, curve)


# ---- fastpeft ------------------------------------------------------------------------------


class GivenBatches(Batches):
    """One epoch of given batches: the rows of each step."""

    def __init__(self, encoded: TokenRows, steps: list[np.ndarray]) -> None:
        super().__init__(encoded, len(steps[0]), seed=0)
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        return self._steps


def _train_product(run: RunConfig, row: str, inputs: Inputs, folder: Path, pause: Pause) -> list[float]:
    losses: list[float] = []
    own_settings: dict[str, dict[str, Any]] = {
        PREFIX: {"training.cache_prefix": True},
        PACKED: {"training.padding": "none"},
    }
    run = with_settings(run, own_settings.get(row, {}))

    def on_event(event: Event) -> None:
        if event["type"] == "step":
            losses.append(number(event["loss"]))

    with ExitStack() as stack:
        for name, is_on in levers_of(row).items():
            if (switch := LEVERS[name].switch) is not None:
                stack.enter_context(switch(is_on))
        stack.enter_context(quiet_transformers())
        job = build_job(run)
        assert np.array_equal(job.batches.encoded.tokens, inputs.tokens), "other tokens than the peers'"
        if row == PACKED and not job.task.train.varlen:
            raise ValueError(next(note for note in job.notes if "training.padding" in note))
        job.batches = GivenBatches(job.batches.encoded, inputs.batches())
        own = RunFolder.at(folder, "run")
        own.create()
        stack.callback(own.unlock)
        keep_prefix(job, own)
        _read_once(job)
        graphs = capture_steps(job)
        log = EventLog(own.events, (on_event,))
        stack.callback(log.close)
        result = Result(run_id=run.run_id, name="run")
        loop = Loop(job, own, log, result, lambda: pause(job.clock.steps, job.clock.tokens), graphs=graphs)
        stack.enter_context(Heartbeat(lambda **figures: loop.log.event("system", **figures), gpu_uuid(job.device)))
        stack.enter_context(out_of_memory_is_told())
        loop.run(None)
        job.clock.stop()
    return losses


def _read_once(job: Job) -> None:
    """Fill the prefix cache, if there is one, with the rows of all steps, as a first epoch does."""
    if job.prefix_cache is None:
        return
    for rows in job.batches.epoch(0):
        batch = job.task.collate(rows, job.device)
        with job.prefix_cache.reading(rows, batch, lambda new: job.task.collate(new, job.device)):
            pass


# ---- peers ---------------------------------------------------------------------------------


class _Rows(Dataset):
    """The rows of all steps in order, for a sequential sampler."""

    def __init__(self, inputs: Inputs, is_causal: bool) -> None:
        self._inputs, self._is_causal = inputs, is_causal
        self._order = np.concatenate(inputs.batches()).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self._inputs.feature(self._order[place], self._is_causal)


class _Counted:
    """A collator that records each batch's tokens without padding. Per batch, since loaders run ahead of steps."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._collate = collate
        self.num_tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.num_tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self._collate(rows)


def _train_peer(
    peer: Peer, run: RunConfig, preset: Preset, inputs: Inputs, folder: Path, pause: Pause, curve: bool
) -> list[float]:
    import transformers

    transformers.set_seed(run.training.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model.name, local_files_only=True)
    is_causal = preset.is_causal
    settings = peer_settings(peer, run, preset, folder, len(inputs.batches())) | ({"logging_steps": 1} if curve else {})
    with quiet_transformers():
        model = _unsloth_model(run) if peer.trainer == "unsloth" else with_lora_of(run)
        if peer.trainer == "trl":
            trainer, counted = _trl_trainer(peer, model, tokenizer, settings, run, inputs)
        else:
            counted = _Counted(_collator(tokenizer, peer, run, is_causal))
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**settings),
                train_dataset=_Rows(inputs, is_causal),
                data_collator=counted,
                processing_class=tokenizer,
            )
        watch = _Watch(counted, trainer.args.gradient_accumulation_steps, pause)
        trainer.add_callback(watch.callback())
        trainer.train()
    return watch.losses


def with_lora_of(run: RunConfig) -> nn.Module:
    task = load_task(run.dataset, run.evaluation, run.training.seed)
    return with_lora(load_model(task, run), task, run)


def peer_settings(peer: Peer, run: RunConfig, preset: Preset, folder: Path, num_steps: int) -> dict[str, Any]:
    """TrainingArguments from the run's settings; everything else is the trainers' default."""
    training, optimizer = run.training, run.optimizer
    rows = preset.peer_rows or training.batch_size
    return trainer_settings(run, folder, "sequential") | {
        "max_steps": num_steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": training.batch_size // rows,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "bf16": DTYPES[training.precision] == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        **peer.arguments,
    }


def _collator(tokenizer: Any, peer: Peer, run: RunConfig, is_causal: bool) -> Any:
    import transformers

    padding: dict[str, Any] = {"padding": peer.padding, "max_length": run.dataset.max_length}
    if is_causal:
        return transformers.DataCollatorForSeq2Seq(tokenizer, **padding)
    return transformers.DataCollatorWithPadding(tokenizer, **padding)


class _Watch:
    """Asks `pause` between a trainer's steps."""

    def __init__(self, counted: _Counted, passes: int, pause: Pause) -> None:
        self._counted, self._passes, self._pause = counted, passes, pause
        self.losses: list[float] = []

    def callback(self) -> Any:
        import transformers

        watch = self

        class Callback(transformers.TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                watch._pause(0, 0)

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                num_steps = state.global_step
                num_tokens = sum(watch._counted.num_tokens[: num_steps * watch._passes])
                control.should_training_stop |= watch._pause(num_steps, num_tokens)

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any) -> None:
                if "loss" in logs:
                    watch.losses.append(float(logs["loss"]))

        return Callback()


def _trl_trainer(
    peer: Peer, model: nn.Module, tokenizer: Any, settings: dict[str, Any], run: RunConfig, inputs: Inputs
) -> tuple[Any, _Counted]:
    """Loss on the answers alone. Packing is to the longest length, with about as many tokens per step as other rows."""
    import datasets
    import trl

    lengths = np.diff(inputs.offsets)
    rows = range(len(lengths)) if peer.packing else np.concatenate(inputs.batches()).tolist()
    columns = {
        "input_ids": [inputs.feature(row, True)["input_ids"] for row in rows],
        "completion_mask": [
            [0] * p + [1] * (n - p) for n, p in zip(lengths[rows].tolist(), inputs.labels[rows].tolist())
        ],
    }
    own = {"max_length": run.dataset.max_length, "completion_only_loss": True, "gradient_checkpointing": False}
    if peer.packing:
        packed = max(1, round(lengths[inputs.steps_SB].sum(1).mean() / run.dataset.max_length))
        batches = {"per_device_train_batch_size": packed, "gradient_accumulation_steps": 1}
        own |= {"packing": True, "train_sampling_strategy": "random"} | batches
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings | own),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    counted = trainer.data_collator = _Counted(trainer.data_collator)
    return trainer, counted


def _unsloth_model(run: RunConfig) -> nn.Module:
    import unsloth

    settings: dict[str, Any] = {"max_seq_length": run.dataset.max_length, "load_in_4bit": False}
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        run.model.name, dtype=DTYPES[run.training.precision], **settings
    )
    targets: Sequence[str] = {name.rsplit(".", 1)[-1] for name in match_targets(model, [], run.adapter.target_modules)}
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=run.adapter.rank,
        lora_alpha=run.adapter.alpha,
        lora_dropout=run.adapter.dropout,
        target_modules=sorted(targets),
        bias="none",
        use_gradient_checkpointing=False,
        random_state=run.training.seed,
    )
