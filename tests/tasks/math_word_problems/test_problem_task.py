"""The loss of word problems is transformers' own, whatever the batches; statistics are those of the full logits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpeft.config import ConfigError, load_run
from fastpeft.data.batches import IGNORE, micro_batches
from fastpeft.device_memory import TokenLimits
from fastpeft.errors import UserError
from fastpeft.signals import Need
from fastpeft.tasks.causal_lm import loss as loss_module
from fastpeft.tasks.math_word_problems import task as task_module
from fastpeft.tasks.math_word_problems.task import MathWordProblems
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.probes.hooks import Probes
from fastpeft.trainer.step import forward_backward
from tests.support.problem_runs import NUM_HELD_OUT, problem_run, write_run

LIMITS = TokenLimits(10**6, 10**6)


def go_on() -> bool:
    return False


def build(folder: Path, seed: int = 0, dropout: float = 0.0, **sections) -> Job:
    """A job whose adapter is no longer zero."""
    adapter = {"dropout": dropout} | sections.pop("adapter", {})
    job = build_job(problem_run(folder, adapter=adapter, **sections))
    generator = torch.Generator().manual_seed(seed)
    job.adapter.flat.data.add_(torch.randn(job.adapter.flat.data.shape, generator=generator), alpha=0.05)
    return job


@pytest.fixture
def job(tmp_path: Path, seed: int) -> Job:
    return build(tmp_path, seed)


def first_batch(job: Job):
    rows = job.batches.rows(0)
    return job.task.collate(rows, job.device), job.task.num_items(rows)


def gradients(job: Job) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in job.adapter.model.named_parameters() if p.requires_grad}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# ---- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family", "model"),
    [
        ("lora", "qwen3", {}),
        ("lora", "llama", {}),
        ("full", "qwen3", {}),  # a tied head, trained
        ("full", "llama", {}),
        ("full", "gpt2", {}),
        ("iw_lora", "mistral", {}),
    ],
)
def test_is_the_loss_of_transformers_with_every_gradient(
    method: str, family: str, model: dict, tmp_path: Path, seed: int
) -> None:
    write_run(tmp_path, family, **model)
    job = build(tmp_path, seed, method=method, adapter={"target_modules": "all-linear"})
    batch, num_items = first_batch(job)
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, 1:] = batch.labels[:, :-1]  # transformers shifts them itself
    assert num_items == int((labels != IGNORE).sum())
    job.adapter.flat.grad.zero_()
    wanted = job.adapter.model(**batch.inputs, labels=labels).loss
    wanted.backward()
    theirs = gradients(job)
    job.adapter.flat.grad.zero_()
    found = job.task.loss(job.adapter.model, batch, num_items)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found.statistics == {}
    ours = gradients(job)
    assert len(ours) >= 14
    for name, gradient in ours.items():
        assert relative(gradient, theirs[name]) < 2e-5, name
    if method == "full":
        assert any("embed" in name or "wte" in name for name in ours)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_micro_batches_add_up_to_the_batch(method: str, tmp_path: Path, seed: int) -> None:
    job = build(tmp_path, seed, method=method, training={"batch_size": 12})
    rows, encoded = job.batches.rows(0), job.batches.encoded
    assert len(set(encoded.num_labelled[rows].tolist())) > 1  # uneven numbers of labels
    probes = Probes(frozenset({Need.TOKENS}), job.adapter, job.optimizer)

    def whole(max_tokens: int):
        parts = list(micro_batches(encoded, rows, max_tokens))
        batches = (job.task.collate(part, job.device) for part in parts)
        found = forward_backward(job.adapter, job.task.loss, batches, job.task.num_items(rows), probes=probes)
        statistics = {name: float(value) for name, value in found.statistics.items()}
        return len(parts), float(found.loss), job.adapter.flat.grad.clone(), statistics

    parts, loss, gradient, statistics = whole(10**6)
    assert parts == 1
    assert float(gradient.norm()) > 1e-3
    for max_tokens, few in ((60, 11), (1, 12)):
        parts, split_loss, split_gradient, split_statistics = whole(max_tokens)
        assert 1 < parts <= few or parts == len(rows) == few
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert relative(split_gradient, gradient) < 1e-5
        assert split_statistics == pytest.approx(statistics, rel=1e-5)


def test_full_fine_tuning_in_bf16_is_near_fp32(tmp_path: Path, seed: int) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        job = build(tmp_path, seed, method="full", training={"precision": precision})
        batch, num_items = first_batch(job)
        with torch.random.fork_rng():
            result = job.task.loss(job.adapter.model, batch, num_items, tuple(Need))
        job.adapter.flat.grad.zero_()
        result.loss.backward()
        assert job.adapter.flat.data.dtype == torch.float32
        found[precision] = result, job.adapter.flat.grad.clone()
    (fp32, gradient), (bf16, rounded) = found["fp32"], found["bf16"]
    assert fp32.loss.item() != bf16.loss.item()
    assert bf16.loss.item() == pytest.approx(fp32.loss.item(), rel=2e-2)
    assert relative(rounded, gradient) < 0.1
    assert fp32.statistics.keys() == {"answer_fisher", "entropy", "lens_entropy", "prompt_fisher"}
    for name, value in fp32.statistics.items():
        assert float(bf16.statistics[name]) == pytest.approx(float(value), rel=5e-2), name


# ---- statistics ------------------------------------------------------------------------------


def rows_of_logits(job: Job, batch) -> torch.Tensor:
    with torch.no_grad():
        return job.adapter.model(**batch.inputs).logits.double()


def fisher(logits: torch.Tensor, label: int) -> float:
    wanted = torch.zeros_like(logits)
    wanted[label] = 1.0
    return float((logits.softmax(-1) - wanted).square().sum())


def entropy(logits: torch.Tensor) -> float:
    return float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum())


def mean(values) -> float:
    return float(np.mean(list(values)))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_token_statistics_are_those_of_the_full_logits(method: str, tmp_path: Path, seed: int) -> None:
    job = build(tmp_path, seed, method=method)
    batch, num_items = first_batch(job)
    found = job.task.loss(job.adapter.model, batch, num_items, (Need.TOKENS,)).statistics
    assert found.keys() == {"answer_fisher", "entropy"}
    logits = rows_of_logits(job, batch)
    places = [(i, t) for i, t in np.ndindex(*batch.labels.shape) if batch.labels[i, t] != IGNORE]
    assert len(places) == num_items
    wanted = mean(fisher(logits[i, t], int(batch.labels[i, t])) for i, t in places)
    assert float(found["answer_fisher"]) == pytest.approx(wanted, rel=1e-5)
    assert float(found["entropy"]) == pytest.approx(mean(entropy(logits[i, t]) for i, t in places), rel=1e-5)


def prompt_places(job: Job, batch) -> list[range]:
    """Positions of each row whose next token still belongs to the prompt."""
    return [range(int((row != IGNORE).nonzero()[0])) for row in batch.labels]


@pytest.mark.parametrize("most", [1024, 12])
def test_prompt_statistics_are_those_of_prompt_tokens(most: int, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "PROMPT_TOKENS", most)
    batch, num_items = first_batch(job)
    ids, logits = batch.inputs["input_ids"], rows_of_logits(job, batch)
    each = min(most // len(ids), ids.shape[1])  # of a row
    wanted, everywhere = [], []
    for i, places in enumerate(prompt_places(job, batch)):
        by_place = [fisher(logits[i, t], int(ids[i, t + 1])) for t in places]
        wanted += [by_place[int((k + 0.5) / each * len(places))] for k in range(each)]
        everywhere += by_place
    found = float(job.task.loss(job.adapter.model, batch, num_items, (Need.PROMPT,)).statistics["prompt_fisher"])
    assert found == pytest.approx(mean(wanted), rel=1e-5)
    assert found == pytest.approx(mean(everywhere), rel=0.2)

    spoilt = ids.clone()  # the answers, which nothing in the prompts may see
    spoilt[batch.labels.roll(1, 1) != IGNORE] += 1
    batch.inputs["input_ids"] = spoilt
    again = job.task.loss(job.adapter.model, batch, num_items, (Need.PROMPT,)).statistics["prompt_fisher"]
    assert float(again) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "targets", "layer"),
    [("lora", "all-linear", 0), ("lora", r"model\.layers\.1\..*_proj", 1), ("full", "all-linear", 0)],
)
@pytest.mark.parametrize("most", [256, 5])
def test_lens_entropy_is_that_behind_the_first_adapted_layer(
    method: str, targets: str, layer: int, most: int, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LENS_TOKENS", most)
    write_run(tmp_path, num_hidden_layers=3)
    job = build(tmp_path, seed, method=method, adapter={"target_modules": targets})
    batch, num_items = first_batch(job)
    found = job.task.loss(job.adapter.model, batch, num_items, (Need.LENS,)).statistics
    assert found.keys() == {"lens_entropy"}
    core = job.adapter.model if method == "full" else job.adapter.model.get_base_model()
    with torch.no_grad():
        states = core(**batch.inputs, output_hidden_states=True).hidden_states
        logits = core.lm_head(core.model.norm(states[layer + 1])).double()
        other = core.lm_head(core.model.norm(states[2 - layer])).double()
    rows = batch.rows if most == 256 else batch.rows[[round(i) for i in np.floor(np.linspace(0, num_items - 1, 5))]]
    wanted, elsewhere = (mean(entropy(some.flatten(0, 1)[row]) for row in rows) for some in (logits, other))
    assert float(found["lens_entropy"]) == pytest.approx(wanted, rel=1e-5)
    assert elsewhere != pytest.approx(wanted, rel=5e-5)  # another layer gives another number


def test_nothing_more_is_computed_than_what_is_asked_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, watched, real = [], [], loss_module.linear_cross_entropy

    def noted(*args, **more):
        calls.append(more)
        return real(*args, **more)

    monkeypatch.setattr(loss_module, "linear_cross_entropy", noted)
    monkeypatch.setattr(loss_module, "FirstLayer", lambda model: watched.append(model))
    batch, num_items = first_batch(job)
    assert job.task.loss(job.adapter.model, batch, num_items).statistics == {}
    assert job.task.loss(job.adapter.model, batch, num_items, (Need.LOSS, Need.DESCENT)).statistics == {}
    assert [(call["statistics"], call["lens_hidden"]) for call in calls] == [(False, None)] * 2
    assert not watched
    job.task.loss(job.adapter.model, batch, num_items, (Need.TOKENS,))
    assert len(calls) == 3
    assert calls[2]["statistics"]


# ---- evaluation ------------------------------------------------------------------------------


def test_validation_loss_is_the_mean_over_all_answer_tokens(job: Job) -> None:
    objective, model = job.task, job.adapter.model
    before = job.adapter.flat.data.clone()
    found = objective.evaluate(model, LIMITS, go_on, None)
    assert model.training
    assert torch.equal(job.adapter.flat.data, before)
    encoded, total = objective.validation, 0.0
    model.eval()
    for row in range(len(encoded)):
        own = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]]
        ids, first = torch.tensor(own, dtype=torch.int64)[None], int(encoded.prompt_lengths[row])
        with torch.no_grad():
            predicted = model(input_ids=ids).logits.double()[0, first - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(predicted, ids[0, first:], reduction="sum"))
    assert found.loss == pytest.approx(total / encoded.num_labelled.sum(), rel=1e-5)
    small = objective.evaluate(model, TokenLimits(1, 40), go_on, None)
    assert small.loss == pytest.approx(found.loss, rel=1e-6)
    assert (found.num_rows, small.value) == (len(encoded), found.value)


def test_evaluation_ignores_dropout_and_draws_no_random_numbers(tmp_path: Path) -> None:
    job = build(tmp_path, dropout=0.5)
    state = torch.get_rng_state()
    scores = [job.task.evaluate(job.adapter.model, LIMITS, go_on, None) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert scores[0].loss == scores[1].loss


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_stop_ends_the_evaluation_wherever_it_is(calls: int, job: Job) -> None:
    asked = []
    stop = lambda: asked.append(0) or len(asked) >= calls  # noqa: E731
    assert job.task.evaluate(job.adapter.model, TokenLimits(100, 100), stop, None) is None
    assert len(asked) == calls
    assert job.adapter.model.training


def test_test_split_costs_its_problems_and_samples(tmp_path: Path) -> None:
    six, eight = 6, 8
    assert build(tmp_path).task.test_cost == eight / six
    job = build(tmp_path, evaluation={"pass_at": 2, "num_samples": 4, "max_test_examples": 3})
    assert job.task.test_cost == 5 * 3 / six
    score = job.task.evaluate_test(job.adapter.model, LIMITS, go_on, None)
    assert score.num_rows == 3
    assert 0 <= score.more["pass@2"] <= 1
    assert "pass@2" not in job.task.evaluate(job.adapter.model, LIMITS, go_on, None).more
    (tmp_path / "problems" / "test.jsonl").unlink()
    job = build(tmp_path)
    assert not job.task.has_test
    assert job.task.test_cost == 0


def test_expected_seconds_count_the_loss_and_every_new_token(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine as it is: within a factor, and rising with what is asked for."""
    expected = job.task.time_evaluation(job.adapter.model, LIMITS)
    loss_s = job.task.answer_loss.expected_s(job.adapter.model, job.task.validation, LIMITS)
    assert expected > loss_s * 0.2 > 0
    monkeypatch.setattr(task_module, "expected_decode_s", lambda *args: 100.0)
    assert 100 <= job.task.time_evaluation(job.adapter.model, LIMITS) < 130  # references are read with the prompts


