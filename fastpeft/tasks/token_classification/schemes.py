"""Schemes of entity tags, all brought to IOB2.

- IOB1: I-X everywhere; B-X only where an entity follows another of its type without a gap.
- IOB2: B-X begins every entity, I-X goes on.
- IOBES: S-X is an entity of one word, else B-X, I-X ..., E-X. BILOU: U-X and L-X in place of S-X and E-X.
- IO: types without a prefix. Neighbouring words of one type are one entity, since nothing tells them apart.

What breaks its scheme is mended in the one way that loses no tagged word: whatever cannot continue the entity before it
begins one. It is counted, and the first place is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fastpeft.data.rows import DataError
from fastpeft.tasks.token_classification.sentences import Sentences

Scheme = Literal["iob1", "iob2", "iobes", "bilou", "io"]

OUTSIDE = "O"
UNNAMED_TYPE = "ENTITY"
"""The type of entities in data that have one kind only and write B and I alone."""

_PREFIXES: dict[Scheme, str] = {"iob1": "BI", "iob2": "BI", "iobes": "BIES", "bilou": "BILU"}
_TITLES: dict[Scheme, str] = {"iob1": "IOB1", "iob2": "IOB2", "iobes": "IOBES", "bilou": "BILOU"}
_TAG = re.compile(r"([BIESLU])(?:-(.+))?", re.DOTALL)
_BEGINS, _CONTINUES = "BSU", "IEL"
_ENDS = "ESLU"

Part = tuple[str, str]
"""A tag's prefix and type; ("O", "") outside of entities."""


@dataclass(frozen=True)
class Tagged:
    """Sentences whose tags are legal IOB2."""

    sentences: Sentences
    scheme: Scheme
    """What the tags were in."""
    types: tuple[str, ...]
    """Entity types, sorted."""
    num_entities: int
    num_illegal: int
    """Tags that broke their scheme."""
    note: str
    """Says all this in a sentence."""


def to_iob2(sentences: Sentences, scheme: Scheme | Literal["auto"] = "auto") -> Tagged:
    """Read the tags of a whole split in `scheme`, or in the one that they are found to be in.

    A small split may show less than its scheme: pass what was found in the training split for the others.

    Raises:
        DataError: tags of another scheme, of several, or of none.
    """
    if scheme == "auto":
        scheme = detect_scheme(sentences)
    else:
        _check_prefixes(sentences, scheme)
    tags, num_illegal, first, types = [], 0, "", Counter[str]()
    for i, old in enumerate(sentences.tags):
        parts = [_parse(tag, scheme) for tag in old]
        new, illegal = _convert(parts, scheme)
        if illegal and not num_illegal:
            first = _place(sentences, i, illegal[0])
        num_illegal += len(illegal)
        types.update(tag[2:] for tag in new if tag.startswith("B"))
        tags.append(new)
    num_entities = types.total()
    note = _note(sentences.source, scheme, num_entities, len(types), num_illegal, first)
    return Tagged(replace(sentences, tags=tags), scheme, tuple(sorted(types)), num_entities, num_illegal, note)


def detect_scheme(sentences: Sentences) -> Scheme:
    """The scheme that all the tags of a split are in.

    B and I alone are IOB1 if more entities begin with an I than with a B that IOB1 does not need.

    Raises:
        DataError: tags with and without prefixes, of both IOBES and BILOU, or no O among tags without prefixes, which
            are then parts of speech rather than entities.
    """
    tags = dict.fromkeys(tag for sentence in sentences.tags for tag in sentence)
    parts = {tag: _TAG.fullmatch(tag) for tag in tags if tag != OUTSIDE}
    plain = [tag for tag, match in parts.items() if match is None]
    if plain and len(plain) == len(parts):
        if OUTSIDE not in tags:
            raise DataError(
                f"{sentences.source}: the tags are {_listed(plain)}, and none is O, so that every word would be an "
                "entity; expected tags such as O, B-PER, I-PER. Name the right column in dataset.columns.label"
            )
        return "io"
    if plain:
        raise DataError(_foreign(sentences, plain[0], "is no tag of IOB1, IOB2, IOBES or BILOU, as others are"))
    prefixes = {match[1] for match in parts.values() if match is not None}
    if prefixes & set("ES") and prefixes & set("LU"):
        tag = next(tag for tag in parts if tag[0] in "LU")
        raise DataError(_foreign(sentences, tag, "is of BILOU, but others are of IOBES"))
    if prefixes & set("ES"):
        return "iobes"
    return "bilou" if prefixes & set("LU") else _iob1_or_iob2(sentences)


