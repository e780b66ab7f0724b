"""The stand-in task: what it promises, and its labels against a second, independent reading of the sentences."""

import json
import re
from itertools import chain
from pathlib import Path
from random import Random

import pytest

from fastpeft.standins import PATHS
from fastpeft.standins import build_deberta as build
from fastpeft.standins import sentence_grammar as embedded_grammar
from fastpeft.standins import sentence_pairs as embedded
from fastpeft.standins.sentence_text import raw_sentences
from tests.support.tiers import some

SEED = 20240731
NUM_CHECKED, NUM_WORLDS = 300, 300

FUNCTION_WORDS = set(
    re.findall(r"\S+", "a at by each every false is it least near never no not one some that the there true was .")
)
WORD_TAGS = {
    word: field
    for lexicon in embedded_grammar.LEXICON.values()
    for field in ("agents", "things", "verbs", "transitives", "antonyms", "places", "names")
    for group in getattr(lexicon, field)
    for word in ((group,) if isinstance(group, str) else group)
}


@pytest.fixture(scope="module")
def pairs():
    return {"train": embedded.train_pairs(), "validation": embedded.validation_pairs()}


def sentences(rows):
    return chain.from_iterable(row[:2] for row in rows)


def skeleton(sentence: str) -> str:
    """The sentence with its content words replaced by their kinds (nouns of all kinds alike)."""
    tags = (WORD_TAGS.get(word, word) for word in sentence.split())
    return " ".join("noun" if tag in ("agents", "things") else tag for tag in tags)


def test_sizes_and_balance(pairs):
    for split, num_pairs in (("train", 20_000), ("validation", 2_000)):
        rows = pairs[split]
        assert len(rows) == len({row[:2] for row in rows}) == num_pairs
        assert all(premise != hypothesis for premise, hypothesis, _ in rows)
        shares = [sum(row[2] == label for row in rows) / num_pairs for label in range(3)]
        assert all(0.32 < share < 0.35 for share in shares), shares


def test_same_every_time(pairs):
    assert embedded.train_pairs() == pairs["train"]
    assert embedded.validation_pairs() == pairs["validation"]
    assert list(raw_sentences(500, 3)) == list(raw_sentences(500, 3))
    assert list(raw_sentences(500, 3)) != list(raw_sentences(500, 4))


def test_splits_share_no_content_word(pairs):
    lexicon_words = {split: lexicon.words() for split, lexicon in embedded_grammar.LEXICON.items()}
    assert not lexicon_words["train"] & lexicon_words["validation"]
    for split, words in lexicon_words.items():
        text_words = {word for sentence in sentences(pairs[split]) for word in sentence.split()}
        assert text_words - FUNCTION_WORDS <= words


def test_splits_share_no_frame(pairs):
    frames = {split: {frame.text for frame in embedded_grammar.FRAMES[split]} for split in ("train", "validation")}
    assert not frames["train"] & frames["validation"]
    skeletons = {split: {skeleton(sentence) for sentence in sentences(rows)} for split, rows in pairs.items()}
    assert len(skeletons["validation"]) > 50
    assert not skeletons["train"] & skeletons["validation"]


@pytest.mark.soak
def test_raw_text_has_all_words_and_no_validation_frame(pairs):
    raw = list(raw_sentences(30_000, 0))
    held_out = {skeleton(sentence) for sentence in sentences(pairs["validation"])}
    assert not held_out & {skeleton(sentence) for sentence in raw}
    raw_words = {word for sentence in raw for word in sentence.split()}
    assert all(lexicon.words() <= raw_words for lexicon in embedded_grammar.LEXICON.values())
    assert not any("\t" in sentence or "[SEP]" in sentence for sentence in raw)


# ---- a second reading: parse the text, then look at random worlds


