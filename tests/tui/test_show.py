"""`fastpeft tui` and `fastpeft train --tui` as commands."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fastpeft.errors import UserError
from fastpeft.tui import show as show_module
from fastpeft.tui.steer import Order


@pytest.mark.parametrize("args", [["tui"], ["train", "--tui", "--run", "lora_mnli"]])
def test_without_a_terminal_nothing_is_started(fastpeft_here, tmp_path, monkeypatch, args):
    monkeypatch.delenv("TEXTUAL_DRIVER", raising=False)
    assert "needs a terminal" in fastpeft_here(*args).refused()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--run", "lora_mnly"], "did you mean lora_mnli"),
        (["--run", "lora_mnli", "--budget", "10x"], "no budget"),
        (["--run", "lora_mnli", "--seeds", "1,1"], "twice"),
        (["--resume"], "needs --name"),
    ],
)
def test_what_is_wrong_is_said_before_the_screen_is_taken(fastpeft_here, monkeypatch, args, said):
    monkeypatch.setattr(show_module, "show", lambda *_: pytest.fail("shown"))
    assert said in fastpeft_here("train", "--tui", *args).refused()


def test_the_trainer_gets_every_option(fastpeft_here, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(show_module, "show", lambda *args: shown.append(args))
    options = ["--budget", "10s", "--mode", "trial", "--name", "n", "--seed", "3", "--no-stand-in"]
    done = fastpeft_here("train", "--tui", "--run", "lora_mnli", "--results-dir", "r", *options, "adapter.rank=4")
    assert done.code == 0, done
    (results, order), *_ = shown
    assert str(results) == "r"
    assert order == Order(
        run="lora_mnli",
        overrides=["adapter.rank=4"],
        budget="10s",
        mode="trial",
        name="n",
        seed=3,
        no_stand_in=True,
    )
    fastpeft_here("train", "--tui", "--run", "lora_mnli", "--seeds", "1,2")
    assert shown[1][1].seeds == [1, 2]
    assert shown[1][1].name.startswith("lora_mnli-2")
    fastpeft_here("train", "--tui", "--resume", "--name", "n")
    assert shown[2][1] == Order(name="n", resume=True)
    fastpeft_here("tui", "elsewhere")
    assert [str(arg) for arg in shown[3]] == ["elsewhere"]


@pytest.mark.parametrize("redirected", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_no_terminal_is_refused(monkeypatch, tmp_path, redirected):
    """The screen is drawn on stderr: redirected, there would be nothing to see."""
    monkeypatch.delenv("TEXTUAL_DRIVER", raising=False)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, SimpleNamespace(isatty=lambda there=name != redirected: there))
    with pytest.raises(UserError, match="needs a terminal"):
        show_module.show(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused_and_one_to_be_made_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTUAL_DRIVER", "textual.drivers.headless_driver:HeadlessDriver")
    shown = []
    monkeypatch.setattr("fastpeft.tui.program.FastpeftApp.run", lambda app: shown.append(app.results_dir))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file cannot be read: Not a directory"):
        show_module.show(tmp_path / "file")
    show_module.show(tmp_path / "later")
    assert shown == [tmp_path / "later"]


def test_a_program_that_failed_says_so_by_its_exit_code(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTUAL_DRIVER", "textual.drivers.headless_driver:HeadlessDriver")
    monkeypatch.setattr("fastpeft.tui.program.FastpeftApp.run", lambda app: app.exit(return_code=1))
    with pytest.raises(SystemExit, match="1"):
        show_module.show(tmp_path)
