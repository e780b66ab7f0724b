"""Run files with random damage: each loads or is refused in words, in the library and on the command line."""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpeft.cli import commands as cli
from fastpeft.config import load_run, preset_names, run_values, save_run, trial_run
from fastpeft.errors import UserError

WRONG = [
    None, True, False, 0, 1, -1, -0.5, 1.5, 2**31, 2**64, -(10**40), 10**400, 1e300, 5e-324, float("nan"),
    float("inf"), float("-inf"), "", "x", "no", "1e-4", "-1", "NaN", "20%", "0s", "1e999steps", "é雪\u202e", "a" * 2000,
    "\x00\x1b[2J", "../../etc/passwd", "lora", "{}", "!!python/object:os.system", [], [None], ["a", 1], [[[]]], {},
    {"x": 1}, {1: 2}, {None: None}, {"name": {"name": {}}}, {"type": "int"}, {"low": 1, "high": 0}, b"\xff",
]  # fmt: skip


SLOWER_S = 1.0
"""What a damaged file may take beyond the slowest preset, in seconds of this process's CPU."""


def places(values: Any) -> Iterator[tuple[dict, Any]]:
    """Every mapping with each of its keys, at any depth."""
    if isinstance(values, dict):
        for key in values:
            yield values, key
            yield from places(values[key])


def typo(rng: random.Random, key: Any) -> str:
    letters = list(str(key))
    i = rng.randrange(len(letters)) if letters else 0
    change = rng.choice(["drop", "double", "swap", "case", "dot"])
    if change == "drop":
        del letters[i : i + 1]
    elif change == "double":
        letters[i:i] = letters[i : i + 1]
    elif change == "swap":
        letters[i : i + 2] = letters[i : i + 2][::-1]
    elif change == "case":
        letters = list(str(key).upper())
    else:
        letters.insert(i, ".")
    return "".join(letters)


def damage(rng: random.Random, values: dict[str, Any]) -> str:
    """Change one thing in place; returns what was done."""
    parent, key = rng.choice(list(places(values)))
    kind = rng.choice(["delete", "rename", "wrong", "wrong", "wrong", "scale", "wrap", "add", "text"])
    if kind == "delete":
        del parent[key]
    elif kind == "rename":
        parent[typo(rng, key)] = parent.pop(key)
    elif kind == "wrong":
        parent[key] = copy.deepcopy(rng.choice(WRONG))
    elif kind == "scale":
        old = parent[key]
        is_number = isinstance(old, (int, float)) and not isinstance(old, bool)
        parent[key] = old * rng.choice([-1, 0, 1e-30, 1e30, 10**30]) if is_number else [old]
    elif kind == "wrap":
        parent[key] = {rng.choice(["value", key]): parent[key]}
    elif kind == "add":
        parent[rng.choice(["x", "extends", "name", 7, "overrides", ""])] = copy.deepcopy(rng.choice(WRONG))
    else:
        parent[key] = str(parent[key])
    return f"{kind} {key!r}"


def damaged_file(rng: random.Random, path: Path) -> str:
    """Write a preset with one to four faults; now and then the YAML itself is cut or stirred."""
    preset = rng.choice(preset_names())
    values = run_values(load_run(preset))
    done = [damage(rng, values) for _ in range(rng.choice([1, 1, 2, 4])) if values]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=rng.random() < 0.5)
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        text = rng.choice([text[:at], text[:at] + rng.choice("{[&*!%|>'\"\t:-") + text[at:], text[at:]])
        done.append(f"stir at {at}")
    path.write_text(text, encoding="utf-8")
    return f"{preset}: {', '.join(done)}"


def check(rng: random.Random, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> bool:
    """Load a damaged file both ways; returns whether it was valid."""
    done = damaged_file(rng, path)
    run = None
    try:
        run = load_run(path)
    except UserError:
        pass
    except Exception as error:
        raise AssertionError(f"{done}\n{path.read_text()[:4000]}") from error

    monkeypatch.setattr(sys, "argv", ["fastpeft", "runs", "validate", str(path)])
    try:
        code = cli.main() or 0
    except SystemExit as exited:
        code = exited.code or 0
    out, err = capsys.readouterr()
    assert code == (2 if run is None else 0), done
    assert "Traceback" not in out + err, done
    assert (out if run is not None else err).strip(), done
    assert not (err if run is not None else out), done

    if run is not None:  # what is accepted can also be kept, and tried out
        for kept in (run, trial_run(run)):
            save_run(kept, path)
            assert load_run(path) == kept, done
    return run is not None


def check_many(count, seed, tmp_path, monkeypatch, capsys) -> tuple[int, float]:
    """How many were valid, and the CPU seconds of the slowest."""
    rng = random.Random(seed)
    limit_s = SLOWER_S + max(cpu_seconds(lambda name=name: load_run(name)) for name in preset_names())
    valid, slowest_s = [], 0.0
    for _ in range(count):
        took_s = cpu_seconds(lambda: valid.append(check(rng, tmp_path / "run.yaml", monkeypatch, capsys)))
        assert took_s <= limit_s, (tmp_path / "run.yaml").read_text()[:4000]
        slowest_s = max(slowest_s, took_s)
    return sum(valid), slowest_s


def cpu_seconds(call: Callable[[], Any]) -> float:
    began_s = time.process_time()
    call()
    return time.process_time() - began_s


def test_damaged_presets_load_or_are_refused_in_words(seed, tmp_path, monkeypatch, capsys):
    num_valid, _ = check_many(50, seed, tmp_path, monkeypatch, capsys)
    assert num_valid < 50


@pytest.mark.soak
def test_many_damaged_presets_load_or_are_refused_in_words(seed, tmp_path, monkeypatch, capsys):
    num_valid, slowest_s = check_many(2000, seed, tmp_path, monkeypatch, capsys)
    with capsys.disabled():
        print(f"2000 damaged run files: {num_valid} valid, {2000 - num_valid} refused, slowest {slowest_s:.2f} s")
    assert 0 < num_valid < 2000