def test_largest_evaluation_batch_is_the_widest_that_is_decoded(job: Job) -> None:
    rows, width = job.task.largest_evaluation_batch(LIMITS)
    validation, test = job.task.validation, job.task._test.encoded
    assert len(test) > len(validation)
    assert (rows, width) == (len(test), math.ceil(int(test.prompt_lengths.max()) / 8) * 8 + 32)
    assert job.task.largest_evaluation_batch(TokenLimits(1, 2 * width)) == (2, width)


# ---- what does not fit -----------------------------------------------------------------------


def add_long_rows(folder: Path, split: str, lengths: list[int]) -> None:
    with (folder / "problems" / f"{split}.jsonl").open("a") as file:
        for length in lengths:
            file.write(json.dumps({"question": "q" * (length - 1) + "?", "answer": "a\n#### 2"}) + "\n")


def test_prompts_without_room_for_an_answer_are_named_and_wrong(tmp_path: Path) -> None:
    """The model takes 128 tokens, an answer up to 90 of them."""
    write_run(tmp_path)
    add_long_rows(tmp_path, "test", [38, 39, 70])
    job = build(tmp_path, evaluation={"max_new_tokens": 90})
    told = [note for note in job.notes if "leave no room" in note]
    file = tmp_path / "problems" / "test.jsonl"
    assert told == [
        "2 prompts of over 38 tokens leave no room for evaluation.max_new_tokens and count as wrong: "
        f"{file}:10 (39 tokens), {file}:11 (70 tokens)"
    ]
    score = job.task.evaluate_test(job.adapter.model, LIMITS, go_on, None)
    assert score.num_rows == 11
    assert score.more["no_room"] == 2 / 11
    assert math.isfinite(score.loss)


