"""However one rank ends, all do: with one message, one exit code, and what can be saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fastpeft.runs.store import RunFolder
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from tests.conftest import Outcome
from tests.support.rank_children import ENDLESS, TIMEOUT_S, children, has_step, options
from tests.support.tiny_runs import Child, assert_same_weights, steps_logged, weights, write_run


def test_an_error_of_one_rank_is_the_message_and_the_exit_code_of_all(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with children(tmp_path, *options(tmp_path, "dataset.path=pairs"), second=elsewhere) as ranks:
        assert ranks.ends() == [2, 2]
        (message,) = ranks.messages()
        assert "pairs" in message
    assert not (tmp_path / "results").exists()


@pytest.mark.soak
def test_a_rank_that_is_asked_to_stop_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "r"
    with children(tmp_path, *options(tmp_path, ENDLESS)) as ranks:
        ranks.wait_for_step(folder, 5)
        ranks.ranks[1].send_signal(signal.SIGTERM)
        assert ranks.ends() == [143, 143]
        assert ranks.messages() == []
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert steps_logged(folder) == list(range(checkpoint.step))
    assert RunFolder(folder).status() == "stopped"


@pytest.mark.soak
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(killed: int, tmp_path: Path) -> None:
    with children(tmp_path, *options(tmp_path, ENDLESS)) as ranks:
        ranks.wait_for_step(tmp_path / "results" / "r", 5)
        ranks.ranks[killed].kill()
        assert ranks.ends()[1 - killed] == 1
        if killed:  # rank 0 has the store, where the ranks say who failed first
            (message,) = ranks.messages()
            assert "another rank has ended" in message


def rank_pid(parent: int, rank: int) -> int:
    found = {child.environ().get("RANK"): child.pid for child in psutil.Process(parent).children()}
    return found[str(rank)]


@pytest.mark.soak
def test_ctrl_c_stops_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "r"
    with Child(tmp_path / "log", "train", "--ranks", "2", *options(tmp_path, ENDLESS)) as child:
        child.wait_until(lambda: has_step(folder, 5), TIMEOUT_S)
        child.process.send_signal(signal.SIGINT)
        assert child.end(TIMEOUT_S) == 130
        assert child.output().count("SIGINT: finishing this step") == 1
        assert "resume with" in child.output()
        assert "Traceback" not in child.output()
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert steps_logged(folder) == list(range(checkpoint.step))
    assert RunFolder(folder).status() == "stopped"


@pytest.mark.soak
@pytest.mark.timeout(4 * TIMEOUT_S)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_resumed_to_the_same_bits(killed: int, tmp_path: Path) -> None:
    budget, folder = "budget=120steps", tmp_path / "results" / "r"
    with Child(tmp_path / "log", "train", "--ranks", "2", "--max-restarts", "1", *options(tmp_path, budget)) as child:
        child.wait_until(lambda: has_step(folder, 20), TIMEOUT_S)
        os.kill(rank_pid(child.process.pid, killed), signal.SIGKILL)
        assert child.end(TIMEOUT_S) == 0, child.output()
        assert "resuming" in child.output()
    assert steps_logged(folder) == list(range(120))
    with Child(tmp_path / "other", "train", "--ranks", "2", *options(tmp_path, budget, "--name", "unbroken")) as child:
        assert child.end(TIMEOUT_S) == 0, child.output()
    for adapter in ("adapter", "adapter_best"):
        assert_same_weights(weights(folder, adapter), weights(folder.with_name("unbroken"), adapter))


# ---- torchrun --------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.mark.soak
def test_torchrun_trains_behind_two_dashes(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--", "fastpeft", "train", *options(tmp_path, "budget=3steps")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    assert steps_logged(tmp_path / "results" / "r") == [0, 1, 2]


@pytest.mark.soak
def test_torchrun_takes_a_bare_run_for_its_own(tmp_path: Path) -> None:
    command = [*TORCHRUN, "fastpeft", "train", *options(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "ambiguous option: --run could match --run-path" in done.stderr


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ranks", "2", "--seeds", "0,1"], "--seeds does not go with several ranks"),
        (["--ranks", "2", "--tui"], "--tui does not go with several ranks"),
        (["--max-restarts", "1"], "--max-restarts needs --ranks"),
    ],
)
def test_options_that_do_not_go_together(args: list[str], said: str, fastpeft_here, tmp_path: Path) -> None:
    outcome: Outcome = fastpeft_here("train", *options(tmp_path), *args)
    assert said in outcome.refused()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.batch_size=1", "training.batch_size 1 is shared by 2 ranks"),
        ("training.cache_prefix=true", "training.cache_prefix keeps a file for one rank"),
        ("training.fit_head=true", "training.fit_head is done by one rank"),
        ("method=unihyperlora", "method unihyperlora trains on one rank only"),
    ],
)
def test_runs_that_ranks_cannot_share(setting: str, said: str, tmp_path: Path) -> None:
    from fastpeft.config import ConfigError, load_run
    from fastpeft.launched import Place
    from fastpeft.ranks import ALONE, Ranks
    from fastpeft.trainer.follower import refuse_ranks

    run = load_run(write_run(tmp_path), [setting])
    refuse_ranks(run, ALONE)
    with pytest.raises(ConfigError, match=said):
        refuse_ranks(run, Ranks(Place(rank=0, size=2)))


def as_rank(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | more
    for name, value in place.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--run", "lora_mnli", "--ranks", "2"], "--ranks under torchrun"),
        (["sweep", "--run", "lora_mnli"], "fastpeft sweep is one process"),
        (["train", "--run", "lora_mnli"], "--max-restarts of torchrun needs --name"),
    ],
)
def test_what_a_rank_is_not_for(args: list[str], said: str, fastpeft_here, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.cli import commands

    as_rank(monkeypatch, TORCHELASTIC_MAX_RESTARTS="1")
    monkeypatch.setattr(commands, "end_rank", lambda error: None)  # which ends this process
    assert said in fastpeft_here(*args).refused()
