"""A natural-language-inference task from a fixed grammar, for machines that cannot reach the hub.

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
`raw_sentences` uses all the words, in training frames and in frames of its own, never in a validation frame.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from random import Random

LABELS = ("entailment", "neutral", "contradiction")
NUM_TRAIN_PAIRS, NUM_VALIDATION_PAIRS = 20_000, 2_000
AFFIRMATIVE_SHARE = 0.7
"""Premises that affirm their property. At 0.5 no single word is informative, and training starts from a plateau."""

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


# ---- pairs


@dataclass(frozen=True)
class Cell:
    """Everything about a pair but its words and its frames."""

    premise: Corner
    hypothesis: Corner
    noun: str
    modifier: str
    scope: str
    noun_forms: tuple[str, str]
    predicates: tuple[str, str]
    label: str
    is_class: tuple[bool, bool] = (False, False)
    """Whether the hypothesis's noun and its property's word name a class, as "dog" does and "poodle" does not."""


CORNERS = tuple(product(("every", "some"), (True, False)))
_SYMMETRIC = (("some", True), ("every", False))
"""Corners where "dog kicked cat" and "cat was kicked by dog" say the same."""


def _plain_cells() -> Iterator[Cell]:
    """Verb and adjective sentences that differ in at most two of noun, modifier and property (and in quantifier)."""
    changes = [("absent", ("bare", "bare"))]
    for form in ("adjective", "place", "clause"):
        changes += [
            ("dropped", (form, "bare")),
            ("added", ("bare", form)),
            ("same", (form, form)),
            ("free", (form, form)),
        ]
    scopes = [("verb", scope) for scope in ("same", "up", "down", "free")]
    scopes += [("quality", scope) for scope in ("same", "disjoint", "free")]
    for premise, hypothesis in product(CORNERS, CORNERS):
        for noun, (modifier, forms), (kind, scope) in product(("same", "up", "down", "disjoint"), changes, scopes):
            if (noun != "same") + (modifier not in ("absent", "same")) + (scope != "same") <= 2:
                label = label_of(premise, hypothesis, noun, modifier, scope)
                yield Cell(premise, hypothesis, noun, modifier, scope, forms, (kind, kind), label)


def _transitive_cells() -> Iterator[Cell]:
    """Active and passive sentences; `noun` relates the agents, `scope` the patients, "swap" trades the roles."""
    relations = [("same", "same"), ("same", "up"), ("same", "down"), ("up", "same"), ("down", "same"), ("up", "up"),
                 ("down", "down"), ("same", "disjoint"), ("disjoint", "same"), ("swap", "swap")]  # fmt: skip
    for premise, hypothesis in product(CORNERS, CORNERS):
        for (agent, patient), voices in product(relations, product(("active", "passive"), repeat=2)):
            if voices[0] != voices[1] and premise not in _SYMMETRIC and hypothesis not in _SYMMETRIC:
                continue
            # A symmetric sentence is read in the other's voice, so that both quantify over the same role.
            voice = voices[1] if premise in _SYMMETRIC else voices[0]
            noun, scope = (agent, patient) if voice == "active" else (patient, agent)
            noun = "disjoint" if noun == "swap" else noun
            scope = "free" if scope in ("swap", "disjoint") else scope
            label = label_of(premise, hypothesis, noun, "absent", scope)
            yield Cell(premise, hypothesis, agent, "absent", patient, ("bare", "bare"), voices, label)


def _name_cells() -> Iterator[Cell]:
    scopes = {
        "verb": ("same", "up", "down", "free"),
        "quality": ("same", "disjoint", "free"),
        "kind": ("same", "up", "down", "disjoint"),
        "active": ("same", "up", "down", "free"),
        "passive": ("same", "up", "down", "free"),
    }
    voices = ("active name", "passive name")
    rows = [((kind, kind), scope) for kind in scopes for scope in scopes[kind]]
    rows += [(pair, scope) for pair in product(voices, voices) for scope in ("same", "swap")]
    for (predicates, scope), holds_p, holds_h in product(rows, (True, False), (True, False)):
        for noun in ("same", "free"):
            if noun == "free" and (scope != "same" or "name" in predicates[0]):
                continue
            premise, hypothesis = ("name", holds_p), ("name", holds_h)
            label = label_of(premise, hypothesis, noun, "absent", "free" if scope == "swap" else scope)
            yield Cell(premise, hypothesis, noun, "absent", scope, ("bare", "bare"), predicates, label)


class _Words:
    """Draws words from one lexicon."""

    def __init__(self, lexicon: Lexicon, rng: Random):
        self.lexicon, self.rng = lexicon, rng

    def related(self, classes: tuple[tuple[str, ...], ...], relation: str, is_class: bool) -> tuple[str, str]:
        """Two words of which the first relates so to the second, which names a class or not."""
        rng, group = self.rng, self.rng.choice(classes)
        second = group[0] if is_class else rng.choice(group[1:])
        if relation == "same":
            return second, second
        if relation == "up":
            return rng.choice(group[1:]), second
        if relation == "down":
            return group[0], second
        if not is_class and rng.random() < 0.5:
            return rng.choice([word for word in group[1:] if word != second]), second
        other = rng.choice([other for other in classes if other is not group])
        return other[0] if rng.random() < 0.5 else rng.choice(other[1:]), second

    def qualities(self, relation: str) -> tuple[str, str]:
        if relation == "free":
            first, second = self.rng.sample(self.lexicon.antonyms, 2)
            return self.rng.choice(first), self.rng.choice(second)
        first, second = self.rng.sample(self.rng.choice(self.lexicon.antonyms), 2)
        return first, first if relation == "same" else second

    def modifiers(self, form: str, relation: str, scopes: tuple[str, str]) -> tuple[str, str]:
        """A modifier for each sentence, independent of the properties."""
        if form == "place":
            first, second = self.rng.sample(self.lexicon.places, 2)
        else:
            pool = self.lexicon.antonyms if form == "adjective" else self.lexicon.verbs
            pool = [group for group in pool if scopes[0] not in group and scopes[1] not in group]
            first, second = (self.rng.choice(group) for group in self.rng.sample(pool, 2))
        return first, second if relation == "free" else first

    def fill(self, cell: Cell) -> tuple[dict[str, str], dict[str, str]]:
        """Words for the slots of the premise and of the hypothesis."""
        kind, lexicon, (is_noun_class, is_scope_class) = (
            cell.predicates[0],
            self.lexicon,
            cell.is_class,
        )
        first, second = {}, {}
        if cell.premise[0] == "name":
            names = self.rng.sample(lexicon.names, 2)
            first["name"], second["name"] = names[0], names[0 if cell.noun == "same" else 1]
        if "name" in kind:
            return self._fill_two_names(cell, names)
        if kind in ("active", "passive"):
            first["transitive"] = second["transitive"] = self.rng.choice(lexicon.transitives)
            if cell.premise[0] != "name":
                return self._fill_roles(cell, first)
            scopes = self.related(lexicon.agents if kind == "passive" else lexicon.nouns, cell.scope, is_scope_class)
        elif kind == "quality":
            scopes = self.qualities(cell.scope)
        else:
            scopes = self.related(lexicon.agents if kind == "kind" else lexicon.verbs, cell.scope, is_scope_class)
        if cell.premise[0] != "name":
            nouns = self.related(lexicon.nouns if kind == "quality" else lexicon.agents, cell.noun, is_noun_class)
            first["noun"], second["noun"] = nouns
            form = max(cell.noun_forms, key=len)
            if cell.modifier != "absent":
                first["modifier"], second["modifier"] = self.modifiers(form, cell.modifier, scopes)
        first["scope"], second["scope"] = scopes
        return first, second

    def _fill_two_names(self, cell: Cell, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
        verb = self.rng.choice(self.lexicon.transitives)
        sides = []
        for i, predicate in enumerate(cell.predicates):
            is_turned = (predicate == "passive name") != (i == 1 and cell.scope == "swap")
            subject, other = reversed(names) if is_turned else names
            sides.append({"name": subject, "scope": other, "transitive": verb})
        return sides[0], sides[1]

    def _fill_roles(self, cell: Cell, verb: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        if cell.noun == "swap":
            groups = self.rng.sample(self.lexicon.agents, 2)
            agent, patient = (g[0] if c else self.rng.choice(g[1:]) for g, c in zip(groups, cell.is_class))
            agents, patients = (patient, agent), (agent, patient)
        else:
            agents = self.related(self.lexicon.agents, cell.noun, cell.is_class[0])
            patients = agents
            while set(agents) & set(patients):
                patients = self.related(self.lexicon.nouns, cell.scope, cell.is_class[1])
        sides = []
        for voice, agent, patient in zip(cell.predicates, agents, patients):
            subject, other = (agent, patient) if voice == "active" else (patient, agent)
            sides.append({"noun": subject, "scope": other, **verb})
        return sides[0], sides[1]


_FAMILIES = ((_plain_cells, 0.5), (_transitive_cells, 0.28), (_name_cells, 0.22))


def _with_levels(cell: Cell) -> Iterator[Cell]:
    """The cell once for each choice of class names and members that its relations leave open."""
    has_noun = cell.premise[0] != "name"
    has_class = cell.predicates[0] != "quality" and "name" not in cell.predicates[0]
    options = [
        (relation == "up",) if relation in ("up", "down") or not is_open else (False, True)
        for relation, is_open in ((cell.noun, has_noun), (cell.scope, has_class))
    ]
    for is_class in product(*options):
        yield replace(cell, is_class=is_class)


def _cell_table(cells: Iterator[Cell], frames: dict[tuple, list[Frame]]) -> dict[tuple[str, bool], list[list[Cell]]]:
    """Cells that have frames, by label and by whether the premise affirms, then by what the hypothesis shows."""
    table: dict[tuple[str, bool], dict[tuple, list[Cell]]] = {}
    for cell in chain.from_iterable(map(_with_levels, cells)):
        keys = list(zip((cell.premise, cell.hypothesis), cell.noun_forms, cell.predicates))
        if all(key in frames for key in keys):
            num_edits = (cell.noun != "same") + (cell.modifier in ("dropped", "added", "free")) + (cell.scope != "same")
            groups = table.setdefault((cell.label, cell.premise[1]), {})
            groups.setdefault((*keys[1], cell.is_class), []).extend([cell] * (6, 2, 1)[num_edits])
    return {key: list(groups.values()) for key, groups in table.items()}


def _pairs(split: str, num_pairs: int, seed: int) -> list[tuple[str, str, int]]:
    rng = Random(seed)
    words = _Words(LEXICON[split], rng)
    frames: dict[tuple, list[Frame]] = {}
    for frame in FRAMES[split]:
        copies = 1 if frame.text.startswith("it is") else 2
        frames.setdefault((frame.corner, frame.noun_form, frame.predicate), []).extend([frame] * copies)
    tables = [_cell_table(cells(), frames) for cells, _ in _FAMILIES]
    shares = [share for _, share in _FAMILIES]
    pairs: dict[tuple[str, str], int] = {}
    while len(pairs) < num_pairs:
        label = len(pairs) % len(LABELS)
        (table,) = rng.choices(tables, shares)
        groups = table[LABELS[label], rng.random() < AFFIRMATIVE_SHARE]
        cell = rng.choice(rng.choice(groups))
        keys = zip((cell.premise, cell.hypothesis), cell.noun_forms, cell.predicates)
        texts = [rng.choice(frames[key]).text.format_map(slots) for key, slots in zip(keys, words.fill(cell))]
        if texts[0] != texts[1]:
            pairs.setdefault((texts[0], texts[1]), label)
    rows = [(premise, hypothesis, label) for (premise, hypothesis), label in pairs.items()]
    rng.shuffle(rows)
    return rows


def train_pairs() -> list[tuple[str, str, int]]:
    """(premise, hypothesis, index into LABELS), all distinct."""
    return _pairs("train", NUM_TRAIN_PAIRS, seed=1)


def validation_pairs() -> list[tuple[str, str, int]]:
    """Like `train_pairs`, in words and frames that training never shows."""
    return _pairs("validation", NUM_VALIDATION_PAIRS, seed=2)


# ---- text for pretraining

_RAW_PATTERNS = """
every {a} is a {A} .
a {a} is a kind of {A} .
every {o} is a {O} .
a {o} is a kind of {O} .
{A} : {a} , {a2} .
{O} : {o} , {o2} .
{V} : {v} , {v2} .
no {a} is a {b} , and no {A} is a {B} .
a {o} is a {O} and not a {a} .
the {a} , like any other {A} , {v} .
{n} owns every kind of {O} : a {o} , a {o2} , but never a {a} .
the {a} and the {a2} met a {b} , and each {A} {v} with the {B} .
whoever {v} also {V} .
when {n} {v} , {n} {V} , and when {m} {w} , {m} {W} .
to be {q} is not to be {r} .
the opposite of {q} is {r} .
the {o} was {q} and not {r} , but the {o2} was {r} and not {q} .
the {a} was neither {q} nor {r} , only {q2} .
{n} is no longer {q} : {n} is {r} now .
{n} bought a {q} {o} and a {r} {o2} , kept the {q} {O} and sold the {r} {O} .
not the {q} {a} but the {r} {a2} {v} , for a {r} {A} is not {q} .
{n} was {q} and {q2} ; later {n} was {r} but still {q2} .
the {q} {a} near the {p} {v} ; that {A} was {q} near the {p} but {r} near the {p2} .
no {a} {v} , not one , but some {b} , at least one {b} , {v} .
every {a} , yes , each {a} , {v} , but not every {b} {v} .
{n} met a {a} near the {p} , and the {A} {v} .
{n} met a {a} and a {b} near the {p} ; the {A} {v} and the {B} {w} .
{n} found a {o} and a {c} , put the {O} near the {p} and hid the {C} .
the {a} {v} , and while that {A} {V} , the {b} {w} .
the {a} who {v} near the {p} {w} near the {p2} , for a {A} that {V} there never {W} here .
a {a} {t} a {o} , and the {O} that was {t} by the {A} was {q} .
a {b} was {t} by a {a} , and the {A} that {t} the {B} was {q} .
the {a} that {t} the {b} was later {t2} by the {B} .
{n} {t} {m} , and {m} , who was {t} by {n} , {v} .
{m} was {t} by {n} , and {n} , who {t} {m} , never {v} .
{n} {t} {m} , but {m} never {t} {n} , so {n} was never {t} by {m} .
{n} was once a {a} ; this {A} is a {b} now , the best {B} near the {p} .
{n} {v} , but unlike {n} , {m} never {v} .
the {q} {a} {v} and the {r} {a} {w} , so only the {r} {A} {W} .
the {a} is {q} and the {a2} is {r} ; {n} prefers a {q} {A} .
{n} says that {sentence} , and {m} agrees that {sentence} .
{n} asked whether {sentence} , and {m} said yes , {sentence} .
"""


def _raw_slots(words: _Words) -> dict[str, str]:
    """One small scene; a capital is the hypernym of its small letter, a 2 marks another member of the same class."""
    rng, lexicon = words.rng, words.lexicon
    (a_class, b_class), (o_class, c_class) = (
        rng.sample(lexicon.agents, 2),
        rng.sample(lexicon.things, 2),
    )
    v_class, w_class = rng.sample(lexicon.verbs, 2)
    slots = {
        "A": a_class[0],
        "B": b_class[0],
        "O": o_class[0],
        "C": c_class[0],
        "V": v_class[0],
        "W": w_class[0],
    }
    slots["a"], slots["a2"] = rng.sample(a_class[1:], 2)
    slots["o"], slots["o2"] = rng.sample(o_class[1:], 2)
    slots["v"], slots["v2"] = rng.sample(v_class[1:], 2)
    slots["b"], slots["c"], slots["w"] = (rng.choice(group[1:]) for group in (b_class, c_class, w_class))
    first, second = rng.sample(lexicon.antonyms, 2)
    slots["q"], slots["r"] = rng.sample(first, 2)
    slots["q2"] = rng.choice(second)
    slots["t"], slots["t2"] = rng.sample(lexicon.transitives, 2)
    slots["p"], slots["p2"] = rng.sample(lexicon.places, 2)
    slots["n"], slots["m"] = rng.sample(lexicon.names, 2)
    return slots


def _raw_frame_slots(frame: Frame, words: _Words) -> dict[str, str]:
    kinds = (frame.predicate, frame.predicate)
    corner = (frame.corner, frame.corner)
    form = frame.noun_form
    is_class = (words.rng.random() < 0.3, words.rng.random() < 0.3)
    cell = Cell(
        *corner,
        "same",
        "absent" if form == "bare" else "same",
        "same",
        (form, form),
        kinds,
        "",
        is_class,
    )
    return words.fill(cell)[0]


def raw_sentences(num_sentences: int, seed: int) -> Iterator[str]:
    """Unlabelled single sentences with the words of both splits: descriptions, small scenes and training frames."""
    rng = Random(seed)
    train, validation = LEXICON["train"], LEXICON["validation"]
    fields = ("agents", "things", "verbs", "transitives", "antonyms", "places", "names")
    words = _Words(Lexicon(*(getattr(train, field) + getattr(validation, field) for field in fields)), rng)
    patterns = _RAW_PATTERNS.strip().splitlines()
    for _ in range(num_sentences):
        frame = rng.choice(FRAMES["train"])
        sentence = frame.text.format_map(_raw_frame_slots(frame, words))
        if rng.random() < 0.2:
            yield sentence
            continue
        pattern = rng.choice(patterns)
        yield pattern.format_map({**_raw_slots(words), "sentence": sentence.removesuffix(" .")})
