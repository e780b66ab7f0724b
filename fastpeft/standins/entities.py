"""Sentences with tagged entities from a fixed grammar, in the place of CoNLL-2003 where there is no network.

Its four types are CoNLL-2003's. Names are made of stems and endings that no tokenizer has seen, and the shipped encoder
knows them as unknown words, in lower case: what surrounds a name has to tell its type. Words of the language are
entities in some places only. "Robin slept" names a person, "the robin slept" a bird; "Mary School" is no person;
"wrote The Sad Robin" names a book, "found the sad robin" nothing.

Validation and test share no made name with training, nor with each other. Half of their sentences have frames that six
in a thousand training sentences have, so that a model meets each two or three times an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

TYPES = ("LOC", "MISC", "ORG", "PER")
LABELS = ("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI"))
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 6_000, 800, 800
RARE_SHARE = 0.006
"""Share of training sentences in rare frames."""
HELD_OUT_SHARE = 0.5
"""The same in validation and test."""

Tagged = tuple[list[str], list[str]]
"""The words of a sentence and their tags."""

# ---- words: common ones are in the shipped encoder's vocabulary, so that they tell what the unknown ones are

_WORDS = {
    "agent": """surgeon dentist chemist physicist biologist carpenter potter weaver priest monk lawyer soldier writer
        poet novelist journalist grocer florist butcher driver trucker pianist drummer violinist striker pitcher""",
    "animal": "poodle beagle terrier pigeon salmon trout cobra viper baboon macaque mouse hamster squirrel gecko whale",
    "thing": "truck van tram motorcycle hammer wrench saw chisel sofa chair bucket barrel canoe kayak suitcase purse",
    "place": "lake garden river barn market church tower school hospital mountain bridge forest castle harbor tavern",
    "adjective": "happy sad rich poor wet dry tall short clean dirty cold calm nervous kind cruel quiet loud",
    "verb": """walked marched crawled whispered shouted mumbled napped dozed danced sang wept sobbed giggled chuckled
        baked rushed tumbled grumbled whined grinned smirked""",
    "did": "kicked pushed followed watched painted helped found washed carried touched noticed praised greeted chased",
    "wrote": "wrote typed drafted scribbled",
    "title": "Doctor Sergeant Corporal Lieutenant General Bishop Rabbi",
}
_SITES = ["Castle", "Bridge", "Tower", "Forest", "Harbor", "Garden"]
_INSTITUTIONS = ["School", "Hospital", "Church", "Market", "Station", "Tavern"]
_GOODS = ["Boot", "Coin", "Puzzle", "Hat", "Shoe", "Sword", "Bench", "Raft"]

# ---- names: endings tell the type to whoever reads word pieces

_ENDINGS = {
    "place": ["mora", "stead", "wick", "dale", "heim"],
    "surname": ["son", "berg", "well", "ski", "ley"],
    "first": ["ina", "ard", "elle", "io"],
    "firm": ["tek", "corp", "dyn", "ex"],
    "people": ["vian", "nese", "lish"],
}


@dataclass(frozen=True)
class _Names:
    """What the splits do not share."""

    stems: tuple[str, ...]
    first: tuple[str, ...]
    """First names that the shipped encoder has read."""
    homonyms: tuple[str, ...]
    """First names that are common nouns too."""
    rare_share: float
    """Of sentences in rare frames."""


def _names(stems: str, first: str, homonyms: str, rare_share: float) -> _Names:
    return _Names(tuple(stems.split()), tuple(first.split()), tuple(homonyms.split()), rare_share)


_TRAIN = _names(
    "Har Vel Tor Bram Quen Lus Mar Ost Fen Gal Kess Dor Wyn Pel Rad Sil Thal Und Vor Zel Bel Cor Dra Esk",
    "Mary John Peter Susan David Laura Robert Helen George Nancy Thomas Karen Julia Paul",
    "Robin Lily Ruby",
    rare_share=RARE_SHARE,
)
_VALIDATION = _names(
    "Nor Ash Hol Ing Jev Kul Lim Pras",
    "Alice Frank Sarah Kevin Linda Mary John Peter",
    "Rose Daisy Robin",
    rare_share=HELD_OUT_SHARE,
)
_TEST = _names(
    "Ard Bry Clev Durn Fal Grem Yar Zim",
    "Brian Carol Simon Linda Susan David",
    "Rose Daisy Lily",
    rare_share=HELD_OUT_SHARE,
)

# ---- frames: small letters are common words, capitals entities

_FRAMES = """
{PERSON} {verb} near the {place} .
{PERSON} {did} the {adjective} {animal} .
{title} {SURNAME} {did} {PERSON} .
the {agent} {did} {PERSON} , and {PERSON} {verb} .
{PERSON} says that {PERSON} {verb} .
{PERSON} , a {adjective} {agent} , {verb} .
{PERSON} , who {verb} , met {title} {SURNAME} near the {place} .
unlike {FIRST} {FIRST} never {verb} .
{HOMONYM} {verb} , and the {homonym} was {adjective} .
the {agent} {did} a {homonym} .
the {homonym} near the {place} was {adjective} .
{HOMONYM} says that a {homonym} {verb} .
{PERSON} walked to {TOWN} .
the {agent} {verb} near {TOWN} , and {PERSON} {verb} near {SITE} .
near {SITE} the {agent} {verb} .
near {TOWN} {FIRST} {verb} .
there was a {animal} near {SITE} .
the {place} near {SITE} was {adjective} , but the {place} of {TOWN} was {adjective} .
{FIRM} sold the {thing} to {PERSON} .
the {thing} was bought by {FIRM} .
{FIRM} owns every {thing} near {TOWN} .
{FIRM} bought a {thing} , and {FIRM} sold it .
{PERSON} was a {agent} at {INSTITUTION} .
the {agent} of {INSTITUTION} {verb} .
{INSTITUTION} , near {SITE} , was {adjective} .
a {PEOPLE} {agent} {verb} near the {place} .
the {PEOPLE} {thing} was {adjective} .
{PERSON} {did} a {PEOPLE} {animal} .
{PERSON} {wrote} {BOOK} .
the {agent} that {wrote} {BOOK} {verb} .
the book {BOOK} was {adjective} .
the {agent} {did} the {adjective} {homonym} .
the {agent} {did} the {adjective} {animal} .
no {agent} {verb} near the {place} .
every {animal} near the {place} was {adjective} and not {adjective} .
the {agent} sold a {thing} to the {agent} .
it is true that the {agent} {wrote} a cookbook at the {place} .
when the {agent} {verb} , {PERSON} {verb} .
while {PERSON} {verb} , the {animal} {verb} .
for the {agent} {FIRST} {did} a {thing} .
like any other {agent} , {PERSON} {verb} .
the {animal} , like any other {animal} , was {adjective} .
so the {agent} {verb} near the {place} .
whoever {verb} near {SITE} was {adjective} .
the {thing} that the {agent} owns was {adjective} .
not one {animal} {verb} .
{PERSON} asked whether the {agent} {verb} .
""".strip().splitlines()

_RARE_FRAMES = """
it was {PERSON} that {did} the {agent} .
{PERSON} asked whether {PERSON} {verb} near {TOWN} .
when {FIRM} bought the {thing} , {PERSON} {verb} .
whoever {verb} at {INSTITUTION} was {adjective} .
the {thing} that {FIRM} owns was washed by {title} {SURNAME} .
for {FIRST} {FIRST} {did} a {thing} .
{title} {SURNAME} of {INSTITUTION} {verb} , but {PERSON} never {verb} .
so {PERSON} {wrote} {BOOK} near {SITE} .
not one {PEOPLE} {agent} {verb} at {INSTITUTION} .
{BOOK} , the book of {PERSON} , is {adjective} .
while {HOMONYM} {verb} , a {homonym} {verb} .
like {TOWN} , {SITE} is {adjective} .
near {SITE} {PERSON} met a {PEOPLE} {agent} .
every {agent} that {verb} at the {place} was {adjective} .
the {adjective} {homonym} , like any other {animal} , {verb} .
""".strip().splitlines()


def train_sentences() -> list[Tagged]:
    return _sentences(_TRAIN, NUM_TRAIN, seed=1)


def validation_sentences() -> list[Tagged]:
    return _sentences(_VALIDATION, NUM_VALIDATION, seed=2)


def test_sentences() -> list[Tagged]:
    return _sentences(_TEST, NUM_TEST, seed=3)


def _sentences(names: _Names, num_sentences: int, seed: int) -> list[Tagged]:
    """Distinct sentences; those without an entity are of few frames, and could otherwise repeat."""
    rng = Random(seed)
    found: dict[str, Tagged] = {}
    while len(found) < num_sentences:
        is_rare = rng.random() < names.rare_share
        words, tags = _fill(rng.choice(_RARE_FRAMES if is_rare else _FRAMES), names, rng)
        words[0] = words[0][0].upper() + words[0][1:]
        found.setdefault(" ".join(words), (words, tags))
    return list(found.values())


def _fill(frame: str, names: _Names, rng: Random) -> Tagged:
    words: list[str] = []
    tags: list[str] = []
    for token in frame.split():
        slot = token.strip("{}")
        if slot in _ENTITIES:
            kind, make = _ENTITIES[slot]
            own = make(names, rng)
            tags += [f"B-{kind}", *[f"I-{kind}"] * (len(own) - 1)]
        else:
            own = [_common(slot, names, rng) if token != slot else token]
            tags.append("O")
        words += own
    return words, tags


def _common(slot: str, names: _Names, rng: Random) -> str:
    return rng.choice(names.homonyms).lower() if slot == "homonym" else rng.choice(_WORDS[slot].split())


def _made(kind: str, names: _Names, rng: Random) -> str:
    return rng.choice(names.stems) + rng.choice(_ENDINGS[kind])


def _person(names: _Names, rng: Random) -> list[str]:
    is_known = rng.random() < 0.7
    first = rng.choice(names.first) if is_known else _made("first", names, rng)
    return [first] if rng.random() < 0.5 else [first, _made("surname", names, rng)]


def _site(names: _Names, rng: Random) -> list[str]:
    town = _made("place", names, rng)
    return ["Lake", town] if rng.random() < 0.25 else [town, rng.choice(_SITES)]


def _firm(names: _Names, rng: Random) -> list[str]:
    name = _made("firm", names, rng)
    return [name] if rng.random() < 0.6 else [name, rng.choice(_GOODS)]


def _institution(names: _Names, rng: Random) -> list[str]:
    kind, place = rng.choice(_INSTITUTIONS), _made("place", names, rng)
    return rng.choice(([place, kind], [rng.choice(names.first), kind], [kind, "of", place]))


def _book(names: _Names, rng: Random) -> list[str]:
    noun = rng.choice((*_WORDS["animal"].split(), *map(str.lower, names.homonyms)))
    return ["The", rng.choice(_WORDS["adjective"].split()).capitalize(), noun.capitalize()]


_ENTITIES: dict[str, tuple[str, Callable[[_Names, Random], list[str]]]] = {
    "PERSON": ("PER", _person),
    "FIRST": ("PER", lambda names, rng: [rng.choice(names.first)]),
    "SURNAME": ("PER", lambda names, rng: [_made("surname", names, rng)]),
    "HOMONYM": ("PER", lambda names, rng: [rng.choice(names.homonyms)]),
    "TOWN": ("LOC", lambda names, rng: [_made("place", names, rng)]),
    "SITE": ("LOC", _site),
    "FIRM": ("ORG", _firm),
    "INSTITUTION": ("ORG", _institution),
    "PEOPLE": ("MISC", lambda names, rng: [_made("people", names, rng)]),
    "BOOK": ("MISC", _book),
}


def splits() -> dict[str, list[dict[str, list[str]]]]:
    """As a dataset's rows: tokens, tags."""
    made = {"train": train_sentences(), "validation": validation_sentences(), "test": test_sentences()}
    return {split: [{"tokens": words, "tags": tags} for words, tags in rows] for split, rows in made.items()}
