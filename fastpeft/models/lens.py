"""A logit lens on the first adapted layer (nostalgebraist 2020; Belrose et al., arXiv:2303.08112): its hidden states,
read by the model's own head.

Shapes: N rows, L tokens of a row, D hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.kernels.sequences import Sequences
from fastpeft.models.lm_head import bare_model, decoder_of, output_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ROWS = 256
"""Largest number of a classifier's rows that are read per micro-batch."""


class FirstLayer:
    """The first layer with a LoRA factor in a causal LM or classifier; without any, the first layer.

    Raises:
        UserError: the model is not a list of layers followed by a norm and a head, or by a classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = bare_model(model)
        layers = next((module for module in self._model.modules() if isinstance(module, nn.ModuleList)), None)
        self.norm, self._class_head = _norm(self._model), _class_head(self._model)
        if not layers or (self.norm is None and not self._class_head):
            raise UserError(
                f"the schedule reads the entropy behind the first layer, and {type(self._model).__name__} has no list "
                "of layers with a norm and a head, or with a classifier such as BERT's, behind it; choose another "
                "schedule"
            )
        adapted = (layer for layer in layers if any(".lora_" in name for name, _ in layer.named_parameters()))
        self.layer = next(adapted, layers[0])
        self._hidden_NLD: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of a forward pass, in which the layer's output is kept, detached."""
        self._hidden_NLD = None

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._hidden_NLD = (output[0] if isinstance(output, tuple) else output).detach()

        hook = self.layer.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """(len(rows), D), normalised as a causal LM's head takes it, for rows of the flattened tokens of the pass that
        was watched; forgets the pass."""
        assert self.norm is not None
        return self.norm(self._take().flatten(0, 1)[rows])

    @torch.no_grad()
    def read_classes(self, sequences: Sequences | None = None) -> torch.Tensor:
        """(at most MOST_ROWS, C) logits in fp32 of rows evenly spaced over the pass that was watched; forgets it.

        Without dropout, so that no random number is drawn. `sequences`: of a pass without padding.
        """
        hidden_NLD = self._take()
        if sequences is not None:
            hidden_NLD = sequences.read(sequences.take_first(hidden_NLD))
        x = hidden_NLD[:: -(-len(hidden_NLD) // MOST_ROWS)]
        training = [module for part in self._class_head for module in part.modules() if module.training]
        for module in training:
            module.training = False
        try:
            *before, classifier = self._class_head
            for part in before:
                x = x.to(next(part.parameters()).dtype)
                # DistilBERT's is a linear map of the first token; poolers, like RoBERTa's classifier, choose it.
                x = part(x) if part is _pooler(self._model) else part(x[:, 0]).relu()
            return classifier(x.to(next(classifier.parameters()).dtype)).float()
        finally:
            for module in training:
                module.training = True

    @torch.no_grad()
    def read_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """(len(rows), C) logits in fp32 of a token classifier's head, for rows of the flattened tokens of the pass that
        was watched; forgets it."""
        (classifier,) = self._class_head
        x = self._take().flatten(0, 1)[rows]
        return classifier(x.to(next(classifier.parameters()).dtype)).float()

    def _take(self) -> torch.Tensor:
        assert self._hidden_NLD is not None
        hidden_NLD, self._hidden_NLD = self._hidden_NLD, None
        return hidden_NLD


def _norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm before the head of a causal LM."""
    if output_embeddings(model) is None:
        return None
    norms = [child for child in decoder_of(model).children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def _class_head(model: PreTrainedModel) -> list[nn.Module]:
    """The modules applied to a classifier's last hidden states; empty if they are unknown."""
    classifier: nn.Module | None = getattr(model, "classifier", None)
    own = getattr(classifier, "original_module", classifier)  # PEFT wraps a trained head
    if (
        classifier is not None
        and isinstance(own, nn.Linear)
        and type(model).__name__.endswith("ForTokenClassification")
    ):
        return [classifier]
    before = _pooler(model) or getattr(model, "pre_classifier", None)
    if classifier is None or (before is None and getattr(model, "base_model_prefix", None) != "roberta"):
        return []
    return [classifier] if before is None else [before, classifier]


def _pooler(model: PreTrainedModel) -> nn.Module | None:
    """The classifier's pooler in DeBERTa, the encoder's in BERT; RoBERTa's and DistilBERT's heads have none."""
    return getattr(model, "pooler", None) or getattr(model.base_model, "pooler", None)
