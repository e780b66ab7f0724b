"""`make screenshots`: train two runs, and draw the terminal UI's screens from them as SVG into this folder."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fastpeft.tui.program import FastpeftApp

HERE = Path(__file__).resolve().parent
RUNS = (
    ("lora", ["--run", "lora_mnli", "--seeds", "0,1", "--budget", "600steps"]),
    ("iwlora", ["--run", "iwlora_mnli", "--seeds", "0,1", "--budget", "600steps", "regulariser.online=true"]),
)
FETCHED_FONT = re.compile(r',\s*url\("https?://[^"]*"\) format\("woff2?"\)')
"""Rich names a font on a server; a reader without it gets the monospace font of the system."""
SHOTS = {
    "tui-runs": ((100, 24), ["down"]),
    "tui-run": ((150, 44), ["down", "enter"]),
    "tui-importance": ((100, 24), ["down", "enter", "2", "j", "j", "l", "l"]),
    "tui-compare": ((120, 40), ["c", "t", "x"]),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that no path of this machine is in the pictures
        for name, arguments in RUNS:
            command = [sys.executable, "-m", "fastpeft", "train", "--name", name, *arguments]
            subprocess.run(command, check=True)
        for name, (size, keys) in SHOTS.items():
            svg = asyncio.run(shoot(size, keys))
            (HERE / f"{name}.svg").write_text(FETCHED_FONT.sub("", svg))
            print(f"written docs/{name}.svg")


async def shoot(size: tuple[int, int], keys: list[str]) -> str:
    app = FastpeftApp(Path("results"))
    async with app.run_test(size=size) as pilot:
        await pilot.pause(1)
        for key in keys:
            await pilot.press(key)
            await pilot.pause(0.3)
        await pilot.pause(1)
        return app.export_screenshot()


if __name__ == "__main__":
    main()
