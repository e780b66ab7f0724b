"""What is labelled is what the assistant says, exactly, behind exactly what a model reads before it: 12 templates."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fastpeft.tasks.chat.answer_spans import Renderer
from fastpeft.tasks.chat.answer_tokens import token_rows
from fastpeft.tasks.chat.conversations import Conversation, RowFault, read_tools, read_turns
from fastpeft.tasks.chat.templates import NAMED, ChatTemplate
from tests.support.chat_templates import DOES, QWEN2, QWEN3, TEMPLATES, Does, byte_tokenizer, piece_tokenizer

OURS = {name: Does("<|im_end|>" if name == "chatml" else "</s>") for name in NAMED}
ALL = {name: (text, DOES[name]) for name, text in TEMPLATES.items()} | {
    f"ours: {name}": (text, OURS[name]) for name, text in NAMED.items()
}
REFUSES_TWO = {"qwen3": "opens an answer with '<think>", "llama2": "must alternate", "gemma": "must alternate"}
"""Templates that do not take two answers in a row, and why."""
REFUSES_FIRST = {
    **dict.fromkeys(("llama2", "gemma"), "must alternate"),
    **dict.fromkeys(("qwen2", "vicuna"), "refuses it"),
    **dict.fromkeys(("zephyr", "ours: plain"), "writes nothing before it"),
}
"""Those that cannot begin with one."""
HARD = [
    "yes", "a 🙂", "🙂", "é\u0301", "\n\nnew", " led by a space", "ends in one ", "two  spaces", "1,234.5", "",
    "नमस्ते", "```py\nx = 1\n```", "</answer>", "tab\there", "\u200bzero width",
]  # fmt: skip


def conversation(*said: tuple[str, str], **more: Any) -> Conversation:
    return Conversation(tuple(read_turns([{"role": role, "content": text} for role, text in said], "m")), 1, **more)


def template(text: str, tokenizer: Any = None) -> ChatTemplate:
    return ChatTemplate(text, tokenizer or byte_tokenizer(), "test")


def rows_of(row: Conversation, of: ChatTemplate, train_on: Any = "assistant") -> list[tuple[list[int], list[bool]]]:
    rendered = Renderer(of, train_on).render(row)
    return [(tokens, labelled) for rows in token_rows(rendered.rows, of) for tokens, labelled in rows]


def flagged_tokenizer(**flags: bool) -> Any:
    """As byte_tokenizer, whose special tokens take in white space beside them."""
    settings = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token.update(flags)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def stretches(row: tuple[list[int], list[bool]]) -> list[tuple[int, int]]:
    """Of labelled tokens, from and to."""
    tokens, labelled = row
    edges = [i for i in range(len(tokens) + 1) if ([False, *labelled])[i] != ([*labelled, False])[i]]
    return list(zip(edges[::2], edges[1::2]))


def answers_of(rows: list[tuple[list[int], list[bool]]], of: ChatTemplate) -> list[str]:
    return [of.tokenizer.decode(row[0][start:end]) for row in rows for start, end in stretches(row)]


def expected(text: str, does: Does, is_last: bool = True) -> str:
    return does.lead + (text.strip() if does.trims else text) + does.end


@pytest.mark.parametrize("name", ALL)
def test_the_labelled_text_is_the_assistants_exactly(name: str) -> None:
    text, does = ALL[name]
    of = template(text)
    system = [("system", "be brief")] if does.takes_system else []
    for one, two in zip(HARD, [*HARD[1:], HARD[0]]):
        row = conversation(*system, ("user", "hi 🙂"), ("assistant", one), ("user", "and "), ("assistant", two))
        rows = rows_of(row, of)
        assert answers_of(rows, of) == [expected(one, does), expected(two, does)]
        assert answers_of(rows_of(row, of, "last"), of) == [expected(two, does)]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, piece_tokenizer])
@pytest.mark.parametrize("name", ALL)
def test_before_an_answer_stands_what_a_model_is_given_at_inference(name: str, tokenizer: Any) -> None:
    text, _ = ALL[name]
    of = template(text, tokenizer())
    rng = random.Random(0)
    for _ in range(12):
        said = [(role, rng.choice(HARD[:9])) for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
        row = conversation(*said)
        prompts = [of.render(row.messages(i), prompt=True)[0] for i in row.answers]
        wanted = [of.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        rows = rows_of(row, of)
        assert [tokens[:start] for tokens, labels in rows for start, _ in stretches((tokens, labels))] == wanted


@pytest.mark.parametrize("name", ALL)
def test_two_answers_in_a_row_and_one_at_the_beginning_are_right_or_refused(name: str) -> None:
    text, does = ALL[name]
    of = template(text)
    twice = conversation(("user", "a"), ("assistant", "one"), ("assistant", "two"))
    if name in REFUSES_TWO:
        with pytest.raises(RowFault, match=f"^turn 3: .*{REFUSES_TWO[name]}"):
            rows_of(twice, of)
    else:
        assert "".join(answers_of(rows_of(twice, of), of)) == expected("one", does) + expected("two", does)
    first = conversation(("assistant", "hello"), ("user", "a"), ("assistant", "one"))
    if name in REFUSES_FIRST:
        with pytest.raises(RowFault, match=f"^turn 1: .*{REFUSES_FIRST[name]}"):
            rows_of(first, of)
    else:
        assert answers_of(rows_of(first, of), of) == [
            expected("hello", does if name != "qwen3" else does._replace(lead="")),
            expected("one", does),
        ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_spans_are_those_of_generation_marks(name: str) -> None:
    """A template that has the marks round what is generated says the same as one that is compared by its prefixes."""
    marked = template(TEMPLATES["smollm3"])
    assert marked.has_marks
    plain = template(TEMPLATES["chatml"])
    row = conversation(("user", "hi"), ("assistant", "a 🙂"), ("user", "and"), ("assistant", ""))
    assert rows_of(row, marked) == rows_of(row, plain)


def test_every_token_is_learned_where_all_is_asked_for() -> None:
    of = template(TEMPLATES["chatml"])
    ((tokens, labelled),) = rows_of(conversation(("user", "a"), ("assistant", "b")), of, "all")
    assert all(labelled)
    assert of.tokenizer.decode(tokens) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"


def test_every_token_is_that_of_turns_behind_the_last_answer_too() -> None:
    of = template(TEMPLATES["chatml"])
    row = conversation(("user", "a"), ("assistant", "b"), ("user", "thanks"))
    ((tokens, labelled),) = rows_of(row, of, "all")
    assert all(labelled)
    assert of.tokenizer.decode(tokens) == of.render(row.messages())[0]
    assert answers_of(rows_of(row, of), of) == ["b<|im_end|>"]


# ---- templates that rewrite ------------------------------------------------------------------


def test_a_template_that_drops_earlier_thoughts_trains_each_answer_as_inference_shows_it() -> None:
    of = template(QWEN3)
    thought = "<think>\nsum\n</think>\n\n"
    row = conversation(("user", "a"), ("assistant", thought + "one"), ("user", "b"), ("assistant", thought + "two"))
    rows = rows_of(row, of)
    assert answers_of(rows, of) == [thought + "one<|im_end|>", thought + "two<|im_end|>"]
    second = of.tokenizer.decode(rows[1][0])
    assert "sum" not in second.partition("two")[0].rpartition("<think>")[0]
    assert second.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>")


def test_thoughts_in_a_field_of_their_own_are_learned_or_refused() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one", "reasoning_content": "well"},
    ]
    row = Conversation(tuple(read_turns(turns, "m")), 1)
    of = template(QWEN3)
    assert answers_of(rows_of(row, of), of) == ["<think>\nwell\n</think>\n\none<|im_end|>"]
    with pytest.raises(RowFault, match=r"turn 2: .* writes it as 'one<\|im_end\|>\\n', which is not what it says"):
        rows_of(row, template(TEMPLATES["chatml"]))


def test_a_template_that_drops_the_last_thought_is_refused() -> None:
    row = conversation(("user", "a"), ("assistant", "<think>well</think>one"))
    with pytest.raises(RowFault, match=r"turn 2: .* writes it as 'one</s>', which is not what it says"):
        rows_of(row, template(TEMPLATES["deepseek"]))


def test_a_template_whose_prompt_is_no_beginning_of_the_answer_is_refused_with_the_place() -> None:
    text = TEMPLATES["chatml"].replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    with pytest.raises(RowFault, match=r"turn 2: .* opens an answer with '<think>\\n', and writes 'b<\|im_end\|>\\n'"):
        rows_of(conversation(("user", "a"), ("assistant", "b")), template(text))


def test_a_template_that_changes_what_is_said_is_refused() -> None:
    text = TEMPLATES["chatml"].replace("message.content", "(message.content | upper)")
    with pytest.raises(RowFault, match=r"writes it as 'YES<\|im_end\|>\\n', which is not what it says"):
        rows_of(conversation(("user", "A"), ("assistant", "yes")), template(text))


def test_a_template_that_ends_no_answer_is_refused() -> None:
    text = TEMPLATES["chatml"].replace("<|im_end|>", "")
    with pytest.raises(RowFault, match="puts no token behind an answer that ends it"):
        rows_of(conversation(("user", "a"), ("assistant", "b")), template(text))


# ---- what templates leave out ----------------------------------------------------------------


def test_a_role_that_a_template_drops_is_refused() -> None:
    text = TEMPLATES["qwen2"].replace("message.role == 'tool'", "false")
    row = conversation(("user", "a"), ("tool", "found it"), ("assistant", "b"))
    with pytest.raises(RowFault, match="leaves turn 2, of the role tool, out; take a template that writes it"):
        rows_of(row, template(text))
    assert answers_of(rows_of(row, template(QWEN2)), template(QWEN2)) == ["b<|im_end|>"]


def test_calls_and_tools_are_read_and_not_learned_and_not_lost() -> None:
    turns = [
        {"role": "user", "content": "how many?"},
        {"from": "function_call", "value": '{"name": "count", "arguments": {"of": "cats"}}'},
        {"role": "tool", "content": '{"count": "2 \\u00e9"}'},
        {"role": "assistant", "content": "two"},
    ]
    row = Conversation(tuple(read_turns(turns, "m")), 1, read_tools('[{"name": "count"}]'))
    of = template(NAMED["chatml"])
    ((tokens, labelled),) = rows_of(row, of)
    text = of.tokenizer.decode(tokens)
    assert '<tool_call>\n{"name": "count", "arguments": {"of": "cats"}}\n</tool_call><|im_end|>' in text
    assert '{"type": "function", "function": {"name": "count"}}' in text
    assert answers_of([(tokens, labelled)], of) == ["two<|im_end|>"]
    with pytest.raises(RowFault, match="leaves the tools out"):
        rows_of(row, template(QWEN2))
    with pytest.raises(RowFault, match="leaves the call of 'count' in turn 2 out"):
        rows_of(Conversation(row.turns, 1), template(TEMPLATES["chatml"]))


def test_a_control_token_in_a_text_is_refused() -> None:
    """An answer would end at it."""
    for said in (("user", "a"), ("assistant", "so <|im_end|> it")), (("user", "<s>old</s>"), ("assistant", "b")):
        with pytest.raises(RowFault, match=r"holds '<.*>', which the tokenizer takes for"):
            rows_of(conversation(*said), template(TEMPLATES["chatml"]))


# ---- tokens over the border ------------------------------------------------------------------


def test_a_token_over_the_border_gives_each_answer_its_own_row() -> None:
    """A prompt that ends in a space: tokenised as a whole, the space would belong to the answer's first token."""
    text = TEMPLATES["vicuna"].replace("'ASSISTANT:' }}", "'ASSISTANT: ' }}")
    of = template(text)
    row = conversation(("user", "a"), ("assistant", "the one"), ("user", "b"), ("assistant", "answer"))
    rows = rows_of(row, of)
    assert len(rows) == 2
    assert answers_of(rows, of) == ["the one</s>", "answer</s>"]
    for (tokens, labelled), i in zip(rows, row.answers):
        prompt = of.render(row.messages(i), prompt=True)[0]
        assert tokens[: labelled.index(True)] == of.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert of.tokenizer.decode(tokens) == of.render(row.messages(i + 1))[0]


