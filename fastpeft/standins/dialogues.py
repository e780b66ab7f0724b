"""Short conversations from a fixed grammar, and word problems whose answers are boxed, for when no hub can be reached.

A conversation asks for a sum or a difference and goes on from its result, asks which of two amounts is more, or asks to
say something again. Nouns and names of validation are none of training's.
"""

from __future__ import annotations

from random import Random
from typing import Any

from fastpeft import phases
from fastpeft.standins.problem_grammar import NOUNS
from fastpeft.standins.problems import MAX_CHANGE, MAX_START, MAX_TOTAL, draw_words, test_problems, train_problems

NUM_TRAIN, NUM_VALIDATION = 4_000, 400
MAX_QUESTIONS = 3
_SYSTEM = ("Answer in short.", "You can count.", "You are patient.")
_SYSTEM_SHARE = 0.3

Said = tuple[str, str]
"""A question and its answer."""


def splits() -> dict[str, list[dict[str, Any]]]:
    """As a dataset's rows: messages."""
    return {"train": _conversations("train", NUM_TRAIN, 1), "validation": _conversations("test", NUM_VALIDATION, 2)}


def boxed_splits() -> dict[str, list[dict[str, str]]]:
    """As MATH's rows: problem, and a solution that ends in a box."""
    made = {"train": train_problems(), "test": test_problems()}
    return {split: [{"problem": q, "solution": _boxed(a)} for q, a in problems] for split, problems in made.items()}


def _boxed(answer: str) -> str:
    worked, _, number = answer.rpartition("\n#### ")
    return f"{worked}\nThe answer is $\\boxed{{{number}}}$."


def _conversations(nouns: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng, found = Random(seed), {}
    while len(found) < count:
        said = rng.choice((_counted, _counted, _compared, _repeated))(nouns, rng)
        messages = [{"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair)]
        if rng.random() < _SYSTEM_SHARE:
            messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEM)})
        found.setdefault(repr(messages), messages)
        phases.progress(len(found), count, "conversations")
    return [{"messages": messages} for messages in found.values()]


def _counted(nouns: str, rng: Random) -> list[Said]:
    """Each further question is about the last result."""
    things = draw_words(NOUNS[nouns], rng)[0]["things"]
    amount, said = rng.randint(2, MAX_START), []
    for number in range(rng.randint(1, MAX_QUESTIONS)):
        change = rng.randint(2, MAX_CHANGE)
        adds = rng.random() < 0.5
        if not 2 <= (amount + change if adds else amount - change) <= MAX_TOTAL:
            adds = not adds
        result = amount + change if adds else amount - change
        if not 2 <= result <= MAX_TOTAL:
            break
        more = "more" if adds else "fewer"
        question = f"And {change} {more}?" if number else f"How many are {change} {more} than {amount} {things}?"
        said.append((question, f"{amount} {'+' if adds else '-'} {change} = {result} {things}."))
        amount = result
    return said or _compared(nouns, rng)


def _compared(nouns: str, rng: Random) -> list[Said]:
    words = draw_words(NOUNS[nouns], rng)[0]
    a, b = rng.sample(range(2, MAX_TOTAL + 1), 2)
    return [(f"Who has more, {words['name']} with {a} or you with {b} {words['things']}?", f"{max(a, b)} is more.")]


def _repeated(nouns: str, rng: Random) -> list[Said]:
    words = draw_words(NOUNS[nouns], rng)[0]
    what = f"{rng.randint(2, MAX_TOTAL)} {words['quality']} {words['things']}"
    return [(f"What has {words['name']}? {what}.", f"{words['name']} has {what}.")]
