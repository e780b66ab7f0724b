"""Patches by which models of transformers read packed batches, without padding.

A model reads a padded batch as N x L tokens and a mask. A patched model reads 1 x T tokens, positions that restart with
each row, and Sequences in place of the mask. Projections, norms and feed-forward networks then compute real tokens
only, and attention stays within a row. A head that reads the first token of each row gets N x 1 tokens.

A patch changes the class of the model before the head, as swaps do. Calls with a mask are unchanged. Each patch was
written for the forward pass of the versions in KNOWN. Unknown models keep padded batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.kernels.ops.varlen_attention.op import Way, choose_way
from fastpeft.kernels.sequences import Sequences
from fastpeft.models.fast.attention_functions import use_for_sequences
from fastpeft.models.fast.deberta import DisentangledAttention
from fastpeft.models.fast.swaps import made

KNOWN = (5, 17), (5, 24)
"""The first and the last minor version of transformers that the patches were tested with."""


def use_varlen(model: Any) -> str | None:
    """Patch a model to accept Sequences in place of a mask. Its results for batches with a mask do not change.

    Args:
        model: a model of transformers, with or without the layers of models.fast, outside of a PeftModel.

    Returns:
        Why it cannot be patched; None if it was patched.
    """
    import transformers

    version = transformers.__version__
    if not KNOWN[0] <= tuple(map(int, version.split(".")[:2])) <= KNOWN[1]:
        first, last = (".".join(map(str, each)) for each in KNOWN)
        return f"transformers {version} is none of {first} to {last}, whose models it knows"
    name = type(model).__name__
    family = _FAMILIES.get(name)
    if family is None:
        return f"{name} is no model that it knows"
    base = getattr(model, model.base_model_prefix)
    fault = family.fault(base)
    if fault is not None:
        return f"{name}: {fault}"
    if not isinstance(base, Varlen):
        # transformers uses a class's module and name to look up which outputs it can record
        kept = ("__module__", type(base).__module__), ("reads_first", name.endswith("ForSequenceClassification"))
        base.__class__ = made(family.patch, type(base), kept)
        if family.head is not None:
            model.__class__ = made(family.head, type(model), (("__module__", type(model).__module__),))
    return None


def attention_way(model: Any) -> Way | None:
    """The implementation of attention within rows in a model patched by use_varlen, in training; None for DeBERTa,
    which has its own kernel."""
    base = getattr(model, model.base_model_prefix)
    if isinstance(base, VarlenDeberta):
        return None
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    key_heads = getattr(settings, "num_key_value_heads", None) or heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    drops = getattr(settings, "attention_probs_dropout_prob", 0) or getattr(settings, "attention_dropout", 0)
    query = torch.empty(0, heads, width, dtype=base.dtype, device=base.device)
    return choose_way(query, key_heads, isinstance(base, (VarlenDecoder, VarlenLlama)), drops or 0.0)


class Varlen(nn.Module):
    """Base class placed before the class of a model without its head."""

    reads_first: bool
    """Whether the head reads the first token of each row."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Sequences | dict[str, Any] | None = None,
        *more: Any,
        **named: Any,
    ) -> Any:
        if isinstance(attention_mask, Sequences):
            assert input_ids is not None
            assert not more, "heads name what they hand on"
            return self.rows(input_ids, attention_mask, **named)
        return super().forward(input_ids, attention_mask, *more, **named)

    @abstractmethod
    def rows(self, input_ids: torch.Tensor, sequences: Sequences, **named: Any) -> Any:
        """The forward pass over packed rows; `input_ids` is (1, T)."""

    def for_head(self, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Input of the head: (N, 1, D) if it reads first tokens, else (1, T, D). `x` may hold first tokens only."""
        if not self.reads_first:
            return x
        is_first = x.shape[0] == sequences.num_rows and x.shape[1] == 1
        return sequences.read(x if is_first else sequences.take_first(x))


class VarlenBert(Varlen):
    """BertModel."""

    embeddings: nn.Module
    encoder: nn.Module
    pooler: nn.Module | None
    first_position = 0

    def rows(
        self,
        input_ids: torch.Tensor,
        sequences: Sequences,
        *,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        position_ids = position_ids + self.first_position
        x = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        x = self.for_head(self.encoder(x, attention_mask=sequences).last_hidden_state, sequences)
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=None if self.pooler is None else self.pooler(x)
        )


class VarlenRoberta(VarlenBert):
    """RobertaModel, whose positions start after the padding token's id."""

    config: Any

    @property
    def first_position(self) -> int:
        return self.config.pad_token_id + 1


class VarlenDistilBert(Varlen):
    """DistilBertModel."""

    embeddings: nn.Module
    transformer: nn.Module

    def rows(self, input_ids: torch.Tensor, sequences: Sequences, *, position_ids: torch.Tensor, **_: Any) -> Any:
        found = self.transformer(self.embeddings(input_ids, None, position_ids), attention_mask=sequences)
        found.last_hidden_state = self.for_head(found.last_hidden_state, sequences)
        return found


class VarlenDeberta(Varlen):
    """DebertaV2Model with relative attention and fastpeft's disentangled attention."""

    embeddings: nn.Module
    encoder: Any

    def rows(
        self,
        input_ids: torch.Tensor,
        sequences: Sequences,
        *,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        x = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        rel_embeddings = self.encoder.get_rel_embedding()
        for layer in self.encoder.layer:
            x, _ = layer(x, sequences, rel_embeddings=rel_embeddings)
        return BaseModelOutput(last_hidden_state=self.for_head(x, sequences))


class VarlenDecoder(Varlen):
    """A decoder that accepts one mask per kind of layer: Qwen3, Gemma 3."""

    def rows(self, input_ids: torch.Tensor, sequences: Sequences, **named: Any) -> Any:
        masks: dict[str, Any] = dict.fromkeys(("full_attention", "sliding_attention"), sequences)
        return super().forward(input_ids, masks, **named | {"use_cache": False})


class VarlenLlama(Varlen):
    """LlamaModel, which builds one mask for all its layers itself."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    layers: nn.ModuleList
    norm: nn.Module

    def rows(
        self,
        input_ids: torch.Tensor,
        sequences: Sequences,
        *,
        position_ids: torch.Tensor,
        use_cache: bool | None = None,
        **more: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        x = self.embed_tokens(input_ids)
        rotation = self.rotary_emb(x, position_ids=position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=sequences, position_embeddings=rotation, position_ids=position_ids, **more)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class ReadsLast(nn.Module):
    """A decoder with a sequence classifier, which reads the last token of each row that is not padding."""

    score: nn.Module
    base_model_prefix: str
    config: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Sequences | None = None,
        *more: Any,
        **named: Any,
    ) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        if not isinstance(attention_mask, Sequences):
            return super().forward(input_ids, attention_mask, *more, **named)
        assert input_ids is not None
        x = getattr(self, self.base_model_prefix)(input_ids, attention_mask, **named).last_hidden_state[0]
        padding = self.config.get_text_config().pad_token_id
        counts = torch.ones_like(input_ids[0], dtype=torch.bool) if padding is None else input_ids[0] != padding
        last = attention_mask.read(attention_mask.last(counts))
        return SequenceClassifierOutput(logits=self.score(x.index_select(0, last)))


# ---- which models ------------------------------------------------------------------------------


class _Family(NamedTuple):
    patch: type[Varlen]
    fault: Callable[[Any], str | None]
    """Makes the model's attention accept packed rows; returns why it cannot, or None."""
    head: type[nn.Module] | None = None
    """Class placed before that of the whole model, if its head supports padded rows only."""


def _attention_fault(base: Any) -> str | None:
    if use_for_sequences(base):
        return None
    return f"its attention is {getattr(base.config, '_attn_implementation', None)}, not sdpa"


def _encoder_fault(base: Any) -> str | None:
    return "it is set up as a decoder" if getattr(base.config, "is_decoder", False) else _attention_fault(base)


def _deberta_fault(base: Any) -> str | None:
    if base.encoder.conv is not None:
        return "it has a convolution, which reads beyond a row"
    attentions = (layer.attention.self for layer in base.encoder.layer)
    if not all(isinstance(attention, DisentangledAttention) for attention in attentions):
        return "its attention is transformers' own, which takes padded rows only"
    return None


def _decoder_fault(base: Any) -> str | None:
    if getattr(base.config, "use_bidirectional_attention", False):
        return "its attention is no causal one"
    return _attention_fault(base)


_ENCODERS = {
    "Bert": _Family(VarlenBert, _encoder_fault),
    "Roberta": _Family(VarlenRoberta, _encoder_fault),
    "DistilBert": _Family(VarlenDistilBert, _encoder_fault),
    "DebertaV2": _Family(VarlenDeberta, _deberta_fault),
}
_LLAMA, _DECODER = _Family(VarlenLlama, _decoder_fault), _Family(VarlenDecoder, _decoder_fault)
_FAMILIES = {
    f"{prefix}For{head}": family
    for prefix, family in _ENCODERS.items()
    for head in ("SequenceClassification", "TokenClassification")
} | {
    "LlamaForCausalLM": _LLAMA,
    "LlamaForTokenClassification": _LLAMA,
    "LlamaForSequenceClassification": _LLAMA._replace(head=ReadsLast),
    "Qwen3ForCausalLM": _DECODER,
    "Qwen3ForTokenClassification": _DECODER,
    "Qwen3ForSequenceClassification": _DECODER._replace(head=ReadsLast),
    "Gemma3ForCausalLM": _DECODER,
    "Gemma3TextForSequenceClassification": _DECODER._replace(head=ReadsLast),
}
"""Families by the class of the whole model."""
