"""`fastpeft chat` and `fastpeft data show`: a conversation in a terminal, and the rows as the model reads them."""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from fastpeft.cli import commands
from fastpeft.cli.chat_command import HELP, talk
from fastpeft.cli.data_commands import CLOSES, OPENS
from fastpeft.errors import UserError
from fastpeft.trainer import train
from tests.support.chat_runs import chat_run
from tests.support.problem_runs import problem_run
from tests.support.tiny_runs import tiny_run

LEARNS = {"method": "full", "budget": "120steps", "training": {"learning_rate": 3e-3}, "evaluation": {"every": "end"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a run that has learned to answer."""
    folder = tmp_path_factory.mktemp("chat")
    train(chat_run(folder, **LEARNS), results_dir=folder / "results", name="r")
    return folder / "results"


# ---- the conversation itself -----------------------------------------------------------------


def asks(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Questions, or what happens instead of one; then the end of the input."""
    rest = iter(lines)

    def ask(prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return ask


def test_a_conversation_is_kept_and_begun_anew(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    def answer(messages, stop) -> str:
        asked.append([message["content"] for message in messages])
        return f"answer {len(asked)}"

    said = talk(answer, "be brief", asks("one", "", "two", "/new", "three", "/exit", "never"))
    assert asked == [["be brief", "one"], ["be brief", "one", "answer 1", "two"], ["be brief", "three"]]
    assert [message["role"] for message in said] == ["system", "user", "assistant"]


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has them ignore it, and their children with them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_answer_and_not_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(messages, stop) -> str:
        if messages[-1]["content"] == "long":
            os.kill(os.getpid(), signal.SIGINT)
            while not stop():
                time.sleep(0.001)
            return "cut"
        return "whole"

    said = talk(answer, None, asks("long", KeyboardInterrupt, "short"))
    assert [message["content"] for message in said] == ["long", "cut", "short", "whole"]
    out = capsys.readouterr().out
    assert out.count("[ended]") == 1
    assert HELP in out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_question_that_cannot_be_answered_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(messages, stop) -> str:
        if messages[-1]["content"] == "bad":
            raise UserError("the template refuses it")
        return "good"

    said = talk(answer, None, asks("bad", "fine"))
    assert [message["content"] for message in said] == ["fine", "good"]
    assert "fastpeft: the template refuses it" in capsys.readouterr().err


# ---- with a model ----------------------------------------------------------------------------


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_trained_model_answers_in_a_terminal(trained: Path) -> None:
    """In a process of its own, through a terminal: two answers, Ctrl-C while it asks, and the end by Ctrl-D."""
    main, child = pty.openpty()
    command = [sys.executable, "-m", "fastpeft", "chat", "r", "--results-dir", str(trained), "--max-new-tokens", "12"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    screen = b""

    def until(text: bytes, count: int = 1) -> None:
        nonlocal screen
        while screen.count(text) < count:
            screen += os.read(main, 1024)

    try:
        until(b"> ")
        os.write(main, b"abc?\n")
        until(b"yes\r\n")
        until(b"> ", 2)
        while screen.count(b"Ctrl-C ends an answer") < 2:  # one between the prompt and the read is seen at the next key
            os.kill(process.pid, signal.SIGINT)
            if select.select([main], [], [], 1.0)[0]:
                screen += os.read(main, 1024)
        os.write(main, b"/new\nabc!\n")
        until(b"no way\r\n")
        os.write(main, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(main)
    assert b"Traceback" not in screen


def test_a_run_ends_with_commands_that_there_are(tmp_path: Path, fastpeft_here: Callable[..., object]) -> None:
    chat_run(tmp_path)
    more = ("--budget", "1steps", "--name", "r", "--results-dir", tmp_path / "results")
    outcome = fastpeft_here("train", "--run", tmp_path / "run.yaml", *more)
    told = [line.partition("fastpeft ")[2] for line in outcome.out.partition("run folder")[2].splitlines()[1:]]
    assert [command.split()[0] for command in told] == ["runs", "tui", "evaluate", "chat", "export"]
    for command in told:
        found, words = typer.main.get_command(commands.app), shlex.split(command)
        while isinstance(found, typer.core.TyperGroup):
            found = found.commands[words.pop(0)]
        assert tmp_path / "results" in found.make_context("fastpeft", words).params.values()


def test_a_run_that_cannot_talk_is_refused(tmp_path: Path, fastpeft_here: Callable[..., object]) -> None:
    train(tiny_run(tmp_path, budget="2steps", evaluation={"every": "end"}), results_dir=tmp_path / "results", name="r")
    outcome = fastpeft_here("chat", "r", "--results-dir", tmp_path / "results")
    assert "a run of the kind classification answers no questions" in outcome.refused()
    assert "is neither a run" in fastpeft_here("chat", "gone").refused()


# ---- rows ------------------------------------------------------------------------------------


def shown(run: Path, fastpeft_here: Callable[..., object], *more: object) -> str:
    outcome = fastpeft_here("data", "show", "--run", run, *more)
    assert outcome.code == 0, outcome
    return outcome.out


def marked(text: str) -> Iterator[str]:
    return (part.partition(CLOSES)[0] for part in text.split(OPENS)[2:])  # the first is the legend's


def test_the_first_rows_are_shown_with_what_is_learned(tmp_path: Path, fastpeft_here: Callable[..., object]) -> None:
    chat_run(tmp_path)
    out = shown(tmp_path / "run.yaml", fastpeft_here, "--rows", "2")
    assert out.count("what is learned stands in") == 2
    first, second = out.split("\nrow 1: ")[1].split("\nrow 2: ")
    assert list(marked(first)) == ["yes</s>"]
    assert list(marked(second)) == ["no way</s>"]
    assert "note: chats: 24 training conversations" in out
    problem_run(tmp_path / "p")
    assert f"{OPENS} b\n#### 13</s>{CLOSES}" in shown(tmp_path / "p" / "run.yaml", fastpeft_here, "--rows", "5")
    tiny_run(tmp_path / "t")
    assert "row 1: what is learned stands in" in shown(tmp_path / "t" / "run.yaml", fastpeft_here)


def test_what_is_cut_of_a_shown_row_is_said(tmp_path: Path, fastpeft_here: Callable[..., object]) -> None:
    chat_run(tmp_path)
    out = shown(tmp_path / "run.yaml", fastpeft_here, "dataset.max_length=8", "dataset.overflow=truncate_left")
    assert "note: of the rows below: 1 of 1 training conversations are longer than 8 tokens and are cut" in out


def test_a_row_that_the_template_does_not_take_is_refused(tmp_path: Path, fastpeft_here: Callable[..., object]) -> None:
    chat_run(tmp_path)
    outcome = fastpeft_here("data", "show", "--run", tmp_path / "run.yaml", "dataset.template=chatml")
    assert "has no token <|im_start|> and <|im_end|>" in outcome.refused()
    assert "data show needs --run" in fastpeft_here("data", "show").refused()
