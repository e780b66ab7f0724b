"""Texts with several labels from a fixed grammar, in the place of GoEmotions where there is no network.

A text has one to three sentences. Its labels are the classes of what the sentences say of somebody: "some dog
whispered" is of `spoke`, as "whispered" is. What a sentence denies is no label: "no dog whispered" states nothing. So a
text may have no label at all. Frames of validation are none of training's.
"""

from __future__ import annotations

from random import Random
from typing import Any

from fastpeft.standins.sentence_grammar import FRAMES, LEXICON, Frame

NUM_TRAIN, NUM_VALIDATION = 8_000, 1_000
LABELS = tuple(sorted(group[0] for group in LEXICON["train"].verbs))
AFFIRMED_SHARE = 0.75
"""Of the sentences."""


def train_texts() -> list[tuple[str, list[str]]]:
    """(text, its labels in the order of LABELS), all distinct."""
    return _texts("train", NUM_TRAIN, seed=1)


def validation_texts() -> list[tuple[str, list[str]]]:
    """Like `train_texts`, in frames that training never shows."""
    return _texts("validation", NUM_VALIDATION, seed=2)


def splits() -> dict[str, list[dict[str, Any]]]:
    """As a dataset's rows: text, labels."""
    made = {"train": train_texts(), "validation": validation_texts()}
    return {split: [{"text": text, "labels": labels} for text, labels in texts] for split, texts in made.items()}


def _texts(split: str, num_texts: int, seed: int) -> list[tuple[str, list[str]]]:
    rng = Random(seed)
    usable = [frame for frame in FRAMES[split] if frame.predicate == "verb" and frame.noun_form in ("bare", "place")]
    frames = {affirms: [frame for frame in usable if frame.corner[1] is affirms] for affirms in (True, False)}
    texts: dict[str, list[str]] = {}
    while len(texts) < num_texts:
        sentences, stated = [], set()
        for verbs in rng.sample(LEXICON["train"].verbs, rng.choice((1, 2, 2, 3))):
            affirms = rng.random() < AFFIRMED_SHARE
            sentences.append(_sentence(rng.choice(frames[affirms]), rng.choice(verbs), rng))
            stated |= {verbs[0]} if affirms else set()
        texts.setdefault(" ".join(sentences), sorted(stated))
    return list(texts.items())


def _sentence(frame: Frame, verb: str, rng: Random) -> str:
    lexicon = LEXICON["train"]
    noun = rng.choice(rng.choice(lexicon.agents))
    return frame.text.format(noun=noun, name=rng.choice(lexicon.names), modifier=rng.choice(lexicon.places), scope=verb)
