"""Calculator notes: the result is written in, by tokens that read as they should, and only where it is asked for."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastpeft.tasks.causal_lm.calculator_notes import Notes, open_expression
from fastpeft.tasks.causal_lm.generate import DecodeOptions, decode
from tests.support.tiny import causal_model

ANSWERS = [
    "She sold 48/2 = <<48/2=24>>24 clips in May. #### 72",
    "He pays 1.5*3=<<1.5*3=4.5>>4.5 dollars (100-20)=<<100-20=80>>80",
]
END = 0


def byte_level():
    """As GPT-2, Llama 3 and Qwen split text: `=<<` may be one token, digits and signs never share one."""
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), 320)


def unsplit():
    """Merges across everything: `=2` and `24>>` may be tokens."""
    return trained(pre_tokenizers.Split("~", "isolated"), decoders.Fuse(), 200)


def metaspace():
    """As Llama 2 and Mistral: a space before whatever is encoded, and single digits."""
    parts = [
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        pre_tokenizers.Digits(individual_digits=True),
    ]
    return trained(pre_tokenizers.Sequence(parts), decoders.Metaspace(prepend_scheme="first"), 90)


def trained(pre_tokenizer, decoder, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=list("0123456789"), show_progress=False
    )
    tokenizer.train_from_iterator(ANSWERS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def spelled(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def written(tokenizer, text, complete, then=" May"):
    """What becomes of a row whose model writes `text`, and after it `then` over and over."""
    notes = Notes(complete, tokenizer, 1, [END])
    filler = spelled(tokenizer, then)
    found = [notes.read([token], [0])[0] for token in spelled(tokenizer, text)]
    return found, [notes.read([filler[-1]], [0])[0] for _ in range(12)], filler[-1]


TOKENIZERS = {"byte_level": byte_level, "unsplit": unsplit, "metaspace": metaspace}


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_the_result_is_forced(tokenizer):
    asked = []
    before, after, filler = written(tokenizer, "He sold <<48/2=", lambda text: asked.append(text) or "24")
    assert asked == ["48/2"]
    forced = after[: after.index(filler)]
    assert tokenizer.decode(before + forced) == tokenizer.decode(before) + "24>>"
    assert set(after[len(forced) :]) == {filler}


def test_the_result_is_spelled_as_in_an_answer(tokenizer):
    before, after, _ = written(tokenizer, "She sold <<48/2=", lambda _: "24")
    whole = spelled(tokenizer, "She sold <<48/2=24>>")
    assert (before + after)[: len(whole)] == whole


def test_where_no_result_is_known_the_model_goes_on(tokenizer):
    _, after, filler = written(tokenizer, "He sold <<x/2=", lambda _: None)
    assert set(after) == {filler}


@pytest.mark.parametrize("text", ["48/2 =", "<<48/2", "<<48/2>> =", "<48/2=", "= <<="])
def test_nothing_is_asked_elsewhere(text, tokenizer):
    written(tokenizer, text, lambda asked: pytest.fail(asked))


def test_a_finished_note_is_not_asked_again(tokenizer):
    asked = []
    written(tokenizer, "<<48/2=24>> = <<24=", asked.append)
    assert asked == ["48/2", "24"]


def test_two_notes_of_one_answer(tokenizer):
    results = {"1.5*3": "4.5", "100-20": "80"}
    notes = Notes(results.get, tokenizer, 1, [END])
    text, done = "", []
    for part in ("pays <<1.5*3=", "pays <<1.5*3=4.5>> or <<100-20="):
        for token in spelled(tokenizer, part)[len(done) :]:
            done.append(notes.read([token], [0])[0])
        while notes._forced[0]:
            done.append(notes.read([5], [0])[0])
        text = tokenizer.decode(done)
    assert text == "pays <<1.5*3=4.5>> or <<100-20=80>>"


def test_a_token_may_hold_more_than_the_equals_sign():
    tokenizer = unsplit()
    asked = []
    token = next(t for t, i in tokenizer.get_vocab().items() if "=" in t[:-1] and not t.endswith("="))
    open_note = spelled(tokenizer, "<<48/2")
    notes = Notes(lambda text: asked.append(text) or "24", tokenizer, 1, [END])
    last = tokenizer.convert_tokens_to_ids(token)
    assert [notes.read([t], [0])[0] for t in [*open_note, last, 7]] == [*open_note, last, 7]
    assert asked == []


def test_a_result_that_cannot_be_spelled_is_left_out(tokenizer):
    _, after, filler = written(tokenizer, "He sold <<48/2=", lambda _: "∞")  # not in the alphabet of either
    if "∞" in tokenizer.decode(spelled(tokenizer, "∞")):
        assert filler != after[0]  # bytes spell everything
    else:
        assert set(after) == {filler}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<<1+1=", "1+1"),
        ("a <<1=1>>, <<2*3=", "2*3"),
        ("<<<2*3=", "2*3"),
        ("<<1+1=2=", "1+1=2"),
        ("<<=", None),
        ("<<1+1>> =", None),
        ("<<1+1= ", None),
        ("<1+1=", None),
        ("", None),
        ("=", None),
        ("<<" + "1" * 200 + "=", "1" * 200),
        ("<<" + "1" * 201 + "=", None),
        ("<<" * 10**5 + "1" * 201 + "=", None),
    ],
)
def test_what_an_open_note_says(text, wanted):
    assert open_expression(text) == wanted


# ---- while decoding ------------------------------------------------------------------------


class Spelling:
    """Each token is a word of its own; number 5 opens a note and closes it with the sign."""

    def __init__(self, size):
        self.words = ["", *"012", "4", "<<6*7=", *"=35789", ">>", *(f"[{i}]" for i in range(13, size))]

    def decode(self, tokens, **_):
        return "".join(self.words[token] for token in tokens)

    def encode(self, text, **_):
        singles = {word: i for i, word in enumerate(self.words) if len(word) == 1} | {">": 12}
        return [singles[letter] for letter in text.replace(">>", ">")]


def continued(prompts, complete=None, most=24):
    model = causal_model("qwen3", vocab_size=24, seed=3).eval()
    settings = {"eos_tokens": [1], "pad_token": 0, "max_tokens": 600, "complete": complete, "tokenizer": Spelling(24)}
    return [answer for [answer] in decode(model, prompts, options=DecodeOptions(most), **settings).answers]


def test_the_model_reads_what_was_forced():
    """What follows a forced result is what the model says after it; rows without a note are left alone."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(13, 24, (1 + i % 25,), generator=generator).tolist() for i in range(50)]
    asked = []

    def complete(text):
        asked.append(text)
        return "42"

    num_noted = 0
    for prompt, unaided, answer in zip(prompts, continued(prompts), continued(prompts, complete), strict=True):
        if 5 not in unaided.tokens:
            assert answer == unaided
            continue
        num_noted += 1
        start = unaided.tokens.index(5) + 1
        assert answer.tokens[:start] == unaided.tokens[:start]
        end = start + 3
        assert answer.tokens[start:end] == Spelling(24).encode("42>>")[: 24 - start]
        if end < 24:
            [rest] = continued([prompt + answer.tokens[:end]], complete, 24 - end)
            assert (answer.tokens[end:], answer.ended) == (rest.tokens, rest.ended)
    assert 3 < num_noted < 50
    assert set(asked) == {"6*7"}


def test_a_calculator_that_knows_nothing_changes_nothing():
    prompts = [[13, 14, 15], [16], [17, 18]]
    assert continued(prompts, lambda _: None) == continued(prompts)
