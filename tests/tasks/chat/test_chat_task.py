"""Conversations through the trainer: loss and gradient against a reference, evaluations, and the template kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from fastpeft.errors import UserError
from fastpeft.export.plan import make_plan
from fastpeft.export.write import export
from fastpeft.tasks.chat.task import Chat
from fastpeft.tasks.chat.templates import FILE, NAMED
from fastpeft.trainer import train
from fastpeft.trainer.build import Job, build_job
from tests.support.chat_runs import chat_run, write_chats, write_pairs
from tests.support.tiny_runs import strict_events

CPU = torch.device("cpu")


def multi_job(folder: Path, **sections: Any) -> Job:
    """Conversations of one to three answers, without dropout."""
    dataset = {"path": str(write_chats(folder / "multi"))} | sections.pop("dataset", {})
    return build_job(chat_run(folder, dataset=dataset, adapter={"dropout": 0.0}, **sections))


def tokens_of(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """By hand, of the template `plain`: each text on its line, the end of text behind an answer, which is learned."""
    tokens, learned = [], []
    for message in row["messages"]:
        is_answer = message["role"] == "assistant"
        own = tokenizer(message["content"])["input_ids"] + is_answer * [tokenizer.eos_token_id]
        end = tokenizer("\n")["input_ids"]
        tokens += own + end
        learned += [is_answer] * len(own) + [False] * len(end)
    return tokens[:-1], learned[:-1]


def test_loss_and_gradient_are_those_of_a_reference_in_float64(tmp_path: Path) -> None:
    """Token by token, through PEFT's own layers; ours in micro-batches of unequal numbers of labelled tokens."""
    job = multi_job(tmp_path)
    generator = torch.Generator().manual_seed(1)
    job.adapter.flat.data.add_(0.1 * torch.randn(job.adapter.flat.data.shape, generator=generator))
    (tmp_path / "adapter").mkdir()
    job.adapter.save(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    reference = peft.PeftModel.from_pretrained(
        base, str(tmp_path / "adapter"), is_trainable=True, autocast_adapter_dtype=False
    ).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / "multi" / "train.jsonl").read_text().splitlines()]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        tokens, learned = tokens_of(row, tokenizer)
        logits = reference(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        for at in (at for at, is_learned in enumerate(learned) if is_learned):
            total, count = total - logits[at - 1, tokens[at]], count + 1
    (total / count).backward()

    every = np.arange(len(rows))
    assert job.task.num_items(every) == count
    parts = [every[:1], every[1:9], every[9:12], every[12:]]
    assert len({job.task.num_items(part) / len(part) for part in parts}) > 1
    job.adapter.flat.grad.zero_()
    loss = 0.0
    for part in parts:
        found = job.task.loss(job.adapter.model, job.task.collate(part, CPU), count).loss
        found.backward()
        loss += found.item()
    assert loss == pytest.approx(float(total) / count, rel=1e-6)
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in job.adapter.model.named_parameters() if p.requires_grad}
    assert wanted.keys() == ours.keys()
    for name, grad in wanted.items():
        assert grad is not None
        assert ours[name] is not None
        torch.testing.assert_close(ours[name].double(), grad, rtol=2e-4, atol=1e-7)


