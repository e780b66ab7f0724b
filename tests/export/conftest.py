"""Real runs of the four families for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fastpeft.trainer
from fastpeft.config import run_from_values
from fastpeft.runs.store import RunFolder
from fastpeft.trainer.build import Job, build_job
from tests.support.exported_runs import CASES, Trained, run_values
from tests.support.tiny import FAMILIES, make_model
from tests.support.tiny_runs import write_pairs


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    write_pairs(folder / "pairs")
    return folder


@pytest.fixture(scope="session")
def trained(home: Path) -> dict[str, Trained]:
    """One run a case, under home/results."""
    jobs: list[Job] = []

    def keep(*args):
        jobs.append(build_job(*args))
        return jobs[-1]

    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpeft.trainer.run.build_job", keep)
        for case in CASES:
            family = next(family for family in FAMILIES if case.startswith(family))
            variant = case.removeprefix(family).removeprefix("-")
            model = make_model(home / "models" / case, family, masked_lm=variant == "without-pooler")
            method = variant if variant in ("rslora", "adalora") else "lora"
            run = run_from_values(run_values(model, home / "pairs", method), case)
            fastpeft.trainer.train(run, results_dir=home / "results", name=case)
            runs[case] = Trained(RunFolder.at(home / "results", case), jobs[-1])
    return runs


@pytest.fixture
def run_copy(trained: dict[str, Trained], tmp_path: Path) -> RunFolder:
    """A run's folder that a test may damage."""
    shutil.copytree(trained["bert"].folder.path, tmp_path / "results" / "copy")
    return RunFolder.at(tmp_path / "results", "copy")
