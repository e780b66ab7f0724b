"""Word problems in the shape of GSM8K from a fixed grammar, for machines that cannot reach the hub.

A question of two to four sentences asks for a number that takes one to three steps of + - * and /; the answer works
them out with calculator notes as GSM8K writes them. Words and frames are in embedded_problems_grammar.py.
"""

from dataclasses import dataclass, field
from random import Random

from fastpeft import phases
from fastpeft.standins.problem_grammar import FRAMES, NOUNS, Nouns

NUM_TRAIN_PROBLEMS, NUM_TEST_PROBLEMS = 8_000, 1_000
MAX_STEPS, MAX_SENTENCES = 3, 4
MAX_FACTOR, MAX_START, MAX_CHANGE, MAX_TOTAL = 12, 60, 30, 99
"""Largest factor, divisor and quotient; largest first amount, change of it, and number anywhere."""
ASIDE_SHARE = 0.25
"""Problems short enough for it that also tell a number which the answer does not need."""

_OPENINGS = (("own", 4), ("groups", 3), ("both", 2), ("more", 2), ("fewer", 2), ("times", 2))
_CHANGES = (("gain", 3), ("lose", 4), ("gain groups", 2), ("give", 2))
_ENDINGS = (("ask", 5), ("split", 2), ("pack", 2), ("price", 2))


class _Unfit(Exception):
    """The numbers drawn so far allow no next step."""


@dataclass
class _Problem:
    """One problem while it grows: the sentences, the worked lines and the amount so far."""

    rng: Random
    frames: dict[str, list[str]]
    words: dict[str, str]
    she: str
    friends: list[str]
    sentences: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    amount: int = 0

    def say(self, kind: str, who: str, friend: str, **numbers: int) -> None:
        frame = self.rng.choice(self.frames[kind])
        sentence = frame.format_map({**self.words, **numbers, "who": who, "friend": friend})
        self.sentences.append(sentence[0].upper() + sentence[1:])

    def work_out(self, left: int, operation: str, right: int, line: str) -> int:
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left // (right or 1)}[operation]
        is_small = right <= MAX_CHANGE if operation in "+-" else max(min(left, value), right) <= MAX_FACTOR
        if not (is_small and 2 <= value <= MAX_TOTAL) or (operation == "/" and value * right != left):
            raise _Unfit
        note = f"{left} {operation} {right} = <<{left}{operation}{right}={value}>>{value}"
        line = line.format_map({**self.words, "worked": note, "she": self.she})
        self.lines.append(line[0].upper() + line[1:])
        return value

    def open(self, kind: str) -> None:
        rng, name, (friend, other) = self.rng, self.words["name"], self.friends
        a, b = rng.randint(2, MAX_START), rng.randint(2, MAX_CHANGE)
        if kind in ("groups", "times"):
            a, b = rng.randint(2, MAX_FACTOR), rng.randint(2, MAX_FACTOR)
        if kind in ("more", "fewer", "times"):
            self.say("own", friend, other, a=a)
        self.say(kind, name, friend, a=a, b=b)
        if kind == "own":
            self.amount = a
        elif kind == "groups":
            self.amount = self.work_out(a, "*", b, "the {boxes} hold {worked} {things}.")
        else:
            operation = {"both": "+", "more": "+", "fewer": "-", "times": "*"}[kind]
            self.amount = self.work_out(a, operation, b, "{name} has {worked} {things}.")

    def change(self, kind: str) -> None:
        rng, who = self.rng, self.rng.choice((self.she, self.words["name"]))
        k, m, b = rng.randint(2, MAX_FACTOR), rng.randint(2, MAX_FACTOR), rng.randint(2, MAX_CHANGE)
        self.say(kind, who, self.friends[1], k=k, m=m, b=b)
        if kind == "gain groups":
            b = self.work_out(k, "*", m, "the {boxes} hold {worked} {things}.")
        elif kind == "give":
            b = self.work_out(k, "*", m, "the {people} get {worked} {things}.")
        operation, left = ("+", "") if kind.startswith("gain") else ("-", " left")
        self.amount = self.work_out(self.amount, operation, b, f"{{she}} has {{worked}} {{things}}{left}.")

    def end(self, kind: str) -> None:
        rng, who = self.rng, self.rng.choice((self.she, self.words["name"]))
        if kind == "ask":
            self.say("ask", who, self.friends[1])
            return
        b = rng.randint(2, MAX_FACTOR)
        if kind != "price":
            divisors = [d for d in range(2, MAX_FACTOR + 1) if self.amount % d == 0]
            b = rng.choice(divisors or [0])
        operation, line = {
            "split": ("/", "each of the {people} gets {worked} {things}."),
            "pack": ("/", "{she} fills {worked} {boxes}."),
            "price": ("*", "{she} gets {worked} dollars."),
        }[kind]
        self.amount = self.work_out(self.amount, operation, b, line)
        self.say(kind, who, self.friends[1], b=b)
        self.say(f"ask {kind}", self.rng.choice((self.she, self.words["name"])), self.friends[1])

    def finish(self, num_steps: int) -> tuple[str, str]:
        rng, room = self.rng, MAX_SENTENCES - len(self.sentences)
        if len(self.lines) != num_steps or room < 0:
            raise _Unfit
        if room and rng.random() < ASIDE_SHARE:
            self.say("aside", self.words["name"], self.friends[1], n=rng.randint(2, MAX_START))
            self.sentences.insert(rng.randrange(len(self.sentences) - 1), self.sentences.pop())
        return " ".join(self.sentences), "\n".join([*self.lines, f"#### {self.amount}"])


