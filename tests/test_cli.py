"""The command as a user meets it: it starts at once, and a mistake is a sentence and an exit code."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import fastpeft
from fastpeft.cli import commands as cli
from fastpeft.config import load_run, preset_names
from fastpeft.runs.store import Result, RunFolder
from tests.support.tiers import presets

HEAVY = {
    "torch",
    "pydantic",
    "numpy",
    "transformers",
    "peft",
    "datasets",
    "yaml",
    "textual",
    "optuna",
    "wandb",
    "psutil",
}


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


def modules_after(code: str, **options) -> set[str]:
    done = python(f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint('MODULES', *sys.modules)", **options)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


def finished_run(results: Path, name: str, **fields) -> RunFolder:
    folder = RunFolder.at(results, name)
    folder.create()
    folder.config.write_text("run_id: lora_mnli\n")
    values = {"budget": {"kind": "steps", "limit": 10, "spent": 10.0}, "status": "done", "dataset": "mnli"} | fields
    folder.write_result(Result(run_id="lora_mnli", name=name, **values))
    folder.unlock()
    return folder


# ---- starting ------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["--version"], []])
def test_help_loads_little_more_than_the_argument_parser(args):
    """Counts modules, not seconds: the machine may be busy."""
    baseline = modules_after("import typer")
    loaded = modules_after(f"sys.argv = {['fastpeft', *args]!r}; from fastpeft.cli import main; main()")
    assert "fastpeft.cli" in loaded
    more = loaded - baseline
    assert not HEAVY & {name.partition(".")[0] for name in more}
    assert len(more) < 60, sorted(more)


@pytest.mark.parametrize(
    "args",
    [
        ["train", "--help"],
        ["sweep", "--help"],
        ["runs", "--help"],
        ["runs", "validate", "lora_mnli"],
        ["runs", "ls"],
        ["train"],
        ["sweep"],
    ],
)
def test_what_trains_nothing_loads_no_torch(args, tmp_path):
    code = f"sys.argv = {['fastpeft', *args]!r}; from fastpeft.cli import main; main()"
    loaded = modules_after(code, cwd=tmp_path)
    assert "fastpeft.cli" in loaded
    assert not {"torch", "transformers", "numpy", "peft", "datasets", "psutil"} & loaded


def test_importing_the_package_loads_nothing():
    assert not HEAVY & modules_after("import fastpeft")


def test_the_version_is_printed(fastpeft_here, fastpeft_cli):
    assert fastpeft_here("--version") == (0, f"{fastpeft.__version__}\n", "")
    assert fastpeft_cli("--version").stdout == f"{fastpeft.__version__}\n"


def test_help_names_the_commands_and_the_options(fastpeft_here):
    shown = fastpeft_here("--help")
    assert shown.code == 0
    assert "train" in shown.out
    shown = fastpeft_here("train", "--help").out
    for option in ("--run", "--budget", "--mode", "--results-dir", "--name", "--seed", "--resume", "--no-stand-in"):
        assert option in shown


def test_public_names_are_there_and_others_are_not():
    assert all(hasattr(fastpeft, name) for name in fastpeft.__all__)
    assert fastpeft.Result is Result
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        fastpeft.nothing_of_this_name  # noqa: B018


# ---- mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "train needs --run"),
        (["--run", "lora_mnl"], "did you mean lora_mnli?"),
        (["--run", ""], "no preset and no file"),
        (["--run", "nowhere.yaml"], "there is no such file"),
        (["--run", "."], "no preset and no file"),
        (["--run", "x" * 5000], "no preset and no file"),
        (["--run", "lora_mnli", "training.learning_rat=1"], "did you mean learning_rate?"),
        (["--run", "lora_mnli", "training.seed=x"], "training.seed: expected"),
        (["--run", "lora_mnli", "training.seed"], "key=value"),
        (["--run", "lora_mnli", "training.seed=["], "not valid YAML"),
        (["--run", "lora_mnli", "stray"], "key=value"),
        (["--run", "lora_mnli", "--mode", "fast"], "expected trial or full"),
        (["--run", "lora_mnli", "--mode", ""], "expected trial or full"),
        (["--run", "lora_mnli", "--seed", "-1"], "training.seed: expected"),
        (["--run", "lora_mnli", "--seed", "99999999999"], "training.seed: expected"),
        (["--run", "lora_mnli", "--budget", "30"], "90s, 30m, 2h"),
        (["--run", "lora_mnli", "--budget", ""], "90s, 30m, 2h"),
        (["--run", "lora_mnli", "--budget", "null"], "90s, 30m, 2h"),
        (["--run", "lora_mnli", "--budget", "1:30"], "90s, 30m, 2h"),
        (["--run", "lora_mnli", "--budget", 'it\'s \\ "quoted"'], "90s, 30m, 2h"),
        (["--resume", "--name", "a", "training.seed=1"], "--resume without --run"),
        (["--resume", "--name", "a", "--budget", "1h"], "--resume without --run"),
        (["--resume", "--name", "a", "--mode", "trial"], "--resume without --run"),
    ],
)
def test_a_mistake_is_found_before_torch_is_loaded(args, words, fastpeft_here, tmp_path):
    outcome = fastpeft_here("train", *args)
    assert words in outcome.refused()
    assert not outcome.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args", [["--bogus"], ["bogus"], ["train", "--seed", "x"], ["train", "--run"], ["runs", "show"]]
)
def test_options_that_do_not_exist_are_exit_2(args, fastpeft_here):
    outcome = fastpeft_here(*args)
    assert outcome.code == 2
    assert "Error: " in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "x" * 129, "a b", "é"])
def test_a_bad_name_is_refused(name, fastpeft_here, tmp_path):
    assert "cannot name a run" in fastpeft_here("train", "--run", "lora_mnli", "--name", name).refused()
    assert not list(tmp_path.iterdir())


def test_a_name_that_exists_is_refused_without_resume(fastpeft_here, tmp_path):
    folder = finished_run(tmp_path / "results", "a")
    before = folder.result.read_bytes()
    assert "--resume" in fastpeft_here("train", "--run", "lora_mnli", "--name", "a").refused()
    assert folder.result.read_bytes() == before


@pytest.mark.parametrize("more", [[], ["--run", "lora_mnli"]])
def test_resume_asks_for_a_run_that_exists(more, fastpeft_here, tmp_path):
    assert "there is no run results/nowhere" in fastpeft_here("train", "--resume", "--name", "nowhere", *more).refused()
    assert "--resume needs --name" in fastpeft_here("train", "--resume", *more).refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["--no-stand-in"],
        ["model.name=no-such/model-of-this-name"],
        ["model={name: no-such/model-of-this-name}"],
        ["model.name=./nowhere"],
        ["model.name=embedded/nothing"],
        ["stand_in=null"],
        ["model.name=embedded/deberta-tiny", "--no-stand-in"],
    ],
)
def test_a_model_that_cannot_be_had_is_exit_3(args, fastpeft_here, tmp_path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    outcome = fastpeft_here("train", "--run", "lora_mnli", "--mode", "trial", *args)
    assert len(outcome.refused(3)) > 40
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_it_starts_ends_it_without_a_traceback(fastpeft_here, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_config", interrupt)
    assert fastpeft_here("train", "--run", "lora_mnli") == (130, "", "")


@pytest.mark.parametrize("more", [(), ("--seeds", "0,1")])
def test_ctrl_c_while_torch_is_loaded_ends_it_without_a_traceback(more, tmp_path):
    """Inside torch's imports it is an abort or an ImportError, unless it ends the process there."""
    hook = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'fastpeft.trainer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = {['fastpeft', 'train', '--run', 'lora_mnli', *more]!r}\n"
        "from fastpeft.cli import main; main()"
    )
    done = python(hook, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "")


