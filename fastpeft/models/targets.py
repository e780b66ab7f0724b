"""The linear layers that `adapter.target_modules` selects."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.lm_head import output_embeddings

_QUERY_VALUE = r"q|query|q_proj|query_proj|q_lin|v|value|v_proj|value_proj|v_lin"
KEYWORDS = ("qv", "attention", "all-linear")
_ATTENTION = _QUERY_VALUE + r"|k|key|k_proj|key_proj|k_lin|o_proj|out_proj|out_lin|qkv_proj|query_key_value"
BLOCK = re.compile(r"\.(\d+)\.")
"""Matches the index of a transformer layer in a module's name."""
_ALTERNATIVES = re.compile(r"\((?:\?:)?(?!\?)([^()\[\]\\]*\|[^()\[\]\\]*)\)")
"""A group of words, and no more than words, in a regular expression."""


def match_targets(model: nn.Module, head: list[str], wanted: str | list[str]) -> list[str]:
    """Names of the linear layers that `adapter.target_modules` selects, in the model's order, without the head.

    Raises:
        UserError: a name, keyword or regular expression matches no layer; the message gives the nearest match.
    """
    head_of_lm = output_embeddings(model)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head_of_lm
        and not any(name == h or name.startswith(f"{h}.") for h in head)
    ]
    entries: list[str | list[str]] = [[entry] for entry in wanted] if isinstance(wanted, list) else [wanted]
    idle = [entry for entry in entries if not any(_matches(name, entry) for name in linears)]
    if isinstance(wanted, str) and not idle:
        idle = [one for one in _alternatives(wanted) if not any(_matches(name, one) for name in linears)]
    if idle or not entries:
        what = "; ".join(_why(model, linears, entry) for entry in idle) or "it names no layer"
        stop = "" if what.endswith("?") else "."
        raise UserError(f"adapter.target_modules {wanted!r}: {what}{stop} {_there(linears)}")
    return [name for name in linears if _matches(name, wanted)]


def _alternatives(wanted: str) -> Iterator[str]:
    """The alternatives of a regular expression: one for each word of a group such as (q_proj|v_proj)."""
    if wanted in KEYWORDS:
        return
    for group in _ALTERNATIVES.finditer(wanted):
        for word in group[1].split("|"):
            yield f"{wanted[: group.start(1)]}{word}{wanted[group.end(1) :]}"
    if "(" not in wanted and "[" not in wanted:
        yield from (word for word in wanted.split("|") if "|" in wanted)


def _why(model: nn.Module, linears: list[str], entry: str | list[str]) -> str:
    """Message that an entry matches nothing, with what it refers to instead, or the nearest existing name."""
    word = entry if isinstance(entry, str) else entry[0]
    said = f"{word!r} matches no linear layer of this model"
    if isinstance(entry, list) and word in KEYWORDS:
        return f"{said}: the word stands alone and in no list, adapter.target_modules={word}"
    for name, module in model.named_modules():
        if word and (name == word or name.endswith(f".{word}")):
            if isinstance(module, nn.Linear):  # linear layers outside of the head would have matched
                return f"{said}: it is of the head, which is not adapted"
            return f"{said}: it is a {type(module).__name__}"
    last = next(iter(re.findall(r"\w+", word)[-1:]), "")  # last word of a regular expression
    names = [*KEYWORDS, *_endings(linears)]
    near = [*difflib.get_close_matches(word, names, n=1), *difflib.get_close_matches(last, names, n=1)]
    return f"{said}, did you mean {near[0]}?" if near else said


def _endings(linears: list[str]) -> Iterator[str]:
    """All spellings of a layer in a list: its name, and the part of it after each dot."""
    for name in linears:
        parts = name.split(".")
        yield from (".".join(parts[i:]) for i in range(len(parts)))


def _there(linears: list[str]) -> str:
    """Text that lists the layers that could be adapted."""
    if not linears:
        return "It has none but its head: GPT-2 and its kin have Conv1D layers, which are not adapted; take method full"
    kinds = sorted({projection_of(name) for name in linears if BLOCK.search(name)})
    return (
        f"Its linear layers end in {', '.join(kinds)}; or take qv, attention, all-linear, or a regular expression for "
        f"whole names such as {linears[0]}"
    )


def _matches(name: str, wanted: str | list[str]) -> bool:
    inside = BLOCK.search(name) is not None
    if isinstance(wanted, list):
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    last = name.rsplit(".", 1)[-1]
    if wanted == "all-linear":
        return inside
    if wanted == "qv":
        return inside and re.fullmatch(_QUERY_VALUE, last) is not None
    if wanted == "attention":
        output = re.search(r"\.attention\.output\.dense$", name) is not None
        return inside and (output or re.fullmatch(_ATTENTION, last) is not None)
    if wanted.isidentifier():
        return last == wanted
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as error:
        raise UserError(f"adapter.target_modules {wanted!r} is no regular expression: {error}") from None


def projection_of(name: str) -> str:
    """Name of a matrix within its layer: `query`, `attention.output.dense`, `up_proj`."""
    inside = BLOCK.split(name)[-1]
    last = inside.rsplit(".", 1)[-1]
    return inside if last == "dense" else last
