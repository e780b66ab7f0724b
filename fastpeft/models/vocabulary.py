"""Consistency of a tokenizer and its model: an embedding for each token, and a common padding token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpeft.errors import UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_embeddings(model: PreTrainedModel) -> int | None:
    """Number of tokens with an embedding; None for models that read characters or bytes."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    return None if weight is None else weight.shape[0]


def missing_tokens(model: PreTrainedModel, tokenizer: Any, name: str) -> list[int]:
    """Ids of tokens that were added to the tokenizer and have no embedding.

    Raises:
        UnavailableError: tokens of the tokenizer's own vocabulary have no embedding, so that the two do not match.
    """
    num_rows = num_embeddings(model)
    if num_rows is None or len(tokenizer) <= num_rows:
        return []
    added = set(tokenizer.get_added_vocab().values())
    missing = sorted(number for number in tokenizer.get_vocab().values() if number >= num_rows)
    others = [number for number in missing if number not in added]
    if others:
        raise UnavailableError(
            f"model.name {name}: its tokenizer has {len(tokenizer):,} tokens, but the model only {num_rows:,}, and "
            f"{len(others):,} of the others were not added to it, such as "
            f"{tokenizer.convert_ids_to_tokens(others[0])!r}: they do not belong together"
        )
    return missing


def add_embeddings(model: PreTrainedModel, tokenizer: Any, missing: list[int]) -> str:
    """Add an embedding for each missing token, drawn around the mean of the others; returns a message for the user.

    The head of a language model gets the same number of rows.
    """
    num_rows = num_embeddings(model)
    model.resize_token_embeddings(missing[-1] + 1)
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing[:3]))) + ", ..." * (len(missing) > 3)
    count = f"{len(missing):,} added token{'s' * (len(missing) > 1)}"
    return (
        f"the tokenizer has {count} that the model has no embedding for ({names}): its embeddings grow from "
        f"{num_rows:,} to {missing[-1] + 1:,} rows, and the new ones are trained and saved"
    )


def set_padding(model: PreTrainedModel, tokenizer: Any, name: str) -> list[str]:
    """Set one padding token for tokenizer and model, because a decoder used as a classifier reads the last token of
    each row that is not padding. Returns messages for the user."""
    notes = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UnavailableError(f"model.name {name}: its tokenizer has no padding token")
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no padding token: its end of sequence {tokenizer.eos_token!r} pads")
    for settings in {id(found): found for found in (model.config, model.config.get_text_config())}.values():
        settings.pad_token_id = tokenizer.pad_token_id
    return notes
