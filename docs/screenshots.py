"""`make screenshots`: draw the terminal UI as SVG into this folder, from runs that it trains; one while it trains."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fastpeft.runs.events import Event, read_events
from fastpeft.tui.program import FastpeftApp

HERE = Path(__file__).resolve().parent
RUNS = (
    ("lora", ["--run", "lora_mnli", "--seeds", "0,1", "--budget", "600steps"]),
    ("iwlora", ["--run", "iwlora_mnli", "--seeds", "0,1", "--budget", "600steps", "regulariser.online=true"]),
)
FETCHED_FONT = re.compile(r',\s*url\("https?://[^"]*"\) format\("woff2?"\)')
"""Rich names a font on a server; a reader without it gets the monospace font of the system."""
FILM = ("tui-live", (150, 44), ["--run", "iwlora_mnli", "--budget", "600steps", "evaluation.every=10%"])
"""Name, size, and the run that is watched."""
NUM_FRAMES, FRAME_S = 6, 1.5
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
            write(name, svg)
        name, size, arguments = FILM
        write(name, in_turn(asyncio.run(film(size, arguments))))


def write(name: str, svg: str) -> None:
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


async def film(size: tuple[int, int], arguments: list[str]) -> list[str]:
    """Pictures of a run from its first steps to its end, evenly spaced."""
    command = [sys.executable, "-m", "fastpeft", "train", "--name", "live", "--results-dir", "live", *arguments]
    app, frames = FastpeftApp(Path("live")), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as trainer:
        async with app.run_test(size=size) as pilot:
            while not any(event["type"] == "step" for event in logged(Path("live/live/events.jsonl"))):
                await pilot.pause(0.5)
            await pilot.press("down", "enter", "s", "s", "s")
            while trainer.poll() is None:
                await pilot.pause(1)
                frames.append(app.export_screenshot())
            await pilot.pause(2)
            frames.append(app.export_screenshot())
    if trainer.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {trainer.returncode}")
    places = {round(i * (len(frames) - 1) / (NUM_FRAMES - 1)) for i in range(NUM_FRAMES)}
    return [frames[i] for i in sorted(places)]


def logged(path: Path) -> list[Event]:
    return list(read_events(path)) if path.is_file() else []


def in_turn(frames: list[str]) -> str:
    """One picture that shows each for FRAME_S seconds, and the last for four times that; only it where a reader wants
    no motion."""
    whole, box = FRAME_S * (len(frames) + 3), re.search(r'viewBox="([^"]+)"', frames[0])
    assert box is not None
    style = [f".frame {{ visibility: hidden; animation: {whole}s step-end infinite; }}"]
    for i in range(len(frames)):
        begin, end = (100 * FRAME_S * at / whole for at in (i, i + 1 if i < len(frames) - 1 else i + 4))
        hidden = "" if i == 0 else "0% { visibility: hidden; } "
        after = "" if end >= 100 else f"{end:.3f}% {{ visibility: hidden; }} "
        style.append(f"@keyframes show{i} {{ {hidden}{begin:.3f}% {{ visibility: visible; }} {after}}}")
        style.append(f"#frame{i} {{ animation-name: show{i}; }}")
    style.append("@media (prefers-reduced-motion: reduce) { .frame { animation: none; }")
    style.append(".frame:last-of-type { visibility: visible; } }")
    parts = [f'<g class="frame" id="frame{i}">{frame[frame.index("<svg") :]}</g>' for i, frame in enumerate(frames)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}"><style>{" ".join(style)}</style>'
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
