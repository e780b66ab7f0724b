"""The grammar behind the embedded task: its words, its sentence frames, and what they mean.

Semantics. A sentence says that every / some member of a non-empty set (a noun, perhaps narrowed by an adjective, a
place or a relative clause) has or lacks a property, or that one named individual has or lacks it:

- "every", "each": all members have it.  "some", "a", "at least one", "there was a ...", "it was a ... that": one has.
- "no", "not one": none has it.  "not every": at least one lacks it.  "never" and "not" deny the property itself.
- "it is true that" adds nothing, "it is false that" denies the whole sentence.
- "a <noun>" inside a property has narrow scope: "no dog kicked a cat" means that no dog kicked any cat.
- every set that a pair's sentences mention has a member, so "every dog slept" implies "some dog slept".
- a noun's class contains it (every poodle is a dog); nouns are otherwise disjoint, and in this world that holds for
  occupations too. A verb's class contains it (who whispered, spoke); other verbs are independent of each other.
- antonyms exclude each other, and one may be neither; other adjectives are independent. "near" is intersective.
- two names tell nothing about each other: they may or may not be one individual.

A pair is an entailment if the hypothesis holds in every such world where the premise does, a contradiction if it holds
in none of them, and neutral otherwise. `label_of` decides this exactly instead of trusting a table of rules.

Content words (LEXICON) and sentence frames (FRAMES) are split in two; validation shares neither with training.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

# ---- words: "class: members"


@dataclass(frozen=True)
class Lexicon:
    """Content words of one split; in a class the first word is the hypernym of the others."""

    agents: tuple[tuple[str, ...], ...]
    things: tuple[tuple[str, ...], ...]
    verbs: tuple[tuple[str, ...], ...]
    transitives: tuple[str, ...]
    antonyms: tuple[tuple[str, ...], ...]
    places: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def nouns(self) -> tuple[tuple[str, ...], ...]:
        return self.agents + self.things

    def words(self) -> set[str]:
        groups = self.nouns + self.verbs + self.antonyms + (self.transitives, self.places, self.names)
        return {word for group in groups for word in group}


def _lexicon(agents: str, things: str, verbs: str, antonyms: str, transitives: str, places: str, names: str) -> Lexicon:
    def classes(text: str) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(line.split()) for line in text.split(";"))

    flat = (transitives.split(), places.split(), names.split())
    transitive_words, place_words, name_words = (tuple(words) for words in flat)
    return Lexicon(classes(agents), classes(things), classes(verbs), transitive_words, classes(antonyms), place_words,
                   name_words)  # fmt: skip


LEXICON = {
    "train": _lexicon(
        agents="""dog poodle beagle terrier spaniel; bird sparrow robin falcon pigeon; fish trout salmon carp herring;
            snake python cobra viper mamba; monkey baboon macaque mandrill marmoset;
            beetle ladybug weevil scarab firefly; doctor surgeon dentist radiologist pediatrician;
            musician pianist drummer violinist guitarist;
            soldier sergeant corporal lieutenant general; scientist chemist physicist biologist botanist;
            craftsman carpenter potter blacksmith weaver; cleric priest bishop rabbi monk;
            lawyer solicitor barrister prosecutor notary; player goalkeeper striker pitcher quarterback""",
        things="""fruit plum peach pear mango; tool hammer wrench saw chisel; vehicle truck van tram motorcycle;
            garment shirt coat jacket sweater; vegetable carrot cabbage turnip radish; tree pine maple birch willow;
            flower rose tulip daisy lily; gem ruby sapphire diamond topaz; toy doll puzzle kite marble;
            weapon sword rifle pistol dagger; house cottage bungalow cabin mansion; coin penny nickel dime quarter;
            book cookbook dictionary thesaurus diary; bag purse satchel backpack suitcase""",
        verbs="""moved walked marched crawled; spoke whispered shouted mumbled; rested napped dozed lounged;
            performed danced sang juggled; cried wept sobbed whimpered; laughed giggled chuckled cackled;
            cooked baked fried grilled; wrote scribbled typed drafted""",
        antonyms="""happy sad; rich poor; wet dry; tall short; clean dirty; hot cold; calm nervous; kind cruel;
            quiet loud; weak strong; healthy sick; fat thin; polite rude""",
        transitives="""kicked pushed followed watched painted helped found washed carried touched noticed lifted praised
            greeted""",
        places="lake garden river barn market church tower school hospital mountain",
        names="mary john peter susan david laura robert helen george nancy thomas karen mark julia paul diana",
    ),
    "validation": _lexicon(
        agents="""cat tabby siamese persian sphynx; whale beluga narwhal humpback rorqual; lizard gecko skink chameleon
            basilisk; rodent mouse rat hamster squirrel; writer poet novelist journalist playwright;
            merchant grocer jeweler florist butcher; driver trucker chauffeur cabbie biker""",
        things="""boat canoe kayak ferry raft; hat beret fedora turban bonnet; container bucket barrel basket crate;
            seat chair sofa bench stool; nut walnut peanut hazelnut cashew; shoe sandal boot slipper sneaker""",
        verbs="""hurried rushed dashed sprinted; fell tumbled plunged toppled; complained grumbled whined moaned;
            smiled grinned beamed smirked""",
        antonyms="brave timid; heavy light; fast slow; lazy busy; soft hard; sober drunk",
        transitives="pulled chased admired bought dropped photographed guarded polished",
        places="bridge forest castle harbor tavern station",
        names="alice frank sarah kevin linda brian carol simon",
    ),
}

# ---- sentence frames

Corner = tuple[str, bool]
"""Quantifier ("every", "some" or "name") and whether the property is affirmed: the square of opposition."""

DETERMINERS: dict[str, Corner] = {
    "every": ("every", True), "some": ("some", True), "no": ("every", False), "not every": ("some", False),
    "each": ("every", True), "a": ("some", True), "not one": ("every", False), "at least one": ("some", True),
}  # fmt: skip
NOUN_FORMS = {
    "bare": "{noun}",
    "adjective": "{modifier} {noun}",
    "place": "{noun} near the {modifier}",
    "clause": "{noun} that {modifier}",
}
PREDICATES = {
    ("verb", True): "{scope}",
    ("quality", True): "was {scope}",
    ("active", True): "{transitive} a {scope}",
    ("passive", True): "was {transitive} by a {scope}",
    ("verb", False): "never {scope}",
    ("quality", False): "was never {scope}",
    ("active", False): "never {transitive} a {scope}",
    ("passive", False): "was never {transitive} by a {scope}",
    ("kind", True): "was a {scope}",
    ("kind", False): "was not a {scope}",
    ("active name", True): "{transitive} {scope}",
    ("passive name", True): "was {transitive} by {scope}",
    ("active name", False): "never {transitive} {scope}",
    ("passive name", False): "was never {transitive} by {scope}",
}
CONSTRUCTIONS = {
    "plain": "{subject} {predicate} .",
    "there": "there was {subject} that {predicate} .",
    "true": "it is true that {subject} {predicate} .",
    "false": "it is false that {subject} {predicate} .",
    "cleft": "it was {subject} that {predicate} .",
}
VALIDATION_CONSTRUCTIONS = ("cleft",)


@dataclass(frozen=True)
class Frame:
    """One sentence with slots for its content words."""

    text: str
    corner: Corner
    noun_form: str
    predicate: str


def _opposite(corner: Corner) -> Corner:
    return ({"every": "some", "some": "every", "name": "name"}[corner[0]], not corner[1])


def _is_grammatical(construction: str, determiner: str, noun_form: str, predicate: str, affirmed: bool) -> bool:
    if determiner == "{name}":
        return (
            noun_form == "bare" and construction in ("plain", "true", "false") and (affirmed or construction != "false")
        )
    if predicate in ("kind", "active name", "passive name") or (
        noun_form != "bare" and predicate in ("active", "passive")
    ):
        return False
    if not affirmed and determiner in ("not every", "no", "not one"):
        return False
    if construction == "there":
        return determiner in ("a", "some", "at least one", "no", "not one") and noun_form != "clause"
    if construction == "cleft":
        return determiner == "a" and noun_form != "clause"
    if construction == "false":
        return affirmed and determiner in ("every", "each", "some", "a", "no")
    return True


def _build_frames() -> dict[str, list[Frame]]:
    """All grammatical frames; each fourth diagonal of the grid, and every cleft, is kept for validation."""
    frames: dict[str, list[Frame]] = {"train": [], "validation": []}
    subjects = {**DETERMINERS, "{name}": ("name", True)}
    grid = product(enumerate(CONSTRUCTIONS), enumerate(subjects), enumerate(NOUN_FORMS), enumerate(PREDICATES))
    for (c, construction), (d, determiner), (n, noun_form), (p, (predicate, affirmed)) in grid:
        if not _is_grammatical(construction, determiner, noun_form, predicate, affirmed):
            continue
        subject = determiner if determiner == "{name}" else f"{determiner} {NOUN_FORMS[noun_form]}"
        text = CONSTRUCTIONS[construction].format(subject=subject, predicate=PREDICATES[predicate, affirmed])
        quantifier, holds = subjects[determiner]
        corner = (quantifier, holds == affirmed)
        corner = _opposite(corner) if construction == "false" else corner
        is_held_out = construction in VALIDATION_CONSTRUCTIONS or (c + d + n + p) % 4 == 1
        split = "validation" if is_held_out else "train"
        frames[split].append(Frame(text, corner, noun_form, predicate))
    return frames


FRAMES = _build_frames()

# ---- meaning

# How a premise's set (or property) relates to the hypothesis's: the truth values that one individual may have in both.
_JOINT = {
    "same": ((0, 0), (1, 1)),
    "up": ((0, 0), (0, 1), (1, 1)),
    "down": ((0, 0), (1, 0), (1, 1)),
    "disjoint": ((0, 0), (0, 1), (1, 0)),
    "free": ((0, 0), (0, 1), (1, 0), (1, 1)),
    "absent": ((1, 1),),
    "dropped": ((0, 1), (1, 1)),
    "added": ((1, 0), (1, 1)),
}


def _is_satisfiable(first: Corner, second: Corner, individuals: set[tuple[int, int, int, int]]) -> bool:
    """Whether some world, made of the individuals that may exist, makes both statements true.

    An individual is (in first's set, in second's set, has first's property, has second's property). Universal
    statements strike out individuals; it then suffices that every required witness is still among the others.
    """
    statements = ((first, 0), (second, 1))
    allowed = [
        individual
        for individual in individuals
        if all(quantifier != "every" or not individual[i] or individual[2 + i] == holds
               for (quantifier, holds), i in statements)
    ]  # fmt: skip
    return all(
        any(x[i] and (quantifier == "every" or x[2 + i] == holds) for x in allowed)
        for (quantifier, holds), i in statements
    )


@cache
def label_of(premise: Corner, hypothesis: Corner, noun: str, modifier: str, scope: str) -> str:
    """Label of a pair, from the two quantifiers and the relations of the nouns, modifiers and properties."""
    if premise[0] == "name":  # one and the same individual, or (noun "free") two
        joint = _JOINT[scope] if noun == "same" else _JOINT["free"]
        seen = {bool(h) == hypothesis[1] for p, h in joint if bool(p) == premise[1]}
        return "neutral" if len(seen) == 2 else "entailment" if True in seen else "contradiction"
    parts = product(_JOINT[noun], _JOINT[modifier], _JOINT[scope])
    individuals = {(n[0] & m[0], n[1] & m[1], s[0], s[1]) for n, m, s in parts}
    if not _is_satisfiable(premise, _opposite(hypothesis), individuals):
        return "entailment"
    return "neutral" if _is_satisfiable(premise, hypothesis, individuals) else "contradiction"
