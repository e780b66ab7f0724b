"""Raw sentences from the grammar of the embedded task, to pretrain its encoder on: no pairs, no labels.

They use the words of both splits, in training frames and in patterns of their own, never in a validation frame.
"""

from collections.abc import Iterator
from random import Random

from fastpeft.standins.sentence_grammar import FRAMES, LEXICON, Frame, Lexicon
from fastpeft.standins.sentence_pairs import Cell, Words

_PATTERNS = """
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
"""
_REPORTS = """
{n} says that {sentence} , and {m} agrees that {sentence} .
{n} asked whether {sentence} , and {m} said yes , {sentence} .
{sentence} , says {n} , and {m} repeats : {sentence} .
{n} heard that {sentence} : {m} swears that {sentence} .
{sentence} , as {n} knew , for {m} had said that {sentence} .
{n} , who says that {sentence} , means that {sentence} .
{n} never believed that {sentence} , but {sentence} .
{n} says that {sentence} , but {m} says that {other} .
"""
"""Reported speech: a clause with its echo, or with another clause, so that a word is found again elsewhere."""
_REPORT_SHARE, _FRAME_SHARE = 0.7, 0.1


def _raw_slots(words: Words) -> dict[str, str]:
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


def _raw_frame_slots(frame: Frame, words: Words) -> dict[str, str]:
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
    words = Words(Lexicon(*(getattr(train, field) + getattr(validation, field) for field in fields)), rng)
    scenes, reports = _PATTERNS.strip().splitlines(), _REPORTS.strip().splitlines()

    def clause() -> str:
        frame = rng.choice(FRAMES["train"])
        return frame.text.format_map(_raw_frame_slots(frame, words)).removesuffix(" .")

    for _ in range(num_sentences):
        kind = rng.random()
        if kind < _FRAME_SHARE:
            yield f"{clause()} ."
        elif kind < _FRAME_SHARE + _REPORT_SHARE:
            yield rng.choice(reports).format_map({**_raw_slots(words), "sentence": clause(), "other": clause()})
        else:
            yield rng.choice(scenes).format_map(_raw_slots(words))
