"""Each finding on machines that are not as they should be, and a report that no check can spoil."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import sys
import threading
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastpeft import doctor
from fastpeft.doctor import Check, Finding, can_train, machine, surroundings
from fastpeft.doctor.check import carry_out
from fastpeft.doctor.table import print_report
from fastpeft.models import precision

CANARY = "local-0123456789abcdef0123456789abcdef01234567"


def one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def command(fastpeft_here):
    return partial(fastpeft_here, "doctor")


# ---- isolation -----------------------------------------------------------------------------


def boom() -> list[Finding]:
    raise RuntimeError("boom\nwith a second line")


def leave() -> list[Finding]:
    sys.exit(3)


@pytest.mark.parametrize(("look", "words"), [(boom, "RuntimeError: boom"), (leave, "SystemExit: 3")])
def test_a_check_that_fails_is_a_warning(look, words):
    finding = one(carry_out(Check("broken", look)))
    assert (finding.name, finding.status, finding.fatal) == ("broken", "warning", False)
    assert finding.message == f"could not be checked: {words}"


def test_a_check_that_hangs_is_given_up():
    held = threading.Event()
    started = time.monotonic()
    finding = one(carry_out(Check("stuck", lambda: [held.wait(30)], timeout_s=0.1)))
    held.set()
    assert time.monotonic() - started < 10
    assert "no answer within 0.1 s" in finding.message


def test_a_failing_check_spoils_no_other(monkeypatch, command):
    real = doctor.checks
    monkeypatch.setattr(doctor, "checks", lambda folder: [Check("broken", boom), *real(folder), Check("bye", leave)])
    code, said, errors = command("--json")
    assert (code, errors) == (0, "")
    findings = {finding["name"]: finding for finding in json.loads(said)["checks"]}
    assert findings["broken"]["status"] == findings["bye"]["status"] == "warning"
    assert findings["device"]["status"] in ("ok", "warning")
    assert findings["results"]["status"] == "ok"


# ---- the whole -----------------------------------------------------------------------------


def test_the_command_prints_a_line_for_every_check(command, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    code, said, errors = command()
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    told = {line[9:].partition(":")[0] for line in lines if line[:8].strip() in ("ok", "warning", "missing")}
    names = ["fastpeft", "packages", "imports", "device", "threads", "kernels", "energy", "hub", "hub cache", "W&B"]
    assert {*names, "results", "disk"} <= told
    assert lines[-1] == "fastpeft can train here"
    assert CANARY not in said
    assert metadata.version("torch") in said


def test_json_has_the_same_findings(command, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    code, said, _ = command("--json")
    values = json.loads(said)
    assert code == 0
    assert values["can_train"] is True
    assert {"name", "status", "message", "fix", "fatal"} == set(values["checks"][0])
    assert CANARY not in said


def test_what_makes_training_impossible_is_exit_1(command, tmp_path):
    (tmp_path / "file").touch()
    code, said, errors = command("--results-dir", "file/x")
    assert (code, errors) == (1, "")
    assert "--results-dir" in said
    assert said.splitlines()[-1] == "nothing can be trained here until this is mended: results"
    assert json.loads(command("--results-dir", "file/x", "--json")[1])["can_train"] is False


def test_every_problem_comes_with_what_to_do(command):
    for finding in json.loads(command("--json")[1])["checks"]:
        assert finding["status"] == "ok" or finding["fix"], finding


def test_a_terminal_gets_a_table_with_the_whole_text():
    findings = [Finding("a", "ok", "fine [bold]"), Finding("b", "missing", "gone", "get it", fatal=True)]
    terminal = Console(file=io.StringIO(), force_terminal=True, width=60)
    print_report(findings, terminal)
    text = terminal.file.getvalue()
    for words in ("fine [bold]", "gone", "get it", "until this is mended: b", "\x1b["):
        assert words in text


# ---- packages and imports ------------------------------------------------------------------


def requirements(monkeypatch, *lines: str) -> list[Finding]:
    monkeypatch.setattr(machine, "_project", lambda: {"requires-python": ">=3.11", "dependencies": list(lines)})
    return machine.packages()[1:]


def test_this_environment_is_as_the_project_wants_it():
    assert [finding.status for finding in machine.packages()] == ["ok"]
    assert one(machine.fastpeft()).status == "ok"


def test_a_version_below_the_floor_is_a_warning_with_the_command(monkeypatch):
    finding = one(requirements(monkeypatch, "peft>=99", "typer>=0"))
    assert (finding.name, finding.status, finding.fatal) == ("peft", "warning", False)
    assert metadata.version("peft") in finding.message
    assert finding.fix == "pip install --upgrade 'peft>=99'"


def test_a_missing_package_is_fatal_only_if_every_run_needs_it(monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name in ("torch", "optuna"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    found = {f.name: f for f in requirements(monkeypatch, "torch>=2", "optuna>=5", "rich>=1")}
    assert found.keys() == {"torch", "optuna"}
    assert {f.status for f in found.values()} == {"missing"}
    assert found["torch"].fatal
    assert not found["optuna"].fatal


def test_other_platforms_packages_are_not_asked_for(monkeypatch):
    assert not requirements(monkeypatch, "no-such-package>=1; sys_platform == 'plan9'")


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(machine, "_project", lambda: {"requires-python": ">=3.99"})
    finding = one(machine.fastpeft())
    assert finding.status == "warning"
    assert "3.99" in finding.fix


def test_floors_are_those_of_an_installed_package_too(monkeypatch, tmp_path):
    """Without a pyproject.toml beside the package, they come from the metadata."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    project = machine._project()
    assert any(line.startswith("torch>=") for line in project["dependencies"])
    assert not any("pytest" in line for line in project["dependencies"])
    assert project["requires-python"].startswith(">=3")


