"""The files for SkyPilot and Slurm: the real tool reads each where there is one, and each calls only fastpeft."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from fastpeft.cli.commands import app
from fastpeft.config import load_run
from tests.support.environments import python_with, run
from tests.support.tiny_runs import write_run

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "examples" / "hosts"
SLURM, SKYPILOT = HOSTS / "slurm_array.sh", HOSTS / "skypilot.yaml"
SKY = "skypilot==0.14.1"
VARIABLE = re.compile(r"\$\{?(\w+)(?::-([^}]*))?\}?")


def task() -> dict:
    return yaml.safe_load(SKYPILOT.read_text())


def calls(script: str, given: dict[str, str]) -> list[list[str]]:
    """The commands of a script, as its shell would start them."""
    lines = re.sub(r"\\\n\s*", " ", script).splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(("#", "set "))]
    filled = [VARIABLE.sub(lambda found: given.get(found[1], found[2] or ""), line) for line in lines]
    return [shlex.split(line.removeprefix("exec ")) for line in filled]


def options_of(command: list[str]) -> dict:
    """Raises a usage error where fastpeft does not take it."""
    assert command[:2] == ["fastpeft", "sweep"]
    found = typer.main.get_command(app)
    return found.commands["sweep"].make_context("sweep", command[2:]).params  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [SLURM, SKYPILOT], ids=lambda path: path.name)
def test_it_calls_nothing_but_fastpeft(path):
    script, given = path.read_text(), {"SLURM_ARRAY_TASK_ID": "3"}
    if path == SKYPILOT:
        assert calls(task()["setup"], {}) == [["pip", "install", "fastpeft[postgresql]"]]
        script, given = task()["run"], task()["envs"] | {"SKYPILOT_NUM_GPUS_PER_NODE": "2"}
    (command,) = calls(script, given)
    found = options_of(command)
    assert load_run(found["run"]).optuna.space
    assert found["storage"].startswith("postgresql+psycopg://")
    assert ":" not in found["storage"].partition("://")[2].partition("@")[0], "a password in a file"
    assert found["trials_only"]
    assert found["name"] == "shared"


def test_each_task_of_the_array_has_a_folder_of_its_own():
    folders = {options_of(calls(SLURM.read_text(), {"SLURM_ARRAY_TASK_ID": i})[0])["results_dir"] for i in "01"}
    assert len(folders) == 2


# ---- Slurm -----------------------------------------------------------------------------------

DOCUMENTED = {
    "job-name": r"[\w.-]+", "array": r"\d+-\d+(%\d+)?", "gres": r"gpu(:\w+)?:\d+", "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]", "time": r"(\d+-)?\d{2}:\d{2}:\d{2}", "signal": r"(B:|R:)*TERM@\d+", "requeue": None,
    "open-mode": "append|truncate", "output": r"[\w.%-]+",
}  # fmt: skip
"""Options of sbatch's manual page that the script uses, and what it takes as their values: man7.org, slurm 24.05."""


def test_the_script_is_bash_and_its_options_are_sbatchs():
    subprocess.run(["bash", "-n", SLURM], check=True)
    lines = SLURM.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    assert {name for name, _, _ in options} == set(DOCUMENTED)
    for name, equals, value in options:
        pattern = DOCUMENTED[name]
        assert (not equals) if pattern is None else re.fullmatch(pattern, value), name
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:]), "sbatch reads none behind a command"


def test_slurm_itself_takes_it():
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm's sbatch is not installed")
    subprocess.run(["sbatch", "--test-only", SLURM], check=True, capture_output=True, timeout=60)


# ---- SkyPilot --------------------------------------------------------------------------------

READ = """
import json, sys
import sky

task = sky.Task.from_yaml(sys.argv[1])
resources = next(iter(task.resources))
print(json.dumps({
    "name": task.name, "num_nodes": task.num_nodes, "envs": task.envs, "setup": task.setup, "run": task.run,
    "accelerators": resources.accelerators, "use_spot": resources.use_spot,
}))
"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_skypilot_itself_reads_it(tmp_path):
    python = python_with(SKY)
    own = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PGPASSWORD": "x"}
    text = SKYPILOT.read_text().replace("PGPASSWORD: null", "PGPASSWORD: given")  # as --secret does
    (tmp_path / "task.yaml").write_text(text)
    found = json.loads(run(python, "-c", READ, tmp_path / "task.yaml", env=own).splitlines()[-1])
    assert (found["name"], found["num_nodes"]) == ("fastpeft-sweep", 2)
    assert (found["accelerators"], found["use_spot"]) == ({"L4": 1}, True)
    assert found["envs"].items() >= task()["envs"].items()
    assert found["run"] == task()["run"]


# ---- both, for real --------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_tasks_of_the_array_and_a_skypilot_node_share_a_sweep(tmp_path):
    """By bash, over an SQLite file in PostgreSQL's place."""
    space = "optuna: {space: {training.learning_rate: {type: loguniform, low: 1.0e-3, high: 1.0e-1}}}\n"
    path = write_run(tmp_path)
    path.write_text(path.read_text().replace("20steps", "4steps") + space)
    given = {
        "RUN": str(path), "NAME": "shared", "TRIALS": "6", "STORAGE": f"sqlite:///{tmp_path / 'sweep.db'}",
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = tmp_path / "skypilot.sh"
    script.write_text(task()["run"])
    started = []
    for name, more in (
        (SLURM, {"SLURM_ARRAY_TASK_ID": "0", "RESULTS": str(tmp_path / "results")}),
        (SLURM, {"SLURM_ARRAY_TASK_ID": "1", "RESULTS": str(tmp_path / "results")}),
        (script, {"SKYPILOT_NUM_GPUS_PER_NODE": "1"}),
    ):
        log = (tmp_path / f"{len(started)}.log").open("w")
        env = os.environ | given | more
        started.append(subprocess.Popen(["bash", name], cwd=tmp_path, env=env, stdout=log, stderr=log))
    codes = [process.wait(1200) for process in started]
    told = "\n".join((tmp_path / f"{i}.log").read_text() for i in range(len(started)))
    assert codes == [0, 0, 0], told
    with sqlite3.connect(tmp_path / "sweep.db") as database:
        states = [state for (state,) in database.execute("select state from trials")]
    print(f"three hosts: {sorted(states)}")
    assert 6 <= len([state for state in states if state in ("COMPLETE", "PRUNED")]) <= 8
    assert "RUNNING" not in states
