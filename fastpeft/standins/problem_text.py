"""Raw arithmetic text to pretrain the embedded causal LM on: equations and unrelated statements.

No question, no worked answer, no calculator note. The statements use the words of both splits of the word problems, in
training frames and in patterns of their own, never in a frame of the test.
"""

from collections.abc import Iterator
from random import Random

from fastpeft.standins.problem_grammar import FRAMES, KINDS, NOUNS
from fastpeft.standins.problems import MAX_CHANGE, MAX_FACTOR, MAX_START, MAX_TOTAL, draw_words

_SUMS = """
{a} {things} and {b} {things} are {a} + {b} = {c} {things}.
{a} {quality} and {b} {quality2} {things} are {a} + {b} = {c} {things}.
{b} more than {a} is {a} + {b} = {c}.
{who} {gain} {b} {things} beside {a} and has {a} + {b} = {c} {things}.
whoever {gain} another {b} after {a} has {a} + {b} = {c}.
"""
_DIFFERENCES = """
of {a} {things}, {b} are gone and {a} - {b} = {c} are left.
{b} fewer than {a} is {a} - {b} = {c}.
{a} {things} less {b} are {a} - {b} = {c} {things}.
{who} {lose} {b} of {a} {things} and has {a} - {b} = {c} {things} left.
whoever {lose} {b} out of {a} has {a} - {b} = {c} left.
"""
_PRODUCTS = """
{a} {boxes} with {b} {things} each hold {a} * {b} = {c} {things}.
{who} {give} each of {a} {people} {b} {things}, so the {people} get {a} * {b} = {c} {things}.
{b} times as many as {a} is {a} * {b} = {c}.
{a} {things} at {b} dollars each are worth {a} * {b} = {c} dollars.
who {trade} {a} {things} for {b} dollars each gets {a} * {b} = {c} dollars.
"""
_QUOTIENTS = """
{a} {things} fill {a} / {b} = {c} {boxes} of {b}.
who {pack} {a} {things} by {b} fills {a} / {b} = {c} {boxes}.
who {split} {a} {things} among {b} {people} makes it {a} / {b} = {c} {things} each.
each of {b} {people} gets {a} / {b} = {c} of {a} {things}.
{a} over {b} is {a} / {b} = {c}.
"""
_ECHOES = """
{who} says {a} and {b}, and {friend} says {a} and {b}.
{who} writes {a}, {b}, {n}; read from the end it is {n}, {b}, {a}.
the {things} of {who} are {a}, the {boxes} of {friend} are {b}: {b} {boxes}, {a} {things}.
{a} {things}, {b} {boxes}, {n} {people}: {n} {people}, {a} {things}, {b} {boxes}.
{who} counts {a} and {friend} counts {b}, so {a} is the number of {who} and {b} that of {friend}.
nobody must say how many {things} {who} has{end} or what number of {boxes} {friend} can {fill}{end2}.
how many {things} {who} has{end} does not say what number of {boxes} {friend} must {own}{end2}.
what {who} can {own}{end} is the number {a}, and you say {b} of the {boxes}.
can you say {a}, {who} can say {b}{end}.
{who} can {earn} {a} dollars{end}, and each of the {people} can {take} {b}{end2}.
the number of {things} is {a}{end}, {who} thinks, but {friend} must {own} {b} of them{end2}.
"""
_STATED = {"+": _SUMS, "-": _DIFFERENCES, "*": _PRODUCTS, "/": _QUOTIENTS}
_VERBS = {"gain": "gain", "lose": "lose", "pack": "pack", "split": "split", "trade": "price", "give": "give",
          "fill": "ask pack", "own": "ask", "earn": "ask price", "take": "ask split"}  # fmt: skip
_FRAME_KINDS = [kind for kind in KINDS if not kind.startswith("ask")]
_EQUATION_SHARE, _STATED_SHARE, _FRAME_SHARE = 0.6, 0.22, 0.08
_MAX_STATEMENTS, _MAX_EQUATIONS = 4, 6


def _equation(rng: Random, a: int | None = None) -> tuple[int, str, int, int]:
    """Numbers and operation as the word problems have them, from a given first number if there is one."""
    while True:
        operation = rng.choice("+-+-*/")
        first = a if a is not None else rng.randint(2, MAX_FACTOR if operation == "*" else MAX_TOTAL)
        second = rng.randint(2, MAX_FACTOR if operation in "*/" else MAX_CHANGE)
        if operation == "/" and a is None:
            first = second * rng.randint(2, MAX_FACTOR)
        if (operation == "*" and first > MAX_FACTOR) or (operation == "/" and first % second):
            if rng.random() < 0.5:
                a = None
            continue
        value = {"+": first + second, "-": first - second, "*": first * second, "/": first // second}[operation]
        if 2 <= value <= MAX_TOTAL and (operation != "/" or value <= MAX_FACTOR):
            return first, operation, second, value


def _equations(rng: Random) -> str:
    """A chain: each equation begins with the last one's result, where that has a next step."""
    parts, value = [], None
    for _ in range(rng.randint(1, _MAX_EQUATIONS)):
        a, operation, b, value = _equation(rng, value)
        spaced, tight = f"{a} {operation} {b} = {value}", f"{a}{operation}{b}={value}"
        parts.append(rng.choice((tight, tight, spaced, f"{a} {operation} {b} = {tight}")))
    return rng.choice((", ", "\n", "; ")).join(parts)


def _statement(rng: Random) -> str:
    words, pronoun, friends = draw_words(NOUNS["train"] | NOUNS["test"], rng)
    a, operation, b, c = _equation(rng)
    values = {**words, "a": a, "b": b, "c": c, "n": rng.randint(2, MAX_START), "friend": friends[0]}
    values |= {slot: rng.choice(KINDS[kind][1]) for slot, kind in _VERBS.items()}
    values |= {"end": rng.choice(KINDS["ask"][0]), "end2": rng.choice(KINDS["ask"][0])}
    share = rng.random() * (1 - _EQUATION_SHARE)
    if share < _STATED_SHARE:
        patterns = _STATED[operation].strip().splitlines()
    elif share < _STATED_SHARE + _FRAME_SHARE:
        patterns = FRAMES["train"][rng.choice(_FRAME_KINDS)]
        values |= {"k": rng.randint(2, MAX_FACTOR), "m": rng.randint(2, MAX_FACTOR), "b": rng.randint(2, MAX_CHANGE)}
    else:
        patterns = _ECHOES.strip().splitlines()
    sentence = rng.choice(patterns).format_map({**values, "who": rng.choice((pronoun, words["name"]))})
    return sentence[0].upper() + sentence[1:]


def raw_text(num_texts: int, seed: int) -> Iterator[str]:
    """Unlabelled texts: each a chain of equations, or a few statements that have nothing to do with each other."""
    rng = Random(seed)
    for _ in range(num_texts):
        is_equations = rng.random() < _EQUATION_SHARE
        statements = (_statement(rng) for _ in range(rng.randint(1, _MAX_STATEMENTS)))
        yield _equations(rng) if is_equations else rng.choice((" ", " ", "\n")).join(statements)