def test_training_problems_that_are_too_long_are_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    add_long_rows(tmp_path, "train", [64])
    job = build(tmp_path)
    assert len(job.task.train) == 24 + 1 - 6 - 1
    assert any("longer than 64 tokens and left out" in note and "train.jsonl:25" in note for note in job.notes)


def test_the_first_problem_that_is_trained_on_is_shown_where_the_first_is_too_long(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "problems" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[:7] = [row | {"question": "a" * 70 + row["question"]} for row in rows[:7]]  # six may be held out
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = build(tmp_path)
    first = job.task.first_rows(job.backbone.tokenizer, "model", 1)
    assert len(first.rows) == 1
    tokens = job.task.train.tokens[: job.task.train.offsets[1]]
    assert "".join(piece.text for piece in first.rows[0]) == job.backbone.tokenizer.decode(tokens)
    assert first.notes == ("they are the first that are trained on, as none of the first 1 can be",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_new_tokens": 128},
            r"evaluation\.max_new_tokens: model .* takes 128 tokens.*no room for a prompt.*lower",
        ),
        (
            {"max_new_tokens": 127},
            r"none of 6 prompts .*train\.jsonl leaves room .* the shortest has \d+ .* room for 1",
        ),
    ],
)
def test_a_context_that_is_too_short_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, evaluation=settings)