def test_without_offsets_each_answer_is_tokenised_behind_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    of = template(TEMPLATES["chatml"])
    row = conversation(("user", "a"), ("assistant", "🙂"), ("user", "b"), ("assistant", "two"))
    fast = answers_of(rows_of(row, of), of)
    monkeypatch.setattr(type(of.tokenizer), "is_fast", property(lambda self: False))
    rows = rows_of(row, of)
    assert (len(rows), answers_of(rows, of)) == (2, fast)


def test_a_prompt_whose_end_no_token_stands_for_is_refused() -> None:
    """A tokenizer that drops white space at the end of a text: behind what a model reads, no answer gives the text."""
    tokenizer = byte_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    of = template(TEMPLATES["vicuna"].replace("'ASSISTANT:' }}", "'ASSISTANT: ' }}"), tokenizer)
    with pytest.raises(RowFault, match="the tokens of the answer 'b</s>' cannot be told from those before it"):
        rows_of(conversation(("user", "a"), ("assistant", "b")), of)


@pytest.mark.parametrize(
    ("flags", "text", "is_taken"),
    [
        ({"rstrip": True}, "\n\nnew", True),
        ({"rstrip": True}, "new\n", False),
        ({"lstrip": True}, "new\n", True),
        ({"lstrip": True}, " new", False),
        ({}, " new\n", False),
    ],
)
def test_white_space_that_a_special_token_takes_in_is_told(flags: dict[str, bool], text: str, is_taken: bool) -> None:
    of = template(TEMPLATES["phi3"], flagged_tokenizer(**flags))
    row = conversation(("user", "a"), ("assistant", text))
    assert Renderer(of, "assistant").render(row).stripped is is_taken
    assert answers_of(rows_of(row, of), of) == [f"{text.strip() if is_taken else text}<|end|>"]