def test_the_score_is_of_held_out_answers_token_by_token(tmp_path: Path) -> None:
    job = multi_job(tmp_path)
    score = job.task.evaluate(job.adapter.model, job.limits, lambda: False, None)
    assert score is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / "multi" / "dev.jsonl").read_text().splitlines()]
    losses, right = [], []
    for row in rows:
        tokens, learned = tokens_of(row, tokenizer)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        places = [at for at, is_learned in enumerate(learned) if is_learned]
        losses += [-float(logits[at - 1, tokens[at]]) for at in places]
        right += [int(logits[at - 1].argmax()) == tokens[at] for at in places]
    assert job.task.metric == "token_accuracy"
    assert score.num_rows == len(rows)
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert score.more["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert score.value == pytest.approx(np.mean(right), abs=1e-9)
    answers = [answer for _, answer in score.answered() or ()]
    assert len(answers) == len(rows)
    assert sum(answer.counts[0] for answer in answers if answer.counts) == sum(right)


def test_a_run_learns_to_answer_and_its_samples_are_in_the_log(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training": {"learning_rate": 3e-3}, "budget": "120steps"}
    result = train(
        chat_run(tmp_path, method="full", evaluation={"every": "60steps"}, **settings), results_dir=tmp_path, name="r"
    )
    assert result.metric["value"] == 1.0
    events = list(strict_events(tmp_path / "r"))
    sets = [event["samples"] for event in events if event["type"] == "samples"]
    assert len(sets) == 2
    assert [one["prompt"] for one in sets[0]] == [one["prompt"] for one in sets[1]]
    assert len(sets[1]) == 3
    assert all(one["answer"] == one["reference"] for one in sets[1])
    (example,) = [event["pieces"] for event in events if event["type"] == "example"]
    assert [is_learned for _, is_learned in example] == [False, True]
    assert example[1][0] in ("yes</s>", "no way</s>")


@pytest.mark.parametrize("fault", ["long", "refused"])
def test_a_run_begins_whatever_is_wrong_with_the_first_conversation(fault: str, tmp_path: Path) -> None:
    """The example in the log is of the first that is trained on."""
    folder = write_pairs(tmp_path / "pairs")
    first = {"prompt": "a", "completion": {"long": "b" * 200, "refused": "</s>"}[fault]}
    rows = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(json.dumps(first) + "\n" + rows)
    dataset = {"path": str(folder), "overflow": "drop", "on_bad_row": "skip"}
    train(chat_run(tmp_path, dataset=dataset, budget="1steps"), results_dir=tmp_path, name="r")
    (example,) = [event["pieces"] for event in strict_events(tmp_path / "r") if event["type"] == "example"]
    assert [piece[0] for piece in example] == [json.loads(rows.splitlines()[0])["prompt"] + "\n", "yes</s>"]


def test_without_samples_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = multi_job(tmp_path, evaluation={"samples": 0})
    monkeypatch.setattr(Chat, "_answers", None)
    score = job.task.evaluate(job.adapter.model, job.limits, lambda: False, None)
    assert score is not None
    assert score.samples == ()
    assert score.decode_s is None


def test_samples_are_of_prompts_that_leave_room_for_an_answer(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        row["prompt"] = "a" * 200
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = build_job(chat_run(tmp_path, dataset={"path": str(folder), "overflow": "truncate_left"}))
    score = job.task.evaluate(job.adapter.model, job.limits, lambda: False, None)
    assert score is not None
    assert [sample.prompt for sample in score.samples] == [row["prompt"] for row in rows[4:7]]


def write_numbers(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"prompt": f"{'abc'[i % 3]}{i}", "completion": f"#### {i % 3}"} for i in range(24)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_answers_that_can_be_read_are_compared(tmp_path: Path) -> None:
    """GSM8K's form, in a conversation: train, dev and test split."""
    settings: dict[str, Any] = {
        "training": {"learning_rate": 3e-3},
        "budget": "150steps",
        "evaluation": {"every": "end"},
    }
    run = chat_run(tmp_path, method="full", dataset={"path": str(write_numbers(tmp_path / "numbers"))}, **settings)
    result = train(run, results_dir=tmp_path, name="r")
    assert result.metric["name"] == "exact_match"
    assert result.metric["value"] > 0.9
    assert result.metric["more"].keys() == {"token_accuracy", "perplexity", "no_answer", "cut"}
    assert result.test["value"] == result.metric["value"]


def test_the_template_goes_with_the_weights_and_into_the_export(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(NAMED["plain"].replace("+ '\\n'", "+ ' |\\n'"))
    run = chat_run(tmp_path, dataset={"template": str(path)}, budget="2steps", evaluation={"every": "end"})
    train(run, results_dir=tmp_path, name="r")
    text = path.read_text()
    assert (tmp_path / "r" / "adapter" / FILE).read_text() == text
    path.unlink()
    said: list[str] = []
    export(make_plan("r", results_dir=tmp_path), said.append)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "r" / "export")
    assert tokenizer.chat_template == text
    card = (tmp_path / "r" / "export" / "README.md").read_text()
    assert "tokenizer.apply_chat_template(messages" in card


def test_a_resume_under_another_template_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(NAMED["plain"])
    run = chat_run(tmp_path, dataset={"template": str(path)}, budget="6steps", evaluation={"every": "end"})
    train(run, results_dir=tmp_path, name="r")
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    (tmp_path / "r" / "result.json").write_text(json.dumps(result | {"status": "stopped"}))
    path.write_text(NAMED["plain"].replace("+ '\\n'", "+ ' |\\n'"))
    with pytest.raises(UserError, match="the texts of the train split are others"):
        train(None, results_dir=tmp_path, name="r", resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": None}, "has no chat template: set dataset.template to one of chatml, alpaca, plain"),
        ({"template": "chatml"}, "has no token <|im_start|> and <|im_end|>"),
        ({"template": "gone.jinja"}, "is none of chatml, alpaca, plain, and there is no such file"),
        ({"max_length": 8}, "none of 24 training conversations has a token to learn within 8 tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    long = write_chats(tmp_path / "multi")
    with pytest.raises(UserError) as caught:
        build_job(chat_run(tmp_path, dataset={"path": str(long)} | settings))
    assert message in str(caught.value)


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text("{% for message in messages %}")
    with pytest.raises(UserError, match=r"bad\.jinja: line 1 is no chat template"):
        build_job(chat_run(tmp_path, dataset={"template": str(path)}))


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}" + NAMED["plain"])
    with pytest.raises(UserError, match="refuses it: access to attribute '__class__'"):
        build_job(chat_run(tmp_path, dataset={"template": str(path)}))


def test_rows_that_a_template_does_not_take_are_named_or_left_out(tmp_path: Path) -> None:
    folder = write_chats(tmp_path / "multi")
    with (folder / "train.jsonl").open("a") as file:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ends here </s> or not"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl:25: turn 2 holds '</s>', which the tokenizer takes for"):
        build_job(chat_run(tmp_path, dataset={"path": str(folder)}))
    job = build_job(chat_run(tmp_path, dataset={"path": str(folder), "on_bad_row": "skip"}))
    assert len(job.task.train) == 24
    assert any("1 training rows that the template does not take are left out" in note for note in job.task.notes)
