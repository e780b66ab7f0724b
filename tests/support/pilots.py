"""Drive the program without a terminal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from textual.pilot import Pilot
from textual.screen import Screen

from fastpeft.tui.program import FastpeftApp

SIZES = ((80, 24), (120, 40), (200, 60))
Script = Callable[[FastpeftApp, Pilot], Awaitable[None]]


def drive(results: Path, script: Script, size: tuple[int, int] = (80, 24), **options) -> FastpeftApp:
    """Run `script(app, pilot)` once the list of runs was read, and what came of it is drawn."""

    async def main() -> FastpeftApp:
        app = FastpeftApp(results, **options)
        async with app.run_test(size=size, notifications=True) as pilot:
            await until(pilot, lambda: app.num_reads > 0)
            await pilot.pause()
            await script(app, pilot)
        return app

    return asyncio.run(main())


async def until(pilot: Pilot, condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never came true; the screen:\n{text_of(pilot.app.screen)}"
        await pilot.pause(0.01)


async def until_shown(pilot: Pilot, text: str) -> None:
    await until(pilot, lambda: text in text_of(pilot.app.screen))


def text_of(screen: Screen) -> str:
    return "\n".join(line.rstrip() for line in lines_of(screen))


def lines_of(screen: Screen) -> list[str]:
    return [strip.text for strip in screen._compositor.render_strips()]
