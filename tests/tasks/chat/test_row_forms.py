"""Five forms of rows are told from their columns and become one thing; what cannot be used is refused by its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpeft.config.schema import ColumnsConfig, DatasetConfig
from fastpeft.data.rows import DataError
from fastpeft.tasks import load_task
from fastpeft.tasks.chat.answer_spans import Renderer
from fastpeft.tasks.chat.reading import Conversations
from fastpeft.tasks.chat.task import Chat
from fastpeft.tasks.chat.templates import NAMED, ChatTemplate
from tests.support.chat_templates import byte_tokenizer

SAID = [("user", "how many?"), ("assistant", "two"), ("user", "more?"), ("assistant", "three")]
PAIR = [("user", "how many?"), ("assistant", "two")]
CALL = {"name": "count", "arguments": {"of": "cats"}}


def write(path: Path, rows: list[Any]) -> Path:
    """As the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path, **dataset: Any) -> Chat:
    task = load_task(DatasetConfig(path=str(path), **{"validation_fraction": 0.5} | dataset))
    assert isinstance(task, Chat)
    return task


def all_rows(task: Chat) -> Conversations:
    return task.splits.train


def said(task: Chat) -> list[tuple[str, str]]:
    return [(str(turn.role), turn.text) for turn in all_rows(task).rows[0].turns]


FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], str]] = {
    "messages": (
        {"messages": [{"role": role, "content": text} for role, text in SAID]},
        SAID,
        "messages, from 'messages'",
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in SAID
            ]
        },
        SAID,
        "ShareGPT conversations, from 'conversations'",
    ),
    "prompt": (
        {"prompt": "how many?", "completion": "two"},
        PAIR,
        "prompt and completion, from the columns 'prompt' and 'completion'",
    ),
    "prompt of messages": (
        {"prompt": [{"role": "user", "content": "how many?"}], "completion": [{"role": "assistant", "content": "two"}]},
        PAIR,
        "prompt and completion, from the columns 'prompt' and 'completion'",
    ),
    "alpaca": (
        {"instruction": "count", "input": "cats", "output": "two"},
        [("user", "count\n\ncats"), ("assistant", "two")],
        "Alpaca instructions, from the columns 'instruction', 'output' and 'input'",
    ),
    "dolly": (
        {"instruction": "count", "context": "", "response": "two", "category": "open_qa"},
        [("user", "count"), ("assistant", "two")],
        "dolly instructions, from the columns 'instruction', 'response' and 'context'",
    ),
    "system column": (
        {"system": "be brief", "prompt": "how many?", "completion": "two"},
        [("system", "be brief"), *PAIR],
        "prompt and completion, from the columns 'prompt', 'completion' and 'system'",
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_told_from_its_columns_and_said(form: str, suffix: str, tmp_path: Path) -> None:
    row, expected, name = FORMS[form]
    task = read(write(tmp_path / f"rows{suffix}", [row] * 4))
    assert said(task) == expected
    assert task.notes[0].endswith(f"; {name}")
    assert task.notes[1] == f"dataset.task is chat: its columns are those of {name.partition(',')[0]}"


def test_an_alpaca_row_keeps_what_its_template_writes_apart(tmp_path: Path) -> None:
    rows = [{"instruction": "count", "input": about, "output": "two"} for about in ("cats", " ", "")]
    splits = read(write(tmp_path / "a.jsonl", rows * 2)).splits
    found = [*splits.train.rows, *splits.validation.rows]
    messages = {row.turns[0].text: row.turns[0].message for row in found}
    assert messages["count\n\ncats"]["input"] == "cats"
    assert "input" not in messages["count"]
    template = ChatTemplate(NAMED["alpaca"], byte_tokenizer(), "alpaca")
    texts = {row.turns[0].text: Renderer(template, "assistant").render(row).rows[0].text for row in found}
    assert "### Instruction:\ncount\n\n### Input:\ncats\n\n### Response:\ntwo" in texts["count\n\ncats"]
    assert "### Input" not in texts["count"]


def test_columns_are_overridden(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "old", "clean": "new", "input": "x", "said": [{"role": "user"}]}] * 4
    path = write(tmp_path / "a.jsonl", rows)
    task = read(path, task="chat", columns=ColumnsConfig(label="clean"))
    assert said(task) == [("user", "a\n\nx"), ("assistant", "new")]
    task = read(path, task="chat", columns=ColumnsConfig(text="instruction", text_pair="clean", label="output"))
    assert said(task) == [("user", "a\n\nnew"), ("assistant", "old")]
    other = write(tmp_path / "b.jsonl", [{"dialogue": FORMS["messages"][0]["messages"], "messages": "no"}] * 4)
    assert said(read(other, task="chat", columns=ColumnsConfig(text="dialogue"))) == SAID
    with pytest.raises(DataError, match=r"dataset.columns.text is 'gone'"):
        read(path, task="chat", columns=ColumnsConfig(text="gone"))


def test_messages_go_before_prompts_whatever_order_a_set_has(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c"} | FORMS["messages"][0]
    task = read(write(tmp_path / "a.jsonl", [row] * 4))
    assert said(task) == SAID
    assert "from 'messages'" in task.notes[0]


def test_questions_and_problems_are_conversations_where_the_task_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "how many?", "answer": "two"}] * 4)
    assert said(read(path, task="chat")) == PAIR
    path = write(tmp_path / "b.jsonl", [{"problem": "how many?", "solution": "two", "level": "1"}] * 4)
    assert said(read(path, task="chat")) == PAIR
    with pytest.raises(DataError, match="where are the conversations"):
        read(write(tmp_path / "c.jsonl", [{"text": "a", "label": 1}] * 4), task="chat")


