"""The `fastpeft chat` command: a conversation in the terminal. torch is imported inside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import typer

from fastpeft.cli.ctrl_c import ctrl_c_asks, ctrl_c_ends_at_once
from fastpeft.cli.runs_commands import Best, ResultsDir, which_weights
from fastpeft.errors import UserError

HELP = "Ctrl-C ends an answer; /new begins anew; /exit or Ctrl-D ends."
_ASKS = "> "


def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder's path.")],
    system: Annotated[str | None, typer.Option(help="What the system says first.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time; else sampled.")] = 0.0,
    best: Best = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Talk to a trained language model."""
    from fastpeft.export.plan import find_run, plan_reading

    weights = which_weights(best)
    plan = plan_reading(find_run(run, results_dir), weights)
    print(f"loading {plan.run.model.name} and the {plan.weights} weights of {plan.folder.path.name}", flush=True)
    with ctrl_c_ends_at_once():
        from fastpeft.export.talking import Talker, TalkOptions

    talker = Talker.load(plan)
    print(HELP)
    options = TalkOptions(max_new_tokens, temperature)
    talk(lambda messages, stop: talker.answer(messages, options, _write, stop), system)


Message = dict[str, str]


class Answers(Protocol):
    def __call__(self, messages: list[Message], stop: Callable[[], bool], /) -> str:
        """Print the answer as it is generated, and return it."""
        ...


def talk(answer: Answers, system: str | None = None, ask: Callable[[str], str] = input) -> list[Message]:
    """Ask and answer until the user ends the conversation. Returns its messages."""
    begun = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begun)
    while True:
        try:
            question = ask(_ASKS).strip()
        except EOFError:
            print()
            return messages
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if question == "/exit":
            return messages
        if question == "/new":
            messages = list(begun)
        elif question:
            messages = _answered(answer, [*messages, {"role": "user", "content": question}])


def _answered(answer: Answers, messages: list[Message]) -> list[Message]:
    """`messages` with the answer; without the last question if it cannot be answered."""
    try:
        with ctrl_c_asks() as stop:
            text = answer(messages, stop)
    except UserError as error:
        print(f"fastpeft: {error}", file=sys.stderr)
        return messages[:-1]
    print(" [ended]" if stop() else "")
    return [*messages, {"role": "assistant", "content": text}]


def _write(text: str) -> None:
    from fastpeft.cli.safe_console import shown

    print(shown(text), end="", flush=True)
