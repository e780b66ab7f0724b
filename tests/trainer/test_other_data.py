"""A run that was killed goes on with the data that it was begun with, and with no others."""

from __future__ import annotations

import os
import signal
from itertools import cycle
from pathlib import Path

import pytest

from fastpeft.config import RunConfig, load_run
from fastpeft.errors import UserError
from fastpeft.runs.events import Event
from fastpeft.runs.store import RunFolder, read_json
from fastpeft.tasks.trained_on import FILE, TrainedOn
from fastpeft.trainer import train
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from tests.support.every_kind import ALL_KINDS, change_rows, data_folder, run_of_kind
from tests.support.tiny_runs import Listener


def train_until_killed(run: RunConfig, results_dir: Path) -> None:
    """In a process of its own, which ends by SIGKILL in the middle of the run, behind its first evaluation."""

    def kill(event: Event) -> None:
        if event["type"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            train(run, results_dir=results_dir, name="r", reporter=Listener(kill))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(results_dir: Path) -> str:
    """Of a resume, which may change nothing."""
    before = files(results_dir / "r")
    with pytest.raises(UserError) as caught:
        train(None, results_dir=results_dir, name="r", resume=True)
    assert caught.value.exit_code == 2
    assert files(results_dir / "r") | {".lock": b""} == before | {".lock": b""}
    return str(caught.value)


@pytest.mark.parametrize(("kind", "how"), list(zip(ALL_KINDS, cycle(("rows", "order", "labels")))))
def test_a_killed_run_of_each_kind_refuses_other_data_and_goes_on_with_its_own(
    kind: str, how: str, tmp_path: Path
) -> None:
    run = run_of_kind(tmp_path, kind)
    file = data_folder(run) / "train.jsonl"
    own = file.read_bytes()
    train_until_killed(run, tmp_path / "results")
    checkpoint, _ = newest_checkpoint(tmp_path / "results" / "r" / "checkpoints")
    assert checkpoint is not None
    change_rows(run, kind, how)
    message = refusal(tmp_path / "results")
    assert "the data are not those that the run was begun with" in message
    assert "begin anew with another --name" in message
    assert ("rows and had" in message) == (how == "rows")
    file.write_bytes(own)
    result = train(None, results_dir=tmp_path / "results", name="r", resume=True)
    assert (result.status, result.steps, result.kind) == ("done", 4, kind)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_labels_kind_and_hash_stand_in_the_folder_the_result_and_beside_the_weights(kind: str, tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, kind)
    result = train(run, results_dir=tmp_path, name="r")
    folder = RunFolder(tmp_path / "r")
    noted = TrainedOn.read(folder.path)
    assert noted is not None
    assert (noted.kind, list(noted.labels)) == (kind, result.labels)
    assert result.data == noted.data.to_json() == read_json(folder.result)["data"]
    lines = (data_folder(run) / "train.jsonl").read_text().count("\n")
    assert sum(noted.data.splits[name].rows for name in ("train", "validation")) >= lines
    for best in (False, True):
        assert TrainedOn.read(folder.weights("adapter", best)) == noted
    assert load_run(folder.config) == run


def test_what_was_relabelled_is_said_by_name(tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, "classification")
    train_until_killed(run, tmp_path / "results")
    for split in ("train", "dev"):
        file = data_folder(run) / f"{split}.jsonl"
        file.write_text(file.read_text().replace('"no"', '"zz_no"'))
    assert "the labels are yes, zz_no and were no, yes" in refusal(tmp_path / "results")


def test_data_of_another_kind_are_another_task(tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, "regression")
    train_until_killed(run, tmp_path / "results")
    for split in ("train", "dev"):
        file = data_folder(run) / f"{split}.jsonl"
        file.write_text(file.read_text().replace(".5}", "}").replace(".25}", "}").replace(".75}", "}"))
    assert "the task is classification and was regression" in refusal(tmp_path / "results")


def test_a_run_of_an_earlier_version_goes_on_and_says_what_it_cannot_tell(tmp_path: Path) -> None:
    """It noted its kind and its labels, and no hash."""
    run = run_of_kind(tmp_path, "classification")
    train_until_killed(run, tmp_path / "results")
    (tmp_path / "results" / "r" / FILE).unlink()
    file = data_folder(run) / "train.jsonl"
    own = file.read_text()
    file.write_text(own.replace('"no"', '"never"'))
    (data_folder(run) / "dev.jsonl").write_text((data_folder(run) / "dev.jsonl").read_text().replace('"no"', '"never"'))
    assert "the labels are never, yes and were no, yes" in refusal(tmp_path / "results")
    run_of_kind(tmp_path / "again", "classification")
    for split in ("train", "dev"):
        rows = (tmp_path / "again" / "pairs" / f"{split}.jsonl").read_text()
        (data_folder(run) / f"{split}.jsonl").write_text(rows)
    heard = Listener()
    assert train(None, results_dir=tmp_path / "results", name="r", resume=True, reporter=heard).status == "done"
    (begun,) = (event for event in heard.events if event["type"] == "run")
    assert any("does not say which data it was begun with" in note for note in begun["notes"])
    assert TrainedOn.read(tmp_path / "results" / "r") is not None