class World:
    """A few individuals with nouns, verbs, qualities and places, and who did what to whom."""

    def __init__(self, words: set[str], rng: Random):
        lexicons = embedded_grammar.LEXICON.values()
        self.above = {m: g[0] for lexicon in lexicons for g in (*lexicon.nouns, *lexicon.verbs) for m in g[1:]}
        members = range(rng.randint(1, 4))
        words = sorted(words)
        nouns = [word for word in words if WORD_TAGS.get(word) in ("agents", "things")]
        opposites = [pair for lexicon in lexicons for pair in lexicon.antonyms if set(words).intersection(pair)]
        self.facts: list[set[str]] = []
        for _ in members:
            facts = {word for word in words if WORD_TAGS.get(word) in ("verbs", "places") and rng.random() < 0.5}
            facts.add(rng.choice([*nouns, ""]))
            facts |= {self.above[word] for word in facts if word in self.above}
            facts |= {rng.choice([*antonyms, ""]) for antonyms in opposites}
            self.facts.append(facts)
        self.names = {word: rng.choice(members) for word in words if WORD_TAGS.get(word) == "names"}
        self.done = {(i, j) for i in members for j in members if rng.random() < 0.5}

    def others(self, phrase: str) -> list[int]:
        """Individuals that "a dog" or a name may stand for."""
        if phrase in self.names:
            return [self.names[phrase]]
        return [j for j, facts in enumerate(self.facts) if phrase.removeprefix("a ") in facts]

    def has(self, i: int, predicate: str) -> bool:
        if denied := re.fullmatch(r"(never|was never|was not) (.*)", predicate):
            rest = denied[2] if denied[1] == "never" else f"was {denied[2]}"
            return not self.has(i, rest)
        if match := re.fullmatch(r"was (\w+) by (.*)", predicate):
            return any((j, i) in self.done for j in self.others(match[2]))
        if match := re.fullmatch(r"was (?:a )?(\w+)", predicate):
            return match[1] in self.facts[i]
        verb, _, phrase = predicate.partition(" ")
        return any((i, j) in self.done for j in self.others(phrase)) if phrase else verb in self.facts[i]


DETERMINER = r"(at least one|not every|not one|every|each|some|no|a)"


def parse(sentence: str):
    """(denied, determiner, noun phrase words, predicate); the determiner of a name is the name."""
    text = sentence.removesuffix(" .")
    denied = text.startswith("it is false that ")
    text = re.sub(r"^it is (true|false) that ", "", text)
    if found := re.fullmatch(rf"(?:there|it) was {DETERMINER} (.+?) that (.*)", text):
        determiner, noun_phrase, predicate = found.groups()
        return denied, determiner, noun_phrase.replace("near the ", "").split(), predicate
    first = text.split()[0]
    if WORD_TAGS.get(first) == "names":
        return denied, first, [], text.removeprefix(f"{first} ")
    determiner, rest = re.match(rf"{DETERMINER} (.*)", text).groups()
    words = rest.split()
    end = 2 if WORD_TAGS[words[0]] == "antonyms" else 1
    noun_phrase = words[:end]
    if words[end] == "near":
        noun_phrase, end = [*noun_phrase, words[end + 2]], end + 3
    elif words[end] == "that":
        noun_phrase, end = [*noun_phrase, words[end + 1]], end + 2
    return denied, determiner, noun_phrase, " ".join(words[end:])


def truth(parsed, world: World) -> bool | None:
    """None where a set that the sentence mentions is empty."""
    denied, determiner, noun_phrase, predicate = parsed
    mentioned = re.search(r"(?<!was )(?<!not )a \w+$", predicate)
    if mentioned and not world.others(mentioned[0]):
        return None
    if determiner in world.names:
        return world.has(world.names[determiner], predicate) != denied
    found = [world.has(i, predicate) for i, facts in enumerate(world.facts) if facts.issuperset(noun_phrase)]
    if not found:
        return None
    value = {"every": all(found), "each": all(found), "no": not any(found), "not one": not any(found),
             "not every": not all(found)}.get(determiner, any(found))  # fmt: skip
    return value != denied