def test_tools_and_their_results_are_context(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "how many?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"count": 2}'},
        {"from": "gpt", "value": "two"},
    ]
    row = {"conversations": turns, "tools": json.dumps([{"name": "count", "parameters": {}}])}
    found = all_rows(read(write(tmp_path / "a.jsonl", [row] * 4))).rows[0]
    assert [str(turn.role) for turn in found.turns] == ["user", "assistant", "tool", "assistant"]
    assert found.answers == [3]
    assert found.turns[1].calls == ({"type": "function", "function": CALL},)
    assert found.tools == ({"type": "function", "function": {"name": "count", "parameters": {}}},)
    openai = [
        {"role": "user", "content": "how many?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": CALL | {"arguments": '{"of": "cats"}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}]},
    ]
    found = all_rows(read(write(tmp_path / "b.jsonl", [{"messages": openai}] * 4))).rows[0]
    assert found.answers == [3]
    assert found.turns[1].calls == ({"id": "1", "type": "function", "function": CALL},)
    assert found.turns[3].text == "two"


def test_a_call_in_the_old_form_is_a_call_and_no_empty_answer(tmp_path: Path) -> None:
    call = CALL | {"arguments": json.dumps(CALL["arguments"])}
    turns = [
        {"role": "user", "content": "how many?"},
        {"role": "assistant", "content": "", "function_call": call},
        {"role": "function", "name": "count", "content": "2", "tool_call_id": "a1"},
        {"role": "assistant", "content": "two", "function_call": None},
    ]
    found = all_rows(read(write(tmp_path / "a.jsonl", [{"messages": turns}] * 4))).rows[0]
    assert found.answers == [3]
    assert found.turns[1].calls == ({"type": "function", "function": CALL},)
    assert found.turns[2].message == {"role": "tool", "content": "2", "name": "count", "tool_call_id": "a1"}


def test_a_system_column_that_repeats_the_system_turn_is_that_turn(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, *FORMS["messages"][0]["messages"]]
    task = read(write(tmp_path / "a.jsonl", [{"messages": turns, "system": "be brief"}] * 4))
    assert said(task) == [("system", "be brief"), *SAID]


def test_a_prompt_of_messages_is_context_even_where_the_assistant_speaks_in_it(tmp_path: Path) -> None:
    messages = [{"role": role, "content": text} for role, text in SAID]
    row = {"prompt": messages[:3], "completion": "three"}
    assert all_rows(read(write(tmp_path / "a.jsonl", [row] * 4))).rows[0].answers == [3]


BAD = {
    "role": ({"messages": [{"role": "narrator", "content": "a"}]}, "turn 1 has the role 'narrator', which is none of"),
    "no role": ({"messages": [{"content": "a"}]}, "turn 1 has the role None"),
    "only system": ({"messages": [{"role": "system", "content": "a"}]}, "has no turn of the assistant's"),
    "empty": ({"messages": []}, "has no turn of the assistant's"),
    "content": ({"messages": [{"role": "user", "content": 7}]}, "turn 1's content is 7, expected text"),
    "nothing": ({"messages": [{"role": "assistant", "content": None}]}, "turn 1's content is None"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "turn 1 has a part of the type 'image'",
    ),
    "half": ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
    "no list": ({"messages": 3}, "column 'messages' holds 3"),
    "a text": ({"messages": ["hello"]}, "turn 1 is 'hello'"),
    "call": (
        {"messages": [{"role": "function_call", "content": "count(cats)"}]},
        "turn 1, a call of a tool, is no JSON",
    ),
    "calls": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]},
        "turn 1 has the tool calls 5, expected a list",
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "c"},
        "turn 1 is of the system, and says something else than the column 'system'",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_refused_by_its_line_or_left_out_and_counted(fault: str, tmp_path: Path) -> None:
    row, message = BAD[fault]
    good = FORMS["messages"][0]
    path = write(tmp_path / "a.jsonl", [good, row, good, good])
    with pytest.raises(DataError, match=r"a\.jsonl:2: ") as caught:
        read(path)
    assert message in str(caught.value)
    assert "dataset.on_bad_row=skip" in str(caught.value)
    task = read(path, on_bad_row="skip")
    assert len(task.splits.train) + len(task.splits.validation) == 3
    assert any(note.startswith("1 bad rows are left out") and message in note for note in task.notes)


def test_what_is_held_out_is_trained_on_nowhere(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 10}", "completion": f"a{i}"} for i in range(40)]
    task = read(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2)
    train, held = ({text for (text,) in split.texts} for split in (task.splits.train, task.splits.validation))
    assert held
    assert not train & held
    assert any("has no validation split" in note for note in task.notes)


def test_empty_answers_are_trained_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "" if i < 4 else "a"} for i in range(20)]
    task = read(write(tmp_path / "a.jsonl", rows), validation_fraction=0.05)
    assert any("answers of the training rows are empty: of them the end alone is learned" in n for n in task.notes)
