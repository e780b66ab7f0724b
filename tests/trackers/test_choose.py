"""Which trackers a run has: what is asked for, what is there, and what W&B's own settings forbid."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.config import RunConfig, load_run, trial_run
from fastpeft.config.trackers import TRACKERS
from fastpeft.errors import UserError
from fastpeft.trackers import Choice, choose
from fastpeft.trackers.wandb_settings import wandb_mode

KEY = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with no W&B account, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (
        "WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL",
        "WANDB_CONFIG_DIR", "WANDB_PROJECT", "NETRC",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def mode(asked: str) -> str:
    return wandb_mode(asked, pytest.fail)


def chosen(run: RunConfig) -> list[Choice]:
    return choose(TRACKERS.sections(run), pytest.fail)


def write(path: str, text: str) -> None:
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_a_key_auto_is_offline_and_online_is_refused():
    assert (mode("auto"), mode("offline"), mode("disabled")) == ("offline", "offline", "disabled")
    with pytest.raises(UserError, match=r"no API key: set WANDB_API_KEY, run `wandb login`, or take"):
        mode("online")


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_is_online(name, monkeypatch):
    monkeypatch.setenv(name, KEY)
    assert (mode("auto"), mode("online"), mode("offline")) == ("online", "online", "offline")


def test_a_key_in_netrc_counts_for_its_host_only(monkeypatch):
    write("~/.netrc", f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert mode("auto") == "offline"
    write("elsewhere", f"machine wandb.example.org:8080\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", "elsewhere")
    assert mode("auto") == "online"


def test_the_host_of_wandb_login_counts():
    write("~/.config/wandb/settings", "[default]\nbase_url = https://wandb.example.org\n")
    write("~/.netrc", f"machine wandb.example.org login user password {KEY}\n")
    assert mode("auto") == "online"


def test_a_netrc_that_cannot_be_read_has_no_key():
    write("~/.netrc", "machine\n\x00 password\n")
    assert mode("auto") == "offline"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("WANDB_MODE", "offline", ("offline", "offline", "disabled")),
        ("WANDB_MODE", "dryrun", ("offline", "offline", "disabled")),
        ("WANDB_MODE", "disabled", ("disabled", "disabled", "disabled")),
        ("WANDB_MODE", "online", ("online", "offline", "disabled")),
        ("WANDB_MODE", "shared", ("online", "offline", "disabled")),
        ("WANDB_DISABLED", "true", ("disabled", "disabled", "disabled")),
        ("WANDB_DISABLED", "false", ("online", "offline", "disabled")),
    ],
)
def test_the_environment_asks_for_less_never_for_more(variable, value, expected, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv(variable, value)
    assert (mode("online"), mode("offline"), mode("disabled")) == expected


def test_wandb_offline_in_this_folder_is_kept_to(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    write("wandb/settings", "[default]\nmode = offline\n")
    assert mode("auto") == "offline"
    write("wandb/settings", "this is\nno settings file")
    assert mode("auto") == "online"


def test_without_the_package_auto_says_so_and_an_explicit_mode_is_refused(no_packages):
    said = []
    assert wandb_mode("auto", said.append) == "disabled"
    assert said == ["W&B is not installed: the run is in its event log only"]
    assert mode("disabled") == "disabled"
    for asked in ("online", "offline"):
        with pytest.raises(UserError, match=r"pip install wandb, or wandb.mode=disabled"):
            mode(asked)


def test_a_folder_that_wandb_left_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "nowhere_else").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    from fastpeft.trackers.tracker import is_installed

    assert not is_installed("nowhere_else")


def test_the_choices_of_a_run(monkeypatch):
    run = load_run("lora_mnli")
    assert chosen(run) == [Choice("wandb", {"mode": "offline", "project": "fastpeft"})]
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert chosen(run) == [Choice("wandb", {"mode": "offline", "project": "theirs"})]
    assert chosen(load_run("lora_mnli", ["wandb.project=mine"]))[0].settings["project"] == "mine"
    assert chosen(trial_run(run)) == []


def test_tensorboard_that_is_not_installed_is_refused(no_packages):
    run = load_run("lora_mnli", ["tensorboard=true", "wandb.mode=disabled"])
    with pytest.raises(UserError, match="pip install tensorboard"):
        chosen(run)


def test_a_key_has_no_place_in_a_run_file():
    with pytest.raises(UserError, match=r"wandb\.api_key: unknown key"):
        load_run("lora_mnli", [f"wandb.api_key={KEY}"])