def test_a_long_context_bounds_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, max_position_embeddings=4096)
    job = build(tmp_path, evaluation={"max_new_tokens": 2000})
    assert isinstance(job.task, MathWordProblems)
    assert not len(job.task.validation.unusable)


@pytest.mark.parametrize(
    ("settings", "test_file", "told"),
    [
        ({"num_samples": 8}, True, "evaluation.num_samples was set, but evaluation.pass_at is 0: no answer is sampled"),
        (
            {"pass_at": 3, "num_samples": 2},
            True,
            "evaluation.num_samples is 2, but pass@3 needs 3 samples: so many are drawn",
        ),
        ({"pass_at": 3}, False, "evaluation.pass_at was set, but there is no test split: no answer is sampled"),
        ({"pass_at": 3, "num_samples": 3}, True, None),
    ],
)
def test_sampling_settings_that_do_nothing_are_pointed_out(
    settings: dict, test_file: bool, told: str | None, tmp_path: Path
) -> None:
    write_run(tmp_path)
    if not test_file:
        (tmp_path / "problems" / "test.jsonl").unlink()
    notes = [note for note in build(tmp_path, evaluation=settings).notes if "sample" in note]
    assert notes == ([told] if told else [])


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("{question}", "{question}"),
        ("Q: {question} A:", "Q: {question} A:"),
        ('"Q: {question}\\nA:"', "Q: {question}\nA:"),
        ("'{question}:'", "{question}:"),
    ],
)
def test_a_prompt_on_the_command_line_is_text(text: str, prompt: str) -> None:
    assert load_run("linear_gsm8k", [f"dataset.prompt={text}"]).dataset.prompt == prompt


@pytest.mark.parametrize("text", ["Q: {q}", "{question} {question}", '"no question"'])
def test_a_prompt_without_one_question_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"dataset\.prompt: expected \{question\} once, where the question goes, got "
    ):
        load_run("linear_gsm8k", [f"dataset.prompt={text}"])


# ---- export --------------------------------------------------------------------------------


def test_an_export_is_compared_on_rows_that_are_too_long_to_train_on(job: Job) -> None:
    """Of long problems none may be left in the sample."""
    task = job.task
    task.config = replace(task.config, max_length=12)
    backbone = task.load_model(job.run.model, torch.float32, job.device, False)
    check = task.export_check(backbone)
    assert check.max_length == 12
    assert len(check.answers(backbone.model, backbone.tokenizer, job.device)) > NUM_HELD_OUT
    assert 0 <= check.score(backbone.model, job.device) <= 1