def label_names(*types: Iterable[str]) -> tuple[str, ...]:
    """O, then B- and I- of each entity type of any split, sorted."""
    return (OUTSIDE, *(f"{prefix}-{name}" for name in sorted(set[str]().union(*types)) for prefix in "BI"))


def _iob1_or_iob2(sentences: Sentences) -> Scheme:
    num_i, num_b = 0, 0
    for tags in sentences.tags:
        parts = [_parse(tag, "iob2") for tag in tags]
        before = (OUTSIDE, "")
        for part in parts:
            begins = part[1] != before[1]
            num_i += part[0] == "I" and begins
            num_b += part[0] == "B" and begins
            before = part
    return "iob1" if num_i > num_b else "iob2"


def _check_prefixes(sentences: Sentences, scheme: Scheme) -> None:
    if scheme == "io":
        return
    for tag in dict.fromkeys(tag for sentence in sentences.tags for tag in sentence):
        match = _TAG.fullmatch(tag)
        if tag != OUTSIDE and (match is None or match[1] not in _PREFIXES[scheme]):
            raise DataError(_foreign(sentences, tag, f"is no tag of {_TITLES[scheme]}", ", or set dataset.scheme=auto"))


def _parse(tag: str, scheme: Scheme) -> Part:
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if scheme == "io":
        return "I", tag
    match = _TAG.fullmatch(tag)
    assert match is not None
    return match[1], match[2] or UNNAMED_TYPE


def _convert(parts: list[Part], scheme: Scheme) -> tuple[list[str], list[int]]:
    """The tags in IOB2, and at which words the scheme was broken."""
    tags, illegal = [], []
    before: Part = (OUTSIDE, "")
    for i, part in enumerate(parts):
        prefix, name = part
        if not _may_follow(before, part, scheme):
            illegal.append(i)
        if prefix == OUTSIDE:
            tags.append(OUTSIDE)
        else:
            continues = prefix in _CONTINUES and before[1] == name and before[0] not in _ENDS
            tags.append(f"{'I' if continues else 'B'}-{name}")
        before = part
    if scheme in ("iobes", "bilou") and before[0] in "BI":
        illegal.append(len(parts) - 1)
    return tags, illegal


def _may_follow(before: Part, part: Part, scheme: Scheme) -> bool:
    same = before[1] == part[1]
    if scheme == "io" or (scheme == "iob2" and part[0] != "I"):
        return True
    if scheme == "iob2":
        return same
    if scheme == "iob1":
        return part[0] != "B" or same
    is_open = before[0] in "BI"
    return is_open and same if part[0] in _CONTINUES else not is_open


def _note(source: str, scheme: Scheme, num_entities: int, num_types: int, num_illegal: int, first: str) -> str:
    found = f"{num_entities:,} entit{'y' if num_entities == 1 else 'ies'} of {num_types} type{'s' * (num_types != 1)}"
    if scheme == "io":
        return f"{source}: tags have no B- or I-, read as IOB2: {found}; neighbouring words of one type are one entity"
    read = "" if scheme == "iob2" else ", read as IOB2"
    mended = (
        f"; {num_illegal:,} tag{'s break' if num_illegal != 1 else ' breaks'} the scheme, first {first}: where an "
        "entity cannot go on, one begins"
    )
    return f"{source}: tags are {_TITLES[scheme]}{read}: {found}{mended if num_illegal else ''}"


def _place(sentences: Sentences, sentence: int, word: int) -> str:
    tag, text = sentences.tags[sentence][word], sentences.words[sentence][word]
    return f"{tag} on word {word + 1}, {text!r:.40}, of the sentence at {sentences.where[sentence]}"


def _foreign(sentences: Sentences, tag: str, what: str, fix: str = "") -> str:
    sentence = next(i for i, tags in enumerate(sentences.tags) if tag in tags)
    word = sentences.tags[sentence].index(tag)
    return f"{_place(sentences, sentence, word)} {what}. Mend the tag or name the column in dataset.columns.label{fix}"


def _listed(tags: list[str]) -> str:
    return ", ".join(tags[:5]) + (", ..." if len(tags) > 5 else "")
