"""Does the built package work with the newest and with the oldest dependencies that it allows?

    python .ci/compat.py [--torch 2.13.0] [--only oldest] [--work DIR]

Builds a wheel and an sdist, and installs the wheel into two fresh environments: `newest` has what pip chooses, `oldest`
the lowest releases that pyproject.toml allows and that go together. --torch names one release for both, such as the one
that a machine has a CPU build of. Each environment then runs, from an empty folder: doctor, two steps of a preset for
each kind of task and of each method, evaluate, an export, which PEFT loads, a sweep, and the terminal UI without a
terminal. The sdist is installed over the wheel in `newest`. Prints a table of versions and outcomes, and exits with 1
where anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "triton", "transformers", "peft", "datasets", "textual", "optuna", "wandb", "numpy", "matplotlib")
PRESETS = ("iwlora_mnli", "adalora_mnli", "full_mnli", "lora_conll2003", "lora_stsb", "lora_goemotions", "lora_alpaca",
           "linear_gsm8k", "graff_gsm8k", "unihyperlora_conll2003", "sat_lora_mnli", "hf_sat_lora_mnli")  # fmt: skip
COMMANDS = [
    ("doctor", "doctor"),
    *((f"train {preset}", f"train --run {preset} --mode trial --name {preset}") for preset in PRESETS),
    ("evaluate", "evaluate"),
    ("export", "export iwlora_mnli"),
    ("sweep", "sweep --run lora_mnli --trials 2 --trials-only --name sweep budget=2steps"),
]
OF_TORCH = ("torch==", "triton==", "nvidia-c", "nvidia-n", "cuda-")
SCREEN = (
    "import asyncio\n"
    "from pathlib import Path\n"
    "from fastpeft.tui.program import FastpeftApp\n"
    "async def look():\n"
    "    async with FastpeftApp(Path('results')).run_test(size=(120, 40)) as pilot:\n"
    "        await pilot.pause(1.0)\n"
    "        assert pilot.app.export_screenshot()\n"
    "asyncio.run(look())\n"
)


def lowest(work: Path, without: tuple[str, ...]) -> list[str]:
    """The oldest releases of the dependencies that go together, as uv resolves them; packages that begin with one of
    `without` are left out, and what only they demand."""
    tools = work / "tools"
    run([sys.executable, "-m", "venv", str(tools)], work, check=True)
    run([str(tools / "bin" / "pip"), "install", "--quiet", "uv"], work, check=True)
    command = [str(tools / "bin" / "uv"), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--resolution", "lowest-direct", str(ROOT / "pyproject.toml")]
    lines = run(command, work, check=True).stdout.split()
    return [line for line in lines if not line.startswith(without)]


class Environment:
    def __init__(self, work: Path, name: str) -> None:
        self.name, self.folder, self.home = name, work / name, work / f"{name}-home"
        self.outcomes: dict[str, str] = {}
        self.home.mkdir(parents=True)
        run([sys.executable, "-m", "venv", str(self.folder)], work, check=True)

    def python(self, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        return run([str(self.folder / "bin" / "python"), *arguments], self.home, check)

    def install(self, *what: str) -> None:
        self.python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what, check=True)

    def use(self) -> None:
        for name, command in COMMANDS:
            self._note(name, self.python("-m", "fastpeft", *command.split()))
        self._note("tui", self.python("-c", SCREEN))

    def _note(self, name: str, done: subprocess.CompletedProcess[str]) -> None:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        self.outcomes[name] = "ok" if done.returncode == 0 else f"{done.returncode}: {lines[-1] if lines else ''}"
        print(f"{self.name:8} {name:32} {self.outcomes[name]}", flush=True)

    def versions(self) -> dict[str, str]:
        lines = self.python("-m", "pip", "list", "--format=freeze", check=True).stdout.splitlines()
        return dict(line.split("==", 1) for line in lines if "==" in line)


def run(command: list[str], folder: Path, check: bool) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=folder, env=own | settings, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def build(work: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, by pip and setuptools from a clean copy of what git has."""
    tree, out = work / "tree", work / "dist"
    run(["git", "clone", "--quiet", str(ROOT), str(tree)], work, check=True)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), "."], tree, check=True)
    code = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", code, str(out)], tree, check=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="one release for both environments")
    parser.add_argument("--only", choices=("newest", "oldest"))
    parser.add_argument("--work", type=Path, help="a temporary folder when absent")
    options = parser.parse_args()
    torch = [f"torch=={options.torch}"] if options.torch else []
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        wheel, sdist = build(work)
        made: list[Environment] = []
        for name in ("newest", "oldest"):
            if options.only in (None, name):
                pins = torch if name == "newest" else [*torch, *lowest(work, OF_TORCH if torch else ())]
                made.append(Environment(work, name))
                made[-1].install(str(wheel), *pins)
                made[-1].use()
        if options.only != "oldest":
            made[0].install("--no-deps", "--force-reinstall", str(sdist))
            made[0]._note("doctor from the sdist", made[0].python("-m", "fastpeft", "doctor"))
        versions = [one.versions() for one in made]
    print(f"\n| | {' | '.join(one.name for one in made)} |\n|---|{'---|' * len(made)}")
    for package in SHOWN:
        print(f"| {package} | {' | '.join(found.get(package, '-') for found in versions)} |")
    for name in made[0].outcomes:
        print(f"| `{name}` | {' | '.join(one.outcomes.get(name, '-') for one in made)} |")
    if any(outcome != "ok" for one in made for outcome in one.outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
