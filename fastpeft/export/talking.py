"""A trained language model that answers, token by token: PEFT alone loads it, transformers' `generate` decodes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from fastpeft.config.methods import METHODS
from fastpeft.errors import UserError
from fastpeft.export.loading import load_adapter, load_base, load_whole
from fastpeft.export.plan import ExportError, Plan
from fastpeft.models.backbone import Backbone, quiet_transformers
from fastpeft.tasks import Task, load_task, restore_task
from fastpeft.tasks.trained_on import TrainedOn


@dataclass(frozen=True)
class TalkOptions:
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy."""


class Talker:
    """Of a run's weights."""

    def __init__(self, model: Any, backbone: Backbone, task: Task, name: str) -> None:
        self._model, self._backbone, self._task, self._name = model, backbone, task, name

    @classmethod
    def load(cls, plan: Plan) -> Talker:
        """The run's data are not read: what they are is noted beside the weights.

        Raises:
            UserError: a run of another kind, or a method that PEFT does not know.
            UnavailableError: the base model cannot be had.
        """
        run, noted = plan.run, TrainedOn.read(plan.folder.path)
        if METHODS[run.method].routes:
            raise ExportError(f"{plan.source}: PEFT knows no adapter of {run.method}, so that nothing loads it to talk")
        task = restore_task(noted, run.dataset, run.evaluation) if noted else load_task(run.dataset, run.evaluation)
        if not task.predicts_tokens:
            raise ExportError(f"{plan.folder.path}: a run of the kind {task.kind} answers no questions")
        task.recall(plan.source)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if plan.full:
            backbone = load_whole(plan.source, task, device)
            return cls(backbone.model.eval(), backbone, task, run.model.name)
        backbone = load_base(replace(run.model, fast_layers=False), task, device)
        return cls(load_adapter(backbone.model, plan.source).eval(), backbone, task, run.model.name)

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        options: TalkOptions,
        write: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> str:
        """To the last of the messages, each with role and content. What is known of it is written as it comes.

        Args:
            stop: asked after each token; the answer ends there.

        Raises:
            UserError: messages that the template does not take, or that leave no room for an answer.
        """
        import transformers

        backbone, said = self._backbone, []

        class Stream(transformers.TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                said.append(text)
                write(text)

        prompt = self._task.prompt_tokens(backbone.tokenizer, self._name, messages)
        room = (backbone.max_positions or len(prompt) + options.max_new_tokens) - len(prompt)
        if room < 1:
            raise UserError(f"the conversation has {len(prompt):,} tokens, which is all that the model takes")
        ids = torch.tensor([prompt], device=backbone.model.device)
        sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {}
        with quiet_transformers(), torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(options.max_new_tokens, room),
                eos_token_id=list(backbone.eos_token_ids),
                pad_token_id=backbone.tokenizer.pad_token_id,
                streamer=Stream(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=transformers.StoppingCriteriaList([cast(Any, _Asked(stop))]),
                **({"do_sample": False} | sampling),
            )
        return "".join(said)


class _Asked:
    """A stopping criterion: B of them at once, each the same."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)
