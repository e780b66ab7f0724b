"""Which rows are held out, which are sampled, and which stand in two splits. The same ones whatever the training seed.

A row has one or several texts (a sentence, or a pair's two), and any number of classes.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

Texts = tuple[Hashable, ...]

_SEED = 0


def choose_held_out(num_rows: int, num_held_out: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out), each in order."""
    order = list(range(num_rows))
    random.Random(_SEED).shuffle(order)
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


def sample(num_rows: int, limit: int) -> list[int]:
    """`limit` of the rows, drawn at random, in order; 0 takes all. The first rows of a sorted file are of one class."""
    if not 0 < limit < num_rows:
        return list(range(num_rows))
    return sorted(random.Random(_SEED).sample(range(num_rows), limit))


def sample_note(num_rows: int, limit: int, what: str) -> list[str]:
    """What the user should know of it; nothing where all rows are taken."""
    if not 0 < limit < num_rows:
        return []
    return [f"scored on {limit:,} of {num_rows:,} {what}, drawn at random, the same ones for every seed"]


def held_out_note(name: str, count: int, num_rows: int, what: str, unread: Iterable[Path]) -> str:
    """Of a dataset without a validation split.

    Args:
        count: are held out of `num_rows`.
        what: they are called.
        unread: files that might have been meant for one.
    """
    files, share = ", ".join(path.name for path in unread), f"{count / num_rows:.0%}"
    beside = f"; not read: {files}" if files else ""
    return f"{name} has no validation split: {share} of its training {what}, {count:,}, are held out{beside}"


def hold_out(
    texts: Sequence[Texts], classes: Sequence[Collection[Hashable]], fraction: float
) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out), each in order: no text stands on both sides, and each class does in its share.

    A class of which two rows can be parted has one on each side at least. Where most rows hang together by what they
    share, only those with the same text in the column of longest texts are kept together, or at last equal rows.

    Args:
        texts: of each row, column by column.
        classes: of each row.
        fraction: share of the rows that is held out; at least one row is.
    """
    wanted = max(1, round(len(texts) * fraction))
    groups = next((found for found in _groupings(texts) if _leaves_room(found, wanted)), None)
    groups = groups or _equal_rows(texts)
    held_out = {row for group in _stratified(groups, classes, wanted) for row in group}
    if not held_out:  # every class is of one group
        held_out = set(min(groups, key=len) if len(groups) > 1 else choose_held_out(len(texts), wanted)[1])
    return [row for row in range(len(texts)) if row not in held_out], sorted(held_out)


def num_shared(texts: Sequence[Texts], others: Sequence[Texts]) -> tuple[int, list[int]]:
    """Of the rows of `others` how many stand in `texts` as a whole, and how many do with their text of each column."""
    whole = _num_in(texts, others)
    if len(texts[0]) == 1:
        return whole, [whole]
    return whole, [_num_in(known, asked) for known, asked in zip(zip(*texts), zip(*others))]


def _num_in(known: Iterable[Hashable], asked: Sequence[Hashable]) -> int:
    there = set(asked).intersection(known)
    return sum(one in there for one in asked)


def shared_note(texts: Sequence[Texts], others: Sequence[Texts], what: str, columns: Sequence[str] = ()) -> list[str]:
    """Counts the rows of another split whose texts are trained on: what is scored on them is partly memory.

    Args:
        what: the other split's rows are called.
        columns: names of the texts, where a row has several.
    """
    whole, by_column = num_shared(texts, others)
    parts = [(whole, " as a whole" if len(columns) > 1 else "")]
    parts += [(num, f" by {name!r}") for num, name in zip(by_column, columns) if len(columns) > 1]
    said = [f"{num:,} ({num / len(others):.1%}){how}" for num, how in parts if num]
    return [f"of {len(others):,} {what} these stand in the training rows too: {', '.join(said)}"] if said else []


def _groupings(texts: Sequence[Texts]) -> Iterator[list[list[int]]]:
    """Rows that share a text of any column; of one column, that of the longest texts first."""
    yield _groups(texts)
    columns = sorted(zip(*texts), key=lambda column: sum(len(str(text)) for text in column), reverse=True)
    if len(columns) > 1:
        yield from (_groups([(text,) for text in column]) for column in columns)


def _equal_rows(texts: Sequence[Texts]) -> list[list[int]]:
    return _groups([(row,) for row in texts])


def _leaves_room(groups: list[list[int]], wanted: int) -> bool:
    return sum(len(group) for group in groups if len(group) <= wanted) >= 2 * wanted


def _groups(texts: Sequence[Texts]) -> list[list[int]]:
    """Rows that share a text of the same column, directly or through others, in an order of chance."""
    parent = list(range(len(texts)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first: dict[tuple[int, Hashable], int] = {}
    for row, own in enumerate(texts):
        for place in enumerate(own):
            parent[root(row)] = root(first.setdefault(place, row))
    members: dict[int, list[int]] = defaultdict(list)
    for row in range(len(texts)):
        members[root(row)].append(row)
    groups = list(members.values())
    random.Random(_SEED).shuffle(groups)
    return groups


def _stratified(groups: list[list[int]], classes: Sequence[Collection[Hashable]], wanted: int) -> Iterator[list[int]]:
    """Groups of about `wanted` rows in all, of each class its share. A group counts for its rarest class."""
    counts = Counter(one for own in classes for one in own)
    strata: dict[Hashable, list[list[int]]] = defaultdict(list)
    for group in groups:
        there = [one for row in group for one in classes[row]]
        strata[min(there, key=lambda one: (counts[one], str(one)), default=None)].append(group)
    sizes = {stratum: sum(map(len, members)) for stratum, members in strata.items()}
    for stratum, most in _shares(sizes, wanted).items():
        members, num_held_out = strata[stratum], 0
        for group in members:
            if num_held_out + len(group) <= most:
                num_held_out += len(group)
                yield group
        if most and not num_held_out and len(members) > 1:
            yield min(members, key=len)


def _shares(sizes: dict[Hashable, int], wanted: int) -> dict[Hashable, int]:
    """`wanted` by the sizes and the largest remainders; of two rows or more one is taken at least, and one is left."""
    exact = {stratum: wanted * size / sum(sizes.values()) for stratum, size in sizes.items()}
    shares = {stratum: int(share) for stratum, share in exact.items()}
    by_remainder = sorted(exact, key=lambda stratum: shares[stratum] - exact[stratum])
    for stratum in by_remainder[: wanted - sum(shares.values())]:
        shares[stratum] += 1
    return {stratum: min(max(share, 1), sizes[stratum] - 1) for stratum, share in shares.items()}
