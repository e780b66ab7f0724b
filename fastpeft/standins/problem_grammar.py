"""Words and sentence frames of the generated word problems; embedded_problems.py makes problems of them."""

from dataclasses import dataclass, fields
from itertools import product


@dataclass(frozen=True)
class Nouns:
    """Content words of one split. The two splits share none; verbs and function words are common to both."""

    women: tuple[str, ...]
    men: tuple[str, ...]
    things: tuple[str, ...]
    boxes: tuple[str, ...]
    places: tuple[str, ...]
    qualities: tuple[str, ...]
    people: tuple[str, ...]

    def words(self) -> set[str]:
        return {word for field in fields(self) for word in getattr(self, field.name)}

    def __or__(self, other: "Nouns") -> "Nouns":
        return Nouns(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def _nouns(**groups: str) -> Nouns:
    return Nouns(**{name: tuple(words.split()) for name, words in groups.items()})


NOUNS: dict[str, Nouns] = {
    "train": _nouns(
        women="Anna Clara Ella Grace Ivy Kate Mia Olivia Rosa Tina",
        men="Ben David Frank Henry Jack Leo Noah Paul Sam Victor",
        things="""apples pears books pencils marbles stamps cookies coins shells stickers cards balloons candles flowers
            oranges buttons beads ribbons cups plates toys bottles stones keys""",
        boxes="boxes bags baskets jars crates drawers",
        places="market park school library garden shop farm beach",
        qualities="red blue green yellow small large old new",
        people="friends children neighbors cousins",
    ),
    "test": _nouns(
        women="Laura Nina Julia Sofia Helen",
        men="Oscar Peter Martin Tom Simon",
        things="peaches lemons crayons badges muffins tickets lamps feathers magnets walnuts",
        boxes="buckets sacks trays chests",
        places="museum station harbor bakery",
        qualities="white purple heavy wooden",
        people="classmates guests players",
    ),
}

# ---- frames: every kind of sentence is a grid of leads, verbs and constructions

_GAIN = ("buys", "gets", "finds", "collects", "receives", "borrows", "wins", "picks up")
_LOSE = ("sells", "loses", "donates", "breaks", "drops", "gives away", "throws away", "lends")
_GIVE = ("gives", "sends", "lends", "sells", "brings")
_HAVE = ("has", "owns", "keeps", "holds", "stores")
_BASE = ("have", "own", "keep", "hold", "store")
_OPENINGS = ("", "at first ", "this week ", "in the {place}, ", "every day ")
_LATER = ("", "then ", "later ", "after that, ", "at the {place}, ", "in the evening ")
_ENDS = ("", " now", " in the end", " altogether", " in total", " after that")

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "own": (_OPENINGS, _HAVE, """
        {lead}{who} {verb} {a} {things}.
        {lead}{who} {verb} {a} {quality} {things}.
        {friend} knows that {lead}{who} {verb} {a} {things}.
        {lead}{who} {verb} {a} {things} with {friend}.
        * {lead}{a} {things} are what {who} {verb}."""),
    "both": (_OPENINGS, _HAVE, """
        {lead}{who} {verb} {a} {quality} {things} and {b} {quality2} {things}.
        {lead}{who} {verb} {a} {quality} and {b} {quality2} {things}.
        {friend} knows that {lead}{who} {verb} {a} {quality} and {b} {quality2} {things}.
        * {lead}{a} {quality} and {b} {quality2} {things} are what {who} {verb}."""),
    "groups": (_OPENINGS, _HAVE, """
        {lead}{who} {verb} {a} {boxes} with {b} {things} each.
        {lead}{who} {verb} {a} {boxes} of {b} {things}.
        {lead}{who} {verb} {b} {things} in each of {a} {boxes}.
        {friend} knows that {lead}{who} {verb} {a} {boxes} with {b} {things} each.
        * {lead}{a} {boxes} with {b} {things} each are what {who} {verb}."""),
    "more": (("", "in the {place}, ", "this week ", "today "), _HAVE, """
        {lead}{who} {verb} {b} more {things} than {friend}.
        {lead}{who} {verb} {b} {things} more than {friend}.
        compared to {friend}, {lead}{who} {verb} {b} more {things}.
        * {lead}{b} more {things} than {friend} has are what {who} {verb}."""),
    "fewer": (("", "in the {place}, ", "this week ", "today "), _HAVE, """
        {lead}{who} {verb} {b} fewer {things} than {friend}.
        {lead}{who} {verb} {b} {things} fewer than {friend}.
        compared to {friend}, {lead}{who} {verb} {b} fewer {things}.
        * {lead}{b} fewer {things} than {friend} has are what {who} {verb}."""),
    "times": (("", "in the {place}, ", "this week ", "today "), _HAVE, """
        {lead}{who} {verb} {b} times as many {things} as {friend}.
        compared to {friend}, {lead}{who} {verb} {b} times as many {things}.
        {lead}{who} {verb} as many {things} as {friend} has, times {b}.
        * {lead}{b} times as many {things} as {friend} has are what {who} {verb}."""),
    "gain": (_LATER, _GAIN, """
        {lead}{who} {verb} {b} {things}.
        {lead}{who} {verb} {b} more {things}.
        {lead}{who} {verb} another {b} {things}.
        {friend} sees that {lead}{who} {verb} {b} more {things}.
        * {lead}{b} more {things} are what {who} {verb}."""),
    "lose": (_LATER, _LOSE, """
        {lead}{who} {verb} {b} {things}.
        {lead}{who} {verb} {b} of the {things}.
        {lead}{who} {verb} {b} of them.
        {friend} sees that {lead}{who} {verb} {b} of the {things}.
        * {lead}{b} of the {things} are what {who} {verb}."""),
    "gain groups": (_LATER, _GAIN, """
        {lead}{who} {verb} {k} {boxes} with {m} {things} each.
        {lead}{who} {verb} {k} {boxes} of {m} {things}.
        {lead}{who} {verb} another {k} {boxes} with {m} {things} each.
        {friend} sees that {lead}{who} {verb} {k} {boxes} with {m} {things} each.
        * {lead}{k} {boxes} with {m} {things} each are what {who} {verb}."""),
    "give": (_LATER, _GIVE, """
        {lead}{who} {verb} {m} {things} to each of {k} {people}.
        {lead}{who} {verb} each of {k} {people} {m} {things}.
        {lead}{who} {verb} {m} of the {things} to each of {k} {people}.
        {friend} sees that {lead}{who} {verb} {m} {things} to each of {k} {people}.
        * {lead}{m} {things} are what {who} {verb} to each of {k} {people}."""),
    "split": (_LATER, ("shares", "divides", "splits", "distributes"), """
        {lead}{who} {verb} the {things} equally among {b} {people}.
        {lead}{who} {verb} all the {things} among {b} {people}.
        {lead}{who} {verb} all of them equally among {b} {people}.
        {friend} sees that {lead}{who} {verb} the {things} among {b} {people}.
        * {lead}the {things} are what {who} {verb} among {b} {people}."""),
    "pack": (_LATER, ("puts", "packs", "places", "sorts"), """
        {lead}{who} {verb} the {things} into {boxes} of {b}.
        {lead}{who} {verb} all the {things} into {boxes} with {b} {things} each.
        {lead}{who} {verb} all of them into {boxes} of {b} {things}.
        {friend} sees that {lead}{who} {verb} the {things} into {boxes} of {b}.
        * {lead}the {things} are what {who} {verb} into {boxes} of {b}."""),
    "price": (_LATER, ("sells", "offers", "trades", "auctions"), """
        {lead}{who} {verb} the {things} for {b} dollars each.
        {lead}{who} {verb} all the {things} at {b} dollars each.
        {lead}{who} {verb} all of them for {b} dollars each.
        {friend} sees that {lead}{who} {verb} the {things} for {b} dollars each.
        * {lead}the {things} are what {who} {verb} for {b} dollars each."""),
    "aside": (("", "today ", "this week ", "every day "), ("takes", "needs", "spends"), """
        {lead}{who} {verb} {n} minutes to walk to the {place}.
        {lead}{who} {verb} {n} days for a trip to the {place}.
        {friend} knows that {lead}{who} {verb} {n} minutes to walk to the {place}.
        * {lead}{n} minutes are what {who} {verb} to walk to the {place}."""),
    "ask": (_ENDS, _BASE, """
        how many {things} does {who} {verb}{lead}?
        how many of the {things} does {who} {verb}{lead}?
        what number of {things} does {who} {verb}{lead}?
        can you say how many {things} {who} must {verb}{lead}?
        * what is the number of {things} that {who} must {verb}{lead}?"""),
    "ask split": (_ENDS, ("get", "receive", "take"), """
        how many {things} does each of the {people} {verb}{lead}?
        what number of {things} does each of the {people} {verb}{lead}?
        can you say how many {things} each of the {people} must {verb}{lead}?
        * what is the number of {things} that each of the {people} must {verb}{lead}?"""),
    "ask pack": (_ENDS, ("fill", "need", "use"), """
        how many {boxes} does {who} {verb}{lead}?
        what number of {boxes} does {who} {verb}{lead}?
        can you say how many {boxes} {who} must {verb}{lead}?
        * what is the number of {boxes} that {who} must {verb}{lead}?"""),
    "ask price": (_ENDS, ("get", "earn", "make"), """
        how many dollars does {who} {verb}{lead}?
        what number of dollars does {who} {verb}{lead}?
        can you say how many dollars {who} must {verb}{lead}?
        * what is the number of dollars that {who} must {verb}{lead}?"""),
}  # fmt: skip
"""Kind of sentence -> leads (or, of a question, endings), verbs, constructions; a star keeps one for the test."""


def _build_frames() -> dict[str, dict[str, list[str]]]:
    """Frames by split and kind; each fourth diagonal of the grid, and every starred construction, is for the test."""
    frames: dict[str, dict[str, list[str]]] = {split: {kind: [] for kind in KINDS} for split in NOUNS}
    for kind, (leads, verbs, constructions) in KINDS.items():
        texts = constructions.strip().splitlines()
        for (i, lead), (j, verb), (k, text) in product(enumerate(leads), enumerate(verbs), enumerate(texts)):
            text = text.strip()
            split = "test" if text.startswith("*") or (i + j + k) % 4 == 1 else "train"
            frame = text.removeprefix("* ").replace("{lead}", lead).replace("{verb}", verb)
            frames[split][kind].append(frame)
    return frames


FRAMES = _build_frames()
