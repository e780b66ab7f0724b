"""Every command, setting and piece of code that the documentation shows is one that the package takes."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fastpeft.config import load_run, preset_names
from tests.support import doc_pages
from tests.support.doc_pages import ROOT, Block, pages

STANDS_FOR = {"RANK": "8", "K": "4", "N": "2"}
"""Placeholders where a command takes a number; others are texts, which it takes as they are."""

OTHERS = {"cd", "git", "mlx_lm.generate", "optuna-dashboard", "sbatch", "sky"}
"""Programs that are not ours, so that nothing of them is checked."""

OURS = {"fastpeft", "make", "pip", "python", "python3", "pytest"}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shell_blocks() -> Iterator[Block]:
    for page in pages():
        for block in doc_pages.blocks(page):
            lines = block.commands()
            if block.language in ("", "sh", "bash") and lines and program(lines[0]) in OURS | OTHERS:
                yield block


def program(command: str) -> str:
    """The first word behind settings of the environment."""
    parts = command.split()
    parts = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word) is not None, parts))
    return parts[0].removeprefix(".venv/bin/") if parts else ""


def commands() -> Iterator[Any]:
    """Of blocks, line by line, and of the text, where one stands in backquotes."""
    for block in shell_blocks():
        for line in block.commands():
            for part in re.split(r"\s+(?:&&|&)\s*", line):
                if part:
                    yield pytest.param(part, id=f"{block}: {part}")
    for page in pages():
        for code in doc_pages.inline_code(page):
            if program(code) in OURS and " " in code and "..." not in code:
                named = f"{code} --help" if re.fullmatch(r"fastpeft( [a-z]+)+", code) else code  # without arguments
                yield pytest.param(named, id=f"{page_name(page)}: {code}")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run files that the pages show, under the names that the commands have for them."""
    folder = tmp_path_factory.mktemp("shown")
    for name, text in doc_pages.run_files().items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_is_taken(command: str, run_folder: Path) -> None:
    name = program(command)
    assert name in OURS | OTHERS, "a program that no check knows: add it"
    if name in OTHERS:
        return
    given = doc_pages.words(command)
    while given[0].removeprefix(".venv/bin/") != name:
        given.pop(0)
    CHECKS[name]([STANDS_FOR.get(word, word) for word in given[1:]], run_folder)


def test_there_are_commands_of_each_kind() -> None:
    """Else the checks above may look at nothing."""
    first_words = [program(param.values[0]) for param in commands()]
    assert first_words.count("fastpeft") > 60
    assert first_words.count("python") > 10
    assert {"make", "pip"} <= set(first_words)


def check_fastpeft(given: list[str], run_folder: Path) -> None:
    import typer

    from fastpeft.cli.commands import app

    command, name = typer.main.get_command(app), "fastpeft"
    while hasattr(command, "commands"):
        if given == ["--version"]:
            return
        name = given.pop(0) if given else ""
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    if given[-1:] == ["--help"]:
        return
    parameters = command.make_context(name, list(given)).params  # raises a usage error
    if name in ("train", "sweep", "transfer", "validate"):
        check_run(parameters, run_folder)


def check_run(parameters: dict[str, Any], run_folder: Path) -> None:
    run = parameters.get("run") or parameters.get("file")
    if run is None:
        assert parameters.get("resume"), "a command that trains needs --run"
        return
    texts = list(parameters.get("overrides") or [])
    texts += [f"budget={parameters['budget']}"] if parameters.get("budget") else []
    if run not in preset_names():
        assert run.endswith(".yaml"), f"there is no preset {run}"
        shown = run_folder / Path(run).name
        assert shown.is_file() or "NAME" in run, f"no page shows the run file {run}"
        run = shown if shown.is_file() else "lora_mnli"
    taken(run, tuple(texts))


@cache
def taken(run: str | Path, overrides: tuple[str, ...]) -> None:
    """Raises ConfigError for a run that the package refuses; pages show many runs more than once."""
    load_run(run, overrides)


def check_make(given: list[str], run_folder: Path) -> None:
    there = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(given) <= set(there)


