"""bench/memory.py, and the plan of one run beside what its process really held."""

from __future__ import annotations

import json

import pytest

from bench import memory
from bench.memory import GOAL, Row


def test_the_planned_peak_of_a_stand_in_is_the_measured_one():
    """Its test split has more rows than the sample of its validation split: the plan has to count the larger batch."""
    row = memory.measure("lora_conll2003", 4)
    print(memory.table([row]))
    assert row.kind == "token-classification"
    assert 0 < row.held_mb <= row.planned_mb
    assert abs(row.ratio - 1) <= GOAL


def test_a_row_that_is_off_is_marked():
    rows = [Row("a", "classification", 500.0, 790.0, 1000.0), Row("b", "regression", 500.0, 900.0, 1000.0)]
    assert [row.is_off for row in rows] == [True, False]
    first, second = memory.table(rows).splitlines()[2:]
    assert first == "| `a` | classification | 500 MB | 790 MB | 1,000 MB | 0.79 **off** |"
    assert second.endswith("| 0.90 |")


@pytest.mark.parametrize(
    ("argument", "said"), [("--steps=1", "give at least 2"), ("--model=/nowhere", "no such folder")]
)
def test_what_cannot_be_is_told_before_anything_is_trained(argument, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory.py", argument])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_rows_are_written_and_one_that_is_off_is_exit_1(tmp_path, monkeypatch, capsys):
    row = Row("a", "classification", 500.0, 790.0, 1000.0)
    monkeypatch.setattr(memory, "measure", lambda run, steps: row)
    monkeypatch.setattr("sys.argv", ["memory.py", "--run", "a", "--json", str(tmp_path / "out.json")])
    assert memory.main() == 1
    assert "**off**" in capsys.readouterr().out
    (written,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert written["ratio"] == 0.79
