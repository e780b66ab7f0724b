"""A task without its data says of its labels what it said with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastpeft.config.schema import ModelConfig
from fastpeft.tasks import Task, load_task, restore_task
from tests.support.every_kind import ALL_KINDS, change_rows, data_folder, run_of_kind

CPU = torch.device("cpu")


def both(folder: Path, kind: str) -> tuple[Task, Task]:
    """(with its data, without)."""
    run = run_of_kind(folder, kind)
    task = load_task(run.dataset, run.evaluation, run.training.seed)
    for file in data_folder(run).iterdir():
        file.unlink()
    return task, restore_task(task.trained_on(), run.dataset, run.evaluation, run.training.seed)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_labels_and_what_an_export_says_are_the_same(kind: str, tmp_path: Path) -> None:
    task, restored = both(tmp_path, kind)
    assert type(restored) is type(task)
    for fact in ("name", "label_names", "num_outputs"):
        assert getattr(restored, fact) == getattr(task, fact), fact
    for told in ("model_settings", "load_arguments", "facts", "card_task", "card_pipeline"):
        assert getattr(restored, told)() == getattr(task, told)(), told
    if kind != "token-classification":  # whose example is a sentence of the data
        assert restored.card_example(64, (1,)) == task.card_example(64, (1,))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_model_answers_its_made_up_rows(kind: str, tmp_path: Path) -> None:
    _, restored = both(tmp_path, kind)
    backbone = restored.load_model(ModelConfig(name=str(tmp_path / "model")), torch.float32, CPU)
    answers = restored.export_check(backbone).answers(backbone.model, backbone.tokenizer, CPU)
    assert len(answers) >= 3
    assert answers.isfinite().all()
    assert answers.shape[-1] == (restored.num_outputs or backbone.model.config.vocab_size)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("how", ["rows", "order", "labels"])
def test_every_change_of_a_row_shows(kind: str, how: str, tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, kind)
    then = load_task(run.dataset, run.evaluation).trained_on()
    assert list(then.differing(load_task(run.dataset, run.evaluation).trained_on())) == []
    change_rows(run, kind, how)
    assert list(then.differing(load_task(run.dataset, run.evaluation).trained_on()))
