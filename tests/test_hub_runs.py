"""`fastpeft train` on a model and a task of the hub: the first time from there, then from the cache alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastpeft.config import load_run, trial_run
from fastpeft.models.files import cached_model
from fastpeft.trainer import train
from tests.support.fake_hub import FakeHub
from tests.support.hub_files import GLUE, MODEL, deberta_files, glue_files

SETTINGS = ("training.precision=fp32", "training.threads=1", "dataset.max_length=32")


def serve(hub: FakeHub) -> None:
    hub.add("model", MODEL, deberta_files())
    hub.add("dataset", GLUE, glue_files())


def command(hub: FakeHub, folder: Path, name: str, *args: str) -> subprocess.CompletedProcess:
    """A process of its own, which learns of the hub as a user's would: from the environment."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [sys.executable, "-m", "fastpeft", "train", "--run", "lora_rte", "--mode", "trial", "--name", name]
    return subprocess.run([*words, *SETTINGS, *args], cwd=folder, env=environment, capture_output=True, text=True)


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder) if event["type"] in ("step", "eval")]


def test_online_then_without_a_hub(fake_hub, tmp_path):
    serve(fake_hub)
    run = trial_run(load_run("lora_rte", list(SETTINGS)))
    first = train(run, results_dir=tmp_path / "results", name="online")
    assert (first.status, first.stand_in, first.model, first.dataset) == ("done", False, MODEL, "rte")
    assert 0 <= first.metric["more"]["f1"] <= 1
    assert all(
        set(e["more"]) == {"f1", "majority"} for e in events(tmp_path / "results" / "online") if e["type"] == "eval"
    )
    adapter = json.loads((tmp_path / "results" / "online" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == MODEL

    fake_hub.address = "http://127.0.0.1:9"  # nobody is there
    done = command(fake_hub, tmp_path, "offline")
    assert done.returncode == 0, done.stderr
    assert "STAND-IN" not in done.stdout
    assert re.search(rf"^f1 +{first.metric['more']['f1']:.4f} *$", done.stdout, re.MULTILINE)
    assert len(losses(tmp_path / "results" / "offline")) == 4
    assert losses(tmp_path / "results" / "offline") == losses(tmp_path / "results" / "online")


def test_a_download_that_breaks_off_ends_with_a_message(fake_hub, tmp_path):
    serve(fake_hub)
    fake_hub.faults["pytorch_model.bin"] = "short"
    done = command(fake_hub, tmp_path, "r")
    assert done.returncode == 3
    assert f"fastpeft: model {MODEL}: the download of pytorch_model.bin broke off" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "STAND-IN" not in done.stdout
    assert not (tmp_path / "results" / "r").exists()
    fake_hub.faults.clear()
    train(trial_run(load_run("lora_rte", list(SETTINGS))), results_dir=tmp_path / "results", name="r")
    assert cached_model(MODEL, "main") is not None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=microsoft/deberta-v3-bse"], "no such model"),
        (["dataset.name=nyu-mll/blue"], "no such dataset"),
        (["dataset.name=mnlii"], "did you mean mnli?"),
        (["dataset.revision=v7"], "no revision 'v7'"),
    ],
)
def test_a_name_of_the_users_own_is_never_replaced(overrides, said, fake_hub, tmp_path):
    from fastpeft.errors import UnavailableError

    serve(fake_hub)
    with pytest.raises(UnavailableError, match=said) as error:
        train(trial_run(load_run("lora_rte", overrides)), results_dir=tmp_path, name="r")
    assert error.value.exit_code == 3
    assert not (tmp_path / "r").exists()