def test_sigterm_ends_an_export_as_an_exception_does(fastpeft_here, monkeypatch):
    from fastpeft.export import plan, summary, write

    def killed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")

    monkeypatch.setattr(plan, "make_plan", lambda *args, **options: None)
    monkeypatch.setattr(summary, "opening", lambda plan: [])
    monkeypatch.setattr(write, "export", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert fastpeft_here("export", "r") == (143, "", "")
    assert signal.getsignal(signal.SIGTERM) == before


# ---- runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", presets(preset_names()))
def test_presets_are_valid_and_shown_with_their_defaults(preset, fastpeft_here, tmp_path):
    assert fastpeft_here("runs", "validate", preset).out.startswith(f"{preset}: valid (")
    shown = fastpeft_here("runs", "show", preset)
    assert shown.code == 0
    (tmp_path / "shown.yaml").write_text(shown.out)
    assert load_run(tmp_path / "shown.yaml") == load_run(preset)


def test_validate_takes_overrides_and_tells_every_problem(fastpeft_here, tmp_path):
    assert fastpeft_here("runs", "validate", "lora_mnli", "training.seed=1").code == 0
    (tmp_path / "bad.yaml").write_text("extends: lora_mnli\ntraining: {sed: 1, epochs: -1}\n")
    message = fastpeft_here("runs", "validate", "bad.yaml").refused()
    assert "training.sed: unknown key; did you mean seed?" in message
    assert "training.epochs: expected" in message


def test_the_schema_is_json(fastpeft_here):
    assert "learning_rate" in json.loads(fastpeft_here("runs", "schema").out)["$defs"]["TrainingConfig"]["properties"]


def test_no_runs_is_no_error(fastpeft_here, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("results", "/nowhere", "file", "."):
        assert fastpeft_here("runs", "ls", "--results-dir", folder) == (0, f"no runs in {folder}\n", "")


def test_runs_are_listed_one_a_line_with_their_whole_names(fastpeft_here, tmp_path):
    long = "x" * 128
    finished_run(tmp_path / "results", "a", metric={"name": "accuracy", "value": 0.8125}, steps=1234)
    finished_run(tmp_path / "results", long, stand_in=True, model="/some/where/model")
    finished_run(tmp_path / "results", "no_result").result.unlink()
    finished_run(tmp_path / "results", "torn").result.write_text('{"run_id": ')
    finished_run(tmp_path / "results", "foreign").result.write_text('{"run_id": "a", "name": "b", "metric": 0.9}')
    finished_run(tmp_path / "results", "wrong").result.write_text('{"run_id": "a", "name": "b", "steps": "many"}')
    finished_run(tmp_path / "results", "brackets", model="m[v2]", dataset="[red]").path.rename(
        tmp_path / "results" / "old[1a]"
    )
    lines = fastpeft_here("runs", "ls").out.splitlines()
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert set(by_name) == {"a", long, "no_result", "torn", "foreign", "wrong", "old[1a]"}
    assert "m[v2] on [red]" in by_name["old[1a]"]
    assert "0.8125" in by_name["a"]
    assert "1,234" in by_name["a"]
    assert "model on mnli (stand-in)" in by_name[long]
    assert "no result" in by_name["no_result"]
    assert all("no result" in by_name[name] for name in ("torn", "foreign", "wrong"))


def test_a_run_is_shown_with_result_and_settings(fastpeft_here, tmp_path):
    finished_run(tmp_path / "here", "a", metric={"name": "accuracy", "value": 0.75}, best={"value": 0.8, "step": 1500})
    shown = fastpeft_here("runs", "show", "a", "--results-dir", "here").out
    for words in ("accuracy", "0.7500", "0.8000 at step 1,500", "10 of 10 steps", "run_id: lora_mnli"):
        assert words in shown


@pytest.mark.parametrize(("method", "word"), [("lora", "adapter"), ("full", "model")])
def test_what_was_saved_is_called_by_its_name(method, word, fastpeft_here, tmp_path):
    finished_run(tmp_path / "results", "a", method=method, adapter_mb=2.5)
    assert [word, "2.50", "MB"] in [line.split() for line in fastpeft_here("runs", "show", "a").out.splitlines()]


def test_further_metrics_are_shown(fastpeft_here, tmp_path):
    metric = {"name": "accuracy", "value": 0.75, "more": {"f1": 0.71875}}
    finished_run(tmp_path / "results", "a", metric=metric)
    lines = [line.split() for line in fastpeft_here("runs", "show", "a").out.splitlines()]
    assert ["accuracy", "0.7500"] in lines
    assert ["f1", "0.7188"] in lines


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_with_a_metric_that_is_not_finite_is_listed_and_shown(value, fastpeft_here, tmp_path):
    finished_run(tmp_path / "results", "a", status="diverged", metric={"name": "accuracy", "value": value})
    for args in (["ls"], ["show", "a"]):
        outcome = fastpeft_here("runs", *args)
        assert outcome.code == 0
        assert str(value) in outcome.out


def test_a_run_that_has_only_begun_is_shown(fastpeft_here, tmp_path):
    finished_run(tmp_path / "results", "a", status="running", budget={})
    assert "running" in fastpeft_here("runs", "show", "a").out


def test_showing_what_is_not_there_names_what_is(fastpeft_here, tmp_path):
    finished_run(tmp_path / "results", "mine")
    message = fastpeft_here("runs", "show", "yours").refused()
    assert "mine" in message
    assert "lora_mnli" in message
    assert "cannot name a run" in fastpeft_here("runs", "show", "../mine").refused()


# ---- pipes and processes -------------------------------------------------------------------


@pytest.mark.parametrize("args", [["runs", "schema"], ["runs", "show", "lora_mnli"], ["--help"]])
def test_a_reader_that_goes_away_is_no_error_message(args, tmp_path):
    """As in `fastpeft runs schema | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft", *args],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1, 128 + signal.SIGPIPE)


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft", "runs", "validate", "lora_mnli", "model.name=雪/é"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u96ea/\\xe9" in done.stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "no", "results/a/events.jsonl"),
            "results/a/events.jsonl: No space left on device: nothing",
        ),
        (OSError(errno.EROFS, "no"), "Read-only file system: nothing"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device: nothing"),
    ],
    ids=["full", "read-only", "safetensors"],
)
def test_a_disk_that_takes_no_more_is_a_sentence(error, said, fastpeft_here, monkeypatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    message = fastpeft_here("train").refused()
    assert f"fastpeft: {said} more can be written. Make room" in message
    assert "fastpeft train --resume --name NAME" in message


def test_an_error_of_ours_stays_a_traceback(fastpeft_here, monkeypatch):
    def fail() -> None:
        raise OSError(errno.EBADF, "a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(OSError, match="a bug"):
        fastpeft_here("train")


def test_a_mistake_in_a_real_process_is_one_line_on_stderr(fastpeft_cli):
    done = fastpeft_cli("train", "--run", "lora_mnl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fastpeft: ")


def test_a_trial_on_the_stand_in_ends_well_and_can_be_looked_at(fastpeft_here, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome = fastpeft_here("train", "--run", "lora_mnli", "--mode", "trial", "--name", "t", "training.threads=1")
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    folder = RunFolder.at(tmp_path / "results", "t")
    result = folder.read_result()
    assert (result.status, result.steps, result.stand_in) == ("done", 2, True)
    said = [line for line in outcome.out.splitlines() if line.strip()]
    assert "STAND-IN" in said[1]
    assert "STAND-IN" in said[-1]
    assert "t " in fastpeft_here("runs", "ls").out
    assert f"{result.metric['value']:.4f}" in fastpeft_here("runs", "show", "t").out
    again = fastpeft_here("train", "--resume", "--name", "t")
    assert again.code == 0
    assert "is finished" in again.out