def draw_words(nouns: Nouns, rng: Random) -> tuple[dict[str, str], str, list[str]]:
    """Words for the slots of a problem's frames, its pronoun, and two more names."""
    pronoun = rng.choice(("she", "he"))
    name = rng.choice(nouns.women if pronoun == "she" else nouns.men)
    friends = rng.sample([other for other in nouns.women + nouns.men if other != name], 2)
    quality, quality2 = rng.sample(nouns.qualities, 2)
    words = {"name": name, "quality": quality, "quality2": quality2}
    for slot, group in (("things", nouns.things), ("boxes", nouns.boxes), ("place", nouns.places)):
        words[slot] = rng.choice(group)
    words["people"] = rng.choice(nouns.people)
    return words, pronoun, friends


def _draw(kinds: tuple[tuple[str, int], ...], rng: Random) -> str:
    names, weights = zip(*kinds)
    return rng.choices(names, weights)[0]


def _problem(split: str, num_steps: int, rng: Random) -> tuple[str, str]:
    """One problem of `num_steps` steps. Raises _Unfit where the draw does not come out."""
    problem = _Problem(rng, FRAMES[split], *draw_words(NOUNS[split], rng))
    problem.open(_draw(_OPENINGS, rng))
    for _ in range(rng.randint(0, 2)):
        problem.change(_draw(_CHANGES, rng))
    problem.end(_draw(_ENDINGS, rng))
    return problem.finish(num_steps)


def _problems(split: str, num_problems: int, seed: int) -> list[tuple[str, str]]:
    rng, found = Random(seed), {}
    while len(found) < num_problems:
        num_steps = (1, 2, 2, 3, 3)[len(found) % 5]
        try:
            question, answer = _problem(split, num_steps, rng)
        except _Unfit:
            continue
        found.setdefault(question, answer)
        phases.progress(len(found), num_problems, "problems")
    rows = list(found.items())
    rng.shuffle(rows)
    return rows


def train_problems() -> list[tuple[str, str]]:
    """(question, worked answer that ends in `#### number`), all distinct."""
    return _problems("train", NUM_TRAIN_PROBLEMS, seed=1)


def test_problems() -> list[tuple[str, str]]:
    """Like `train_problems`, in names, things, places and sentence frames that training never shows."""
    return _problems("test", NUM_TEST_PROBLEMS, seed=2)


def splits() -> dict[str, list[dict[str, str]]]:
    """As a dataset's rows: question, answer."""
    made = {"train": train_problems(), "test": test_problems()}
    return {split: [{"question": q, "answer": a} for q, a in problems] for split, problems in made.items()}
