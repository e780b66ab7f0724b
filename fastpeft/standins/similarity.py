"""Pairs of sentences with a graded similarity from a fixed grammar, in the place of STS-B where there is no network.

Both sentences say that some members of a set have a property, or lack it. The score adds up what the two have in
common: the noun, the property, the adjective, and which members are meant (`POINTS`). A noun or a property of the same
class, such as "poodle" and "beagle", counts half. Words and frames of validation are none of training's.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from fastpeft.standins.sentence_grammar import FRAMES, LEXICON, Frame

NUM_TRAIN, NUM_VALIDATION = 8_000, 1_000
POINTS = {"noun": 2.0, "property": 1.5, "adjective": 1.0, "quantifier": 0.5}
"""5.0 in total, as in STS-B."""
KIN = 0.5
"""Share of the points for two words of one class."""


def train_pairs() -> list[tuple[str, str, float]]:
    """(one sentence, the other, score), all distinct."""
    return _pairs("train", NUM_TRAIN, seed=1)


def validation_pairs() -> list[tuple[str, str, float]]:
    """Like `train_pairs`, in words and frames that training never shows."""
    return _pairs("validation", NUM_VALIDATION, seed=2)


def splits() -> dict[str, list[dict[str, Any]]]:
    """As a dataset's rows: sentence1, sentence2, score."""
    made = {"train": train_pairs(), "validation": validation_pairs()}
    return {
        split: [{"sentence1": one, "sentence2": other, "score": score} for one, other, score in pairs]
        for split, pairs in made.items()
    }


def _pairs(split: str, num_pairs: int, seed: int) -> list[tuple[str, str, float]]:
    rng, lexicon = Random(seed), LEXICON[split]
    frames = [frame for frame in FRAMES[split] if (frame.noun_form, frame.predicate) == ("adjective", "verb")]
    pairs: dict[tuple[str, str], float] = {}
    while len(pairs) < num_pairs:
        nouns, share_noun = _two_words(lexicon.agents, rng)
        verbs, share_verb = _two_words(lexicon.verbs, rng)
        adjectives, share_adjective = _two_words(lexicon.antonyms, rng)
        share_adjective = float(share_adjective == 1)  # of a class are antonyms only
        chosen, share_quantifier = _two_frames(frames, rng)
        one, other = (
            frame.text.format(noun=noun, scope=verb, modifier=adjective)
            for frame, noun, verb, adjective in zip(chosen, nouns, verbs, adjectives)
        )
        shares = (share_noun, share_verb, share_adjective, share_quantifier)
        score = sum(points * share for points, share in zip(POINTS.values(), shares))
        if one != other:
            pairs.setdefault((one, other), score)
    return [(one, other, score) for (one, other), score in pairs.items()]


def _two_words(classes: Sequence[Sequence[str]], rng: Random) -> tuple[tuple[str, str], float]:
    """Two words, and how near they are: the same in half of the pairs, of one class in a quarter."""
    near = rng.choice((1.0, 1.0, KIN, 0.0))
    group, another = rng.sample(list(classes), 2)
    first = rng.choice(group)
    if near == 1:
        return (first, first), near
    others = [word for word in group if word != first] if near else another
    return (first, rng.choice(others)), near


def _two_frames(frames: Sequence[Frame], rng: Random) -> tuple[tuple[Frame, Frame], float]:
    """Two frames, and whether they speak of as many members and both affirm, or both deny: in half of the pairs."""
    is_same, first = rng.random() < 0.5, rng.choice(frames)
    second = rng.choice([frame for frame in frames if (frame.corner == first.corner) == is_same])
    return (first, second), float(is_same)
