"""A natural-language-inference task from a fixed grammar, for machines that cannot reach the hub.

What the sentences mean is in embedded_grammar.py. Every pair is drawn as a cell, everything but its words and frames,
so that labels, quantifiers and shortcuts can be balanced, and is then filled with the words of its split.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from random import Random

from fastpeft.standins.sentence_grammar import FRAMES, LEXICON, Corner, Frame, Lexicon, label_of

LABELS = ("entailment", "neutral", "contradiction")
NUM_TRAIN_PAIRS, NUM_VALIDATION_PAIRS = 20_000, 2_000
AFFIRMATIVE_SHARE = 0.7
"""Premises that affirm their property. At 0.5 no single word is informative, and training starts from a plateau."""

_VOICES = ("active", "passive")


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
        for (agent, patient), voices in product(relations, product(_VOICES, _VOICES)):
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


class Words:
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
        names: list[str] = []
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
    words = Words(LEXICON[split], rng)
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


def splits() -> dict[str, list[dict[str, str]]]:
    """As a dataset's rows: premise, hypothesis, label."""
    made = {"train": train_pairs(), "validation": validation_pairs()}
    return {
        split: [{"premise": p, "hypothesis": h, "label": LABELS[label]} for p, h, label in pairs]
        for split, pairs in made.items()
    }