def test_a_library_that_does_not_load_is_fatal(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    finding = one(machine.imports())
    assert (finding.status, finding.fatal) == ("missing", True)
    assert "peft" in finding.message
    assert finding.fix.startswith("pip install")
    assert not can_train([finding])


# ---- device, threads, kernels, energy ------------------------------------------------------


def test_the_cpu_is_described_with_what_auto_means(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_gpus_of_the_driver", list)
    monkeypatch.setattr(precision, "slowdown", lambda dtype, device, shape: 0.5)
    finding = one(machine.device())
    assert finding.status == "ok"
    assert "GiB free; precision auto is bf16: a product of 64 x 768 x 3072 takes 0.50 times as long" in finding.message
    assert f"{os.cpu_count()} cores" in finding.message


@pytest.mark.parametrize(
    ("cuda", "visible", "words"),
    [(None, None, "CPU build of torch"), ("12.8", "", "CUDA_VISIBLE_DEVICES"), ("12.8", None, "update the driver")],
)
def test_a_gpu_that_torch_does_not_use_is_a_warning(cuda, visible, words, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "_gpus_of_the_driver", lambda: ["NVIDIA H200"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding, cpu = machine.device()
    assert finding.status == "warning"
    assert "NVIDIA H200" in finding.message
    assert words in f"{finding.message} {finding.fix}"
    assert cpu.status == "ok"


@pytest.mark.parametrize(
    ("free_gib", "num", "status", "words"),
    [
        (139, 1, "ok", "NVIDIA H200, capability 9.0, driver 570.1, CUDA 12.8 in torch, 139 of 140 GiB free"),
        (139, 4, "ok", "the first of 4"),
        (20, 1, "warning", "in use"),
    ],
)
def test_a_gpu_is_described(free_gib, num, status, words, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    facts = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_gib * 2**30, 140 * 2**30))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "_driver", lambda: "570.1")
    monkeypatch.setattr(machine, "_multiply", lambda _: None)
    finding = one(machine.device())
    assert (finding.status, finding.fatal) == (status, False)
    assert words in finding.message
    assert "precision auto is bf16" in finding.message


def test_a_gpu_that_does_not_compute_is_fatal(monkeypatch):
    import torch

    def refuse(_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    facts = SimpleNamespace(name="NVIDIA K80", major=3, minor=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(machine, "_multiply", refuse)
    finding = one(machine.device())
    assert (finding.status, finding.fatal) == ("missing", True)
    assert finding.message.endswith("on the device")
    assert "sm_90" in finding.fix


@pytest.mark.gpu
def test_the_gpu_that_is_here_is_described():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    finding = one(machine.device())
    assert torch.cuda.get_device_name(0) in finding.message
    assert "driver unknown" not in finding.message
    assert one(machine.energy()).message.startswith("nvml_")


def test_more_threads_than_cores_are_a_warning(monkeypatch, tmp_path):
    import torch

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert one(machine.threads()).status == "ok"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert one(machine.threads()).status == "ok"
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    finding = one(machine.threads())
    assert finding.status == "warning"
    assert "training.threads=2" in finding.fix
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "ACTIVE" in machine.threads()[1].message


def test_the_kernels_that_there_are_are_named():
    import fastpeft.kernels

    message = one(machine.kernels()).message
    there = {path.parent.name for path in Path(fastpeft.kernels.__file__).parent.rglob("kernel.py")}
    assert there
    assert there == set(message.removeprefix("Triton kernels: ").partition(";")[0].split(", "))


def test_triton_that_does_not_load_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in one(machine.kernels()).message


def test_the_meter_is_the_one_that_a_run_would_have(monkeypatch, tmp_path):
    from fastpeft.budget import energy

    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    finding = one(machine.energy())
    assert (finding.status, str(tmp_path) in finding.message) == ("missing", True)
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, value in (("name", "package-0"), ("energy_uj", "12345"), ("max_energy_range_uj", "99999999")):
        (zone / name).write_text(f"{value}\n")
    finding = one(machine.energy())
    assert finding.status == "ok"
    assert finding.message.startswith("rapl: ")


# ---- hub, W&B, folders ---------------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub on this machine that answers with `status`; `online(status)` gives its address."""
    from huggingface_hub import constants

    servers = []

    def online(status: int, wait_s: float = 0.0) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                time.sleep(wait_s)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"[]")

            def handle(self):
                with contextlib.suppress(ConnectionError):  # a client that has given up
                    super().handle()

            def log_message(self, *_): ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        return address

    yield online
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "wanted"), [(200, "ok"), (401, "warning"), (503, "warning")])
def test_the_hubs_answer_is_told(status, wanted, fake_hub):
    address = fake_hub(status)
    finding = one(surroundings.hub())
    assert finding.status == wanted
    assert address in finding.message
    assert (str(status) in finding.message) == (status != 200)


def test_a_hub_that_does_not_answer_is_given_up(fake_hub, monkeypatch):
    fake_hub(200, wait_s=1.5)
    monkeypatch.setattr(surroundings, "HUB_TIMEOUT_S", 0.2)
    started = time.monotonic()
    finding = one(surroundings.hub())
    assert time.monotonic() - started < 1.4
    assert finding.status == "warning"
    assert "HF_ENDPOINT" in finding.fix
    assert not finding.fatal


def test_a_hub_that_is_not_there_and_one_that_is_switched_off(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in one(surroundings.hub()).fix
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://user:{CANARY}@127.0.0.1:1")
    finding = one(surroundings.hub())
    assert "http://127.0.0.1:1 cannot be reached" in finding.message
    assert CANARY not in f"{finding}"


def test_the_cache_is_counted_and_its_absence_is_no_problem(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert one(surroundings.hub_cache()).status == "ok"
    assert "nothing is cached" in one(surroundings.hub_cache()).message
    for name in ("models--a--b", "models--c--d", "datasets--e--f"):
        snapshot = tmp_path / "hub" / name / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (tmp_path / "hub" / name / "blobs").mkdir()
        (tmp_path / "hub" / name / "blobs" / "x").write_text("x")
        (snapshot / "config.json").symlink_to("../../blobs/x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    finding = one(surroundings.hub_cache())
    assert finding.status == "ok", finding
    assert "2 models and 1 datasets" in finding.message
    (tmp_path / "hub" / "models--torn").mkdir()
    assert one(surroundings.hub_cache()).status == "warning"


def test_a_wandb_key_is_found_and_never_shown(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert one(surroundings.wandb_key()).status == "missing"
    (tmp_path / "netrc").write_text("this is no netrc file\n")
    assert one(surroundings.wandb_key()).status == "missing"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {CANARY}\n")
    finding = one(surroundings.wandb_key())
    assert finding.status == "ok"
    assert CANARY not in f"{finding}"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert one(surroundings.wandb_key()).status == "missing"
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    finding = one(surroundings.wandb_key())
    assert finding.status == "ok"
    assert CANARY not in f"{finding}"


def test_a_results_folder_that_cannot_be_written_is_fatal(monkeypatch, tmp_path):
    assert "can be made" in one(surroundings.results_folder(tmp_path / "a" / "b")).message
    assert "can be written" in one(surroundings.results_folder(tmp_path)).message
    assert not list(tmp_path.iterdir())

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(surroundings.tempfile, "TemporaryFile", refuse)
    finding = one(surroundings.results_folder(tmp_path))
    assert (finding.status, finding.fatal) == ("missing", True)
    assert "Permission denied" in finding.message


def test_little_room_is_a_warning(monkeypatch, tmp_path):
    assert "GiB free" in one(surroundings.disk(tmp_path / "none")).message
    monkeypatch.setattr(surroundings, "_LOW_DISK_BYTES", 2**62)
    finding = one(surroundings.disk(tmp_path))
    assert (finding.status, finding.fatal) == ("warning", False)


# ---- tuning --------------------------------------------------------------------------------


def test_tuning_without_a_gpu_is_exit_2_and_says_why(command, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said, errors = command("--tune")
    assert (code, said) == (2, "")
    assert "doctor --tune needs a CUDA device, and there is none" in errors
    assert "Traceback" not in errors


def test_an_unknown_model_to_tune_for_is_named(command):
    code, _, errors = command("--tune", "--model", "deberta-v9")
    assert code == 2
    assert "--model deberta-v9: not known; there are minilm, deberta-v3-base" in errors
    assert "768x3072" in errors


def test_the_shapes_to_tune_are_the_models():
    from fastpeft.doctor.tuning import shapes_of

    assert shapes_of(["768x3072", "deberta-v3-base"]) == [(768, 3072), (768, 768), (3072, 768)]


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """`fastpeft doctor --tune` on a GPU that is this CPU with interpreted kernels; the clock prefers `fused`."""
    import torch

    from fastpeft.doctor import tuning
    from fastpeft.kernels import dispatch, tune
    from fastpeft.kernels.dispatch import Config
    from fastpeft.kernels.ops.lora_linear import configs

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = {"split": 10.0, "fused": 8.0, "fused_two": 9.0, "fused_factors": 12.0}

    class Clock:
        def __init__(self, device):
            pass

        def __call__(self, run):
            return times[max((choice.form for choice in dispatch._forced.values()), key=lambda f: f != "split")]

    if here.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "CONFIGS", dict.fromkeys(configs.CONFIGS, (Config(16, 16, 16, 4, 1),)))
    monkeypatch.setattr(tuning, "usable_device", lambda: here)
    monkeypatch.setattr(dispatch, "gpu_name", lambda index: "Test GPU")
    monkeypatch.setattr(tune, "DeviceTimer", Clock)
    problems = [tune.Problem(operation, 16, 16, 4, 16, torch.float32) for operation in configs.FORMS]
    monkeypatch.setattr(tune, "problems", lambda shapes: problems)
    return dispatch.table_path("Test GPU")


def test_tuning_writes_the_table_and_shows_it(command, tuned, monkeypatch):
    from fastpeft.kernels import dispatch

    code, said, _ = command("--tune")
    assert code == 0
    assert "3 measured, 0 known before, 0 left" in said
    rows = dispatch.read_table(tuned)
    assert {key[0]: choice.form for key, choice in rows.items()} == {
        "lora_forward": "fused",
        "lora_backward": "fused",
        "lora_factors": "split",
    }
    assert said.count("lora_") == 3
    assert "fused 8.0" in said
    assert "0 measured, 3 known before, 0 left" in command("--tune")[1]
    tuned.write_text("{")
    code, _, errors = command("--tune")
    assert code == 2
    assert f"{tuned} is no table" in errors


def test_a_table_that_cannot_be_kept_is_told_before_anything_is_measured(command, tuned, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, said, errors = command("--tune")
    assert code == 2
    assert "doctor --tune cannot keep a table" in errors
    assert str(tmp_path / "file") in errors
    assert said == ""


def test_ctrl_c_keeps_what_was_measured(command, tuned, monkeypatch):
    from fastpeft.kernels import dispatch, tune

    real, calls = tune.tune_one, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tune, "tune_one", interrupted)
    code, said, errors = command("--tune")
    assert code == 130
    assert "interrupted; what was measured is kept" in errors
    assert "lora_forward" in said
    assert [key[0] for key in dispatch.read_table(tuned)] == ["lora_forward"]


def test_the_kernels_check_tells_of_the_table(tuned, monkeypatch):
    import torch

    from fastpeft.kernels import dispatch
    from fastpeft.kernels.dispatch import Choice

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finding = one(machine.kernels())
    assert finding.status == "warning"
    assert "no table for Test GPU" in finding.message
    assert finding.fix.endswith("fastpeft doctor --tune")
    keys = [dispatch.key_of("lora_forward", torch.bfloat16, 768, 768, 8, t) for t in (64, 128)]
    dispatch.write_table(tuned, {keys[0]: Choice("fused"), keys[1]: Choice("split")}, {})
    finding = one(machine.kernels())
    assert finding.status == "ok"
    assert "a table for Test GPU: 2 shapes, 1 of them in Triton" in finding.message
    tuned.write_text("{")
    dispatch.table.cache_clear()
    finding = one(machine.kernels())
    assert finding.status == "warning"
    assert str(tuned) in finding.fix
    dispatch.table.cache_clear()
