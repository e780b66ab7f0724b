"""The files of docs/extending.md, written out as the page has them, register their member, and train."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastpeft.config.schema import FAMILIES
from fastpeft.runs.store import RunFolder
from fastpeft.trainer import train
from tests.support import doc_pages
from tests.support.tiny_runs import Listener, strict_events, tiny_run, weights

PAGE = doc_pages.DOCS / "extending.md"
FILES = {block.title: block for block in doc_pages.blocks(PAGE) if block.title}


def test_the_page_has_an_example_of_each_family_that_it_names() -> None:
    assert set(FILES) == {"stairs.py", "frozen_a.py", "word_count.py", "lines.py"}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Write a file of the page, and import it; what it has registered is taken back."""
    before = [family.names for family in FAMILIES]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # a tracker is a process of its own
    names = []

    def write(title: str) -> ModuleType:
        (tmp_path / title).write_text(FILES[title].text)
        names.append(Path(title).stem)
        return importlib.import_module(names[-1])

    yield write
    for family, known in zip(FAMILIES, before):
        for name in set(family.names) - set(known):
            family.remove(name)
    for name in names:
        del sys.modules[name]


def steps_of(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """The step events of a run of two steps."""
    base = {"method": "lora", "schedule": {"name": "constant", "warmup_steps": 0}, "budget": "2steps"}
    result = train(tiny_run(folder, **(base | settings)), results_dir=folder, name="r")
    assert (result.status, result.steps) == ("done", 2)
    return [event for event in strict_events(folder / "r") if event["type"] == "step"]


def test_the_schedule(written, tmp_path: Path) -> None:
    written("stairs.py")
    steps = steps_of(tmp_path, schedule={"name": "stairs", "warmup_steps": 0, "stairs": {"height": 0.5, "width": 0.5}})
    assert [event["lr"] for event in steps] == [1e-2, 5e-3]


def test_the_method(written, tmp_path: Path) -> None:
    written("frozen_a.py")
    steps_of(tmp_path, method="frozen_a", optimizer={"weight_decay": 0})
    trained = weights(tmp_path / "r")
    assert any(trained[name].any() for name in trained if ".lora_B." in name)


def test_the_task(written, tmp_path: Path) -> None:
    written("word_count.py")
    steps = steps_of(tmp_path, dataset={"task": "word-count"})
    assert steps[0]["loss"] > 1.0  # words off: the head begins near 0
    result = RunFolder(tmp_path / "r").read_result()
    assert result is not None
    assert (result.kind, result.metric["name"]) == ("word-count", "right")
    assert result.metric["more"]["off"] > 1.0


def test_the_tracker(written, tmp_path: Path) -> None:
    written("lines.py")
    heard = Listener()
    run = tiny_run(tmp_path, budget="2steps", schedule={"warmup_steps": 0}, lines={"enabled": True})
    train(run, results_dir=tmp_path, name="r", reporter=heard)
    assert heard.warnings() == []
    losses = [event["loss"] for event in strict_events(tmp_path / "r") if event["type"] == "step"]
    assert (tmp_path / "r" / "lines.txt").read_text() == f"1 {losses[0]}\n2 {losses[1]}\n"