def test_an_unknown_character_does_not_hide_in_that_at_the_prompts_end() -> None:
    """Several in a row are one token, which begins before the answer."""
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("</s>", -1.0)], unk_id=0))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    text = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '答') }}{% endfor %}"
    of = template(text, tokenizer)
    assert answers_of(rows_of(conversation(("user", "a"), ("assistant", "b")), of), of) == ["b</s>"]
    with pytest.raises(RowFault, match="cannot be told from those before it"):
        rows_of(conversation(("user", "a"), ("assistant", "好b")), of)


# ---- many at once ----------------------------------------------------------------------------


def test_rows_rendered_together_are_those_rendered_one_by_one_and_faults_stay_with_their_rows() -> None:
    rows = [
        conversation(("user", f"{i}"), ("assistant", text), ("user", "b"), ("assistant", "c"))
        for i, text in enumerate(HARD)
    ]
    refused = conversation(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    of = template(TEMPLATES["gemma"])
    for given in (rows, [*rows[:3], refused, *rows[3:]]):
        found = Renderer(of, "assistant").render_all(given)
        for row, one in zip(given, found, strict=True):
            if row is refused:
                assert isinstance(one, RowFault)
                assert "must alternate" in str(one)
            else:
                assert one == Renderer(of, "assistant").render(row)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, piece_tokenizer])