@pytest.mark.parametrize("split", some(["train", "validation"]))
def test_labels_hold_in_random_worlds(pairs, split):
    print(f"seed {SEED}")
    rng = Random(SEED)
    num_neutral = num_witnessed = 0
    for premise, hypothesis, label in rng.sample(pairs[split], NUM_CHECKED):
        parsed = parse(premise), parse(hypothesis)
        words, seen = set(f"{premise} {hypothesis}".split()), set()
        for _ in range(NUM_WORLDS):
            world = World(words, rng)
            values = tuple(truth(part, world) for part in parsed)
            if None not in values and values[0]:
                seen.add(values[1])
            if len(seen) == 2:
                break
        shown = f"{premise} / {hypothesis}"
        if embedded.LABELS[label] == "neutral":
            num_neutral, num_witnessed = num_neutral + 1, num_witnessed + (len(seen) == 2)
        else:
            assert seen <= {embedded.LABELS[label] == "entailment"}, shown
    assert num_neutral > NUM_CHECKED / 5
    assert num_witnessed > 0.97 * num_neutral, (num_witnessed, num_neutral)


def test_known_labels():
    every, some, no, not_every = ("every", True), ("some", True), ("every", False), ("some", False)
    cases = [
        (every, some, "same", "absent", "same", "entailment"),
        (some, every, "same", "absent", "same", "neutral"),
        (no, every, "same", "absent", "same", "contradiction"),
        (not_every, every, "same", "absent", "same", "contradiction"),
        (some, some, "up", "absent", "same", "entailment"),  # some poodle slept: some dog slept
        (every, every, "down", "absent", "same", "entailment"),  # every dog slept: every poodle slept
        (every, every, "up", "absent", "same", "neutral"),
        (every, every, "same", "added", "same", "entailment"),  # every dog slept: every wet dog slept
        (every, some, "same", "absent", "disjoint", "contradiction"),  # every dog was wet: some dog was dry
        (some, not_every, "same", "absent", "disjoint", "entailment"),
        (some, some, "disjoint", "absent", "same", "neutral"),
    ]
    for *case, label in cases:
        assert embedded_grammar.label_of(*case) == label, case


# ---- the shipped encoder


def test_pretraining_sees_one_sentence_an_input():
    """No pair, no separator inside; what is wrong in it is where a word was exchanged."""
    raw = list(raw_sentences(600, 5))
    tokenizer = build.build_tokenizer(raw)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(raw, add_special_tokens=False)]
    rng = Random(5)
    corrupt = build.Corruptor(encoded, build.mask_shares(encoded, tokenizer.get_vocab_size()), rng)
    batches = build.batches(encoded, corrupt, 32, rng)
    rows = [(ids.tolist(), flags.tolist()) for batch in batches for ids, flags in batch]
    assert len(rows) == len(raw)
    for ids, flags in rows:
        text = [token for token in ids if token != build.PAD]
        assert (text[0], text[-1], text.count(build.SEP), text.count(build.CLS)) == (build.CLS, build.SEP, 1, 1)
        assert (flags[0], flags[len(text) - 1], any(flags[len(text) :])) == (0, 0, False)
    untouched = {(build.CLS, *ids, build.SEP) for ids in encoded}
    kept = [tuple(token for token in ids if token != build.PAD) for ids, flags in rows if not any(flags)]
    assert 0.4 < len(kept) / len(rows) < 0.65
    whole = sum(text in untouched for text in kept)
    assert whole > len(kept) / 3, "but for a word left out here and there they are the raw sentences"
    assert not any(tuple(t for t in ids if t != build.PAD) in untouched for ids, flags in rows if any(flags))


SHAPES = {"deberta_tiny": (128, 4), "deberta_small": (64, 3), "deberta_deep": (96, 6)}
"""Width and layers."""


@pytest.mark.parametrize("name", SHAPES)
def test_encoder_loads_and_is_small(name):
    transformers = pytest.importorskip("transformers")
    folder = PATHS[name]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert not any(Path(name).suffix in (".bin", ".pt", ".pth", ".pkl") for name in names)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "deberta-v2"
    assert (config["hidden_size"], config["num_hidden_layers"]) == SHAPES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    batch = tokenizer(["every poodle slept ."] * 2, ["some dog slept .", "no ."], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist().count(tokenizer.sep_token_id) == 2
    assert batch["input_ids"][1, -1] == tokenizer.pad_token_id
    assert model(**batch).logits.shape == (2, 3)
    known = {word for lexicon in embedded_grammar.LEXICON.values() for word in lexicon.words()} | FUNCTION_WORDS
    assert known <= set(tokenizer.get_vocab())
