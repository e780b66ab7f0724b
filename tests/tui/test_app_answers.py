"""The answers of a language model over time, and its first training row with what is learned of it."""

from __future__ import annotations

from pathlib import Path

from fastpeft.tui.answer_list import LEARNED, READ, Answered, AnswerSet, answers_text
from fastpeft.tui.screens.run_screen import RunScreen
from fastpeft.tui.tail import RunTail
from tests.support.pilots import SIZES, drive, text_of, until, until_shown
from tests.support.tui_logs import event, lines, make_run, usual

EXAMPLE = event("example", 0.0, 0, pieces=[["Question: 1 + 1?\n", False], ["two</s>", True]])


def samples(step: int, *answers: str, **fields: object) -> dict:
    said = [{"prompt": f"prompt {i}", "answer": answer, "reference": f"r{i}"} for i, answer in enumerate(answers)]
    return event("samples", step / 10, step, split="validation", samples=said, **fields)


def test_a_tail_reads_them_and_keeps_the_newest_row(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    bad = [event("samples", 1.0, 1, split="validation", samples=[{"prompt": "p"}]), event("example", 1.0, 1, pieces=3)]
    path.write_bytes(lines([EXAMPLE, samples(10, "a", "b"), *bad, samples(20, "c\x1b[31m", "d")]))
    tail = RunTail(path)
    while not tail.is_caught_up:
        tail.poll()
    assert tail.example == (("Question: 1 + 1?\n", False), ("two</s>", True))
    assert [one.step for one in tail.answers] == [10, 20]
    assert [one.answer for one in tail.answers[-1].answers] == ["c", "d"]
    assert tail.malformed == 2


def test_what_is_learned_is_bright_and_what_is_read_dim() -> None:
    text = answers_text((("read ", False), ("learned", True)), [])
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["read "] == READ
    assert styles["learned"] == LEARNED


def test_answers_stand_under_their_prompts_newest_first() -> None:
    sets = [AnswerSet(step, "validation", (Answered("p", text, "r"),)) for step, text in ((10, "no"), (20, ""))]
    sets.append(AnswerSet(20, "test", (Answered("q", "yes", "r"),)))
    shown = answers_text(None, sets).plain.split("\n")
    assert [line.strip() for line in shown if line.strip()] == [
        "answers to prompts of the validation split", "p", "20 (nothing)", "10 no", "wanted r",
        "answers to prompts of the test split", "q", "20 yes", "wanted r",
    ]  # fmt: skip


def test_a_pane_shows_them_where_there_are_any(tmp_path: Path) -> None:
    make_run(tmp_path, "a", [*usual(30)[:-1], EXAMPLE, samples(10, "cold"), samples(20, "warm")])

    async def script(app, pilot) -> None:
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen._tail.is_caught_up)
        await until(pilot, lambda: app.screen.has_answers)
        await pilot.press("5")
        await until_shown(pilot, "what is bright is learned")
        text = text_of(app.screen)
        assert "Question: 1 + 1?" in text
        assert text.index("20 warm") < text.index("10 cold") < text.index("wanted r0")
        await pilot.press("1")
        assert "20 warm" not in text_of(app.screen)

    drive(tmp_path, script, SIZES[1])


def test_a_run_without_them_has_no_such_pane(tmp_path: Path) -> None:
    make_run(tmp_path, "a", usual(30))

    async def script(app, pilot) -> None:
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen._tail.is_caught_up)
        await pilot.press("5")
        assert app.screen.pane == "curves"

    drive(tmp_path, script, SIZES[1])