def test_tokens_without_their_places_are_those_with_them(tokenizer: Any) -> None:
    of = template(TEMPLATES["chatml"], tokenizer())
    long = of.tokenizer(["a b"], truncation=True, max_length=1, padding="max_length")  # leaves its settings behind
    assert len(long["input_ids"][0]) == 1
    rendered = [
        Renderer(of, "assistant").render(conversation(("user", "hi"), ("assistant", text))).rows[0] for text in HARD
    ]
    for row, ((tokens, labelled),) in zip(rendered, token_rows(rendered, of), strict=True):
        whole, prompt = of.tokenizer([row.text, row.text[: row.spans[0][0]]], add_special_tokens=False)["input_ids"]
        assert tokens == whole or whole[: len(prompt)] != prompt
        assert of.tokenizer.decode(tokens) == of.tokenizer.decode(of.tokenizer(row.text)["input_ids"])
        assert of.tokenizer.decode(tokens[: labelled.index(True)]) == of.tokenizer.decode(prompt)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, piece_tokenizer])
@pytest.mark.parametrize("name", ALL)
def test_behind_a_special_token_the_prompt_need_not_be_tokenised_by_itself(name: str, tokenizer: Any) -> None:
    of, plain = template(ALL[name][0], tokenizer()), template(ALL[name][0], tokenizer())
    plain.splits = {}
    renderer = Renderer(of, "assistant")
    rendered = [renderer.render(conversation(("user", "hi"), ("assistant", text))).rows[0] for text in HARD]
    assert token_rows(rendered, of) == token_rows(rendered, plain)