def check_pip(given: list[str], run_folder: Path) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in given:
        for extra in re.findall(r"(?:fastpeft|\.)\[(\w+)\]", word):
            assert extra in project["optional-dependencies"], f"there is no extra {extra}"


def check_python(given: list[str], run_folder: Path) -> None:
    if given[:1] == ["-c"]:
        ast.parse(given[1])
    elif given[:1] == ["-m"]:
        if given[1] == "pytest":
            check_pytest(given[2:], run_folder)
        elif given[1].startswith("fastpeft"):
            assert doc_pages.exists(f"{given[1]}.__main__") or doc_pages.exists(given[1])
    else:
        script = ROOT / given[0]
        assert script.is_file(), f"there is no {given[0]}"
        sources = script.read_text() + "".join(path.read_text() for path in script.parent.glob("*.py"))
        for option in (word for word in given[1:] if word.startswith("--")):
            assert f'"{option.partition("=")[0]}"' in sources, f"{given[0]} has no {option}"


def check_pytest(given: list[str], run_folder: Path) -> None:
    for word in given:
        if word.startswith("tests/") and not word.endswith("..."):
            assert (ROOT / word).exists(), f"there is no {word}"


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "fastpeft": check_fastpeft,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "pytest": check_pytest,
}


# ---- cheap ones are run --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("runs schema", '"learning_rate"'),
        ("runs show iwlora_mnli", "regulariser"),
        ("runs validate my_run.yaml", "my_run.yaml"),
        ("runs ls", "no run"),
    ],
)
def test_a_command_that_trains_nothing_is_run(command: str, shown: str, fastpeft_here, tmp_path: Path) -> None:
    assert any(param.values[0] == f"fastpeft {command}" for param in commands()), "no page shows it any more"
    (tmp_path / "my_run.yaml").write_text(doc_pages.run_files()["my_run"])
    outcome = fastpeft_here(*command.split())
    assert outcome.code == 0, outcome
    assert shown in outcome.out + outcome.err


# ---- settings and code ---------------------------------------------------------------------


def dotted_keys() -> Iterator[Any]:
    sections = {key.partition(".")[0] for key in doc_pages.setting_keys()[1]}
    for page in pages():
        for code in doc_pages.inline_code(page):
            key = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)+)(=|$)", code)
            if key and key[1].partition(".")[0] in sections and not key[1].endswith((".py", ".yaml", ".json")):
                yield pytest.param(code, key[1], id=f"{page_name(page)}: {code}")


@pytest.mark.parametrize(("code", "key"), list(dotted_keys()))
def test_a_setting_exists(code: str, key: str) -> None:
    values, sections = doc_pages.setting_keys()
    if "=" not in code:
        assert key in values | sections
        return
    assert key in values
    if re.search(r"[A-Z]{2,}|\.\.\.", code.partition("=")[2]) is None:
        taken("graff_mnli" if "graff" in key else "lora_mnli", (code, *NEEDED_BESIDE.get(code, ())))


NEEDED_BESIDE = {
    "optimizer.name=schedule_free": ("schedule.name=constant",),
}
"""What has to be set with a setting for it to be taken."""


def python_blocks() -> Iterator[Any]:
    for page in pages():
        for block in doc_pages.blocks(page):
            if block.language == "python":
                yield pytest.param(block, id=str(block))


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_code_is_valid_and_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastpeft":
            for alias in node.names:
                assert doc_pages.exists(f"{node.module}.{alias.name}"), f"there is no {node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastpeft":
            assert doc_pages.exists(f"fastpeft.{node.attr}"), f"there is no fastpeft.{node.attr}"


def test_every_message_of_troubleshooting_is_one_that_the_code_has() -> None:
    texts = doc_pages.said_texts()
    rows = re.findall(r"^\| `(.+?)` \|", (doc_pages.DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for message in (row.replace("\\`", "`") for row in rows):
        parts = [re.escape(part) for part in message.split("...")]
        pattern = re.compile(".*?".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in texts), f"nothing says {message!r}"
