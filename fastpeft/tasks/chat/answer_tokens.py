"""The tokens of a rendered conversation, and which of them belong to answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from os.path import commonprefix
from typing import Any, NamedTuple

from fastpeft.tasks.chat.answer_spans import Rendered
from fastpeft.tasks.chat.conversations import RowFault
from fastpeft.tasks.chat.overflow import TokenRow
from fastpeft.tasks.chat.templates import ChatTemplate

_TAIL = 64
"""Characters at the end of a prompt that are looked at."""


def token_rows(rendered: Sequence[Rendered], template: ChatTemplate) -> list[list[TokenRow]]:
    """Of each rendered row its tokens, so that those before an answer are those of the text before it by itself: what
    a model is given to go on from.

    Most texts are tokenised as they stand, and compared. Where a token reaches over the border, each answer becomes a
    row of its own, tokenised behind its own prompt.

    Raises:
        RowFault: tokens that do not come back as the text.
    """
    tokenizer = template.tokenizer
    at_end = [len(row.spans) == 1 and row.spans[0][1] == len(row.text) for row in rendered]
    tails = _tails([row.text[: row.spans[0][0]] for row in rendered])
    anchor = cache(partial(_anchor, template))
    anchors = [anchor(tail) if is_last else None for tail, is_last in zip(tails, at_end)]
    is_anchored = [a is not None and a.text not in row.text[row.spans[0][0] :] for row, a in zip(rendered, anchors)]
    short = iter(_tokens(tokenizer, [row.text for row, is_last in zip(rendered, at_end) if is_last]))
    whole = iter(_encoded(tokenizer, [row.text for row, is_last in zip(rendered, at_end) if not is_last]))
    others = [row for row, has_anchor in zip(rendered, is_anchored) if not has_anchor]
    prompts = iter(_tokens(tokenizer, [row.text[:start] for row in others for start, _ in row.spans]))
    is_read = cache(partial(_is_read, tokenizer))
    result = []
    for row, is_last, tail, at, has_anchor in zip(rendered, at_end, tails, anchors, is_anchored):
        own = [] if has_anchor else [next(prompts) for _ in row.spans]
        if at is not None and has_anchor:
            found = _behind(next(short), at)
        elif is_last:
            tokens = next(short)
            is_known = tokenizer.unk_token_id is None or own[0][-1:] != [tokenizer.unk_token_id]
            found = _to_the_end(tokens, own[0]) if is_known and is_read(tail) else None
        else:
            found = _between(row, next(whole), own)
        if found is None and has_anchor:
            own = _tokens(tokenizer, [row.text[: row.spans[0][0]]])
        result.append([found] if found else [_parted(row, *each, tokenizer) for each in zip(row.spans, own)])
    return result


class Anchor(NamedTuple):
    """The last special token of a prompt. A tokenizer splits a text at such tokens before anything else, so that what
    stands before one becomes the same tokens whatever follows."""

    text: str
    id: int
    behind: list[int]
    """Tokens of what a template writes between it and the answer."""


def _anchor(template: ChatTemplate, tail: str) -> Anchor | None:
    """None where the end of a prompt has none, or no tokens for its last character."""
    tokenizer = template.tokenizer
    if not template.splits or not _is_read(tokenizer, tail):
        return None
    ids = _encoded(tokenizer, [tail])[0].ids
    at = next((i for i in reversed(range(len(ids))) if ids[i] in template.splits), None)
    if at is None or tokenizer.unk_token_id in ids[at:]:
        return None
    return Anchor(template.splits[ids[at]], ids[at], ids[at + 1 :])


def _tails(prompts: Sequence[str]) -> Sequence[str]:
    """The end of each prompt: what all of them have in common, as a template writes it, or of each its own."""
    ends = [prompt[: -_TAIL - 1 : -1] for prompt in prompts]
    common = commonprefix(ends)[::-1]  # noqa: RUF071 - of characters, as is meant
    return [common] * len(prompts) if common else [end[::-1] for end in ends]


def _is_read(tokenizer: Any, tail: str) -> bool:
    """The end of a prompt: whether tokens stand for its last character, as for white space they may not."""
    (ids, places), *_ = _encoded(tokenizer, [tail])
    return not tail or (bool(ids) and places is not None and places.token_to_chars(len(ids) - 1)[1] == len(tail))


def _behind(tokens: list[int], anchor: Anchor) -> TokenRow | None:
    """Of a row that ends with its only answer, behind an anchor that the answer has none of. None unless its tokens
    begin with those of the prompt."""
    at = len(tokens) - tokens[::-1].index(anchor.id) if anchor.id in tokens else 0
    first = at + len(anchor.behind)
    if not at or tokens[at:first] != anchor.behind:
        return None
    return TokenRow(tokens, [False] * first + [True] * (len(tokens) - first))


def _to_the_end(tokens: list[int], prompt: list[int]) -> TokenRow | None:
    """Of a row that ends with its only answer; None unless its tokens begin with those of the prompt."""
    first = len(prompt)
    if tokens[:first] != prompt:
        return None
    return TokenRow(tokens, [False] * first + [True] * (len(tokens) - first))


def _between(row: Rendered, whole: Encoded, prompts: Sequence[list[int]]) -> TokenRow | None:
    """Of a row with answers anywhere in it, likewise."""
    places = None if whole.places is None else _places(whole.places, row.spans)
    if places is None or any(whole.ids[:first] != prompt for prompt, (first, _) in zip(prompts, places)):
        return None
    labelled = [False] * len(whole.ids)
    for first, end in places:
        labelled[first:end] = [True] * (end - first)
    return TokenRow(whole.ids, labelled)


def _places(encoding: Any, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Of each span of characters its tokens, from and to; None where a token reaches over an end of one."""
    found = []
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:
            return None
        chars = encoding.token_to_chars(last)
        while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == chars:
            last += 1  # bytes of one character
        if encoding.token_to_chars(first)[0] < start or chars[1] > end:
            return None
        found.append((first, last + 1))
    return found


def _parted(row: Rendered, span: tuple[int, int], prompt: list[int], tokenizer: Any) -> TokenRow:
    """One answer behind its prompt, tokenised by itself: as the beginning of a text, or, where a tokenizer changes
    that, as what follows a special token."""
    text, (start, end) = row.text, span
    special = tokenizer.all_special_tokens[0]
    whole, plain, (first, *behind) = _tokens(tokenizer, [text[:end], text[start:end], special + text[start:end]])
    told = _decoded(tokenizer, whole)
    for answer in (plain, behind if first == tokenizer.convert_tokens_to_ids(special) else plain):
        if _decoded(tokenizer, [*prompt, *answer]) == told:
            return TokenRow([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
    raise RowFault(f"the tokens of the answer {text[start:end][:40]!r} cannot be told from those before it")


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Encoded(NamedTuple):
    ids: list[int]
    places: Any
    """Which token stands for which characters, as tokenizers' Encoding; None where the tokenizer does not know."""


def _encoded(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    """As transformers gives them."""
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [*map(Encoded, found["input_ids"], found.encodings if tokenizer.is_fast else [None] * len(texts))]


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens alone, which a fast tokenizer gives in three quarters of the time."""
    from transformers import PreTrainedTokenizerFast

    is_plain = tokenizer.is_fast and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    if not texts or not is_plain:
        return [each.ids for each in _encoded(tokenizer, texts)]
    _encoded(tokenizer, texts[:1])  # which sets the backend as transformers has it
    return [each.ids for each in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
