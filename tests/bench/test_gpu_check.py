"""The whole check in miniature, from a bare checkout; and parts that fail or hang cost no other."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check
from bench.gpu_check import Part, run_part

ROWS = [
    "frozen", "peft_lora", "peft_lora_loop_penalty", "peft_adalora", "fastpeft_lora", "fastpeft_iwlora",
    "fastpeft_iwlora_online", "calibration_exact", "calibration_sketch",
]  # fmt: skip


@pytest.mark.soak
def test_every_part_runs_from_a_checkout_on_a_machine_without_most_packages(script, tmp_path):
    out = tmp_path / "check.json"
    done = script("gpu_check.py", "--dry-run", "--json", out, timeout=480)
    report = json.loads(out.read_text())
    parts = report["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu_check.PARTS, "ok"), done.stdout
    assert done.returncode == 0, done.stderr
    assert report.keys() >= {"device", "driver", "versions", "commit", "date"}
    assert report["commit"] is None  # the copy's own code ran, which git does not know
    assert parts["tests"]["result"]["tests"] > 10
    assert parts["determinism"]["result"]["checked"] >= 8
    assert {row["form"] for row in parts["tuning"]["result"]["rows"]} <= {
        "split",
        "fused",
        "fused_two",
        "fused_factors",
    }
    assert len(parts["tuning"]["result"]["rows"]) == parts["tuning"]["result"]["wanted"]
    check_kernels(parts["kernels"]["result"])
    check_overhead(parts["overhead"]["result"])
    assert all(name in done.stdout for name in gpu_check.PARTS)


OPERATIONS = [
    "lora_linear split",
    "lora_linear fused",
    "lora_linear fused_two",
    "gradient_norm split",
    "gradient_norm fused",
]


def check_kernels(result):
    assert result["ceilings"].keys() == {"copy_bytes_per_s", "matmul_flops"}
    rows = [row for row in result["rows"] if "left_out" not in row]
    assert not [row for row in rows if "fault" in row]
    wanted = {"lora_linear", "lora_forward", "gradient_norm", "weighted_frobenius", "linear_cross_entropy"}
    assert {row["operation"] for row in rows} >= wanted
    for row in rows:
        assert row["us"] > 0
        assert row["reached"] == pytest.approx(row["floor_us"] / row["us"], rel=0.01, abs=1e-3)
    lora = [row["name"] for row in rows if row["operation"] == "lora_linear" and row["shape"]["rank"] == 8]
    assert lora == ["frozen", "peft", "peft, factors in the model's dtype", "fastpeft"]


def check_overhead(result):
    assert [row["name"] for row in result["rows"]] == ROWS
    assert result.keys() >= {"device", "versions", "commit", "date", "model", "shape", "rows", "launches_kind"}
    for row in result["rows"]:
        assert row["step_ms"] > 0
        assert row["spread_ms"] >= 0
        assert row["ratio"] > 0
        assert row["launches"] > 0
        assert row["peak_mb"] > 0
        assert row["ratio_to"] == ("peft_lora" if row["name"].startswith("peft") else "fastpeft_lora")
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["peft_lora"]["ratio"] == by_name["fastpeft_lora"]["ratio"] == 1
    assert by_name["peft_adalora"]["launches"] > by_name["peft_lora"]["launches"]
    assert by_name["frozen"]["launches"] < by_name["fastpeft_lora"]["launches"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_parts_end_within_nine_minutes():
    assert sum(part.limit_s for part in gpu_check.PARTS.values()) < 9 * 60


# ---- parts ---------------------------------------------------------------------------------


def python(code: str, limit_s: float = 30) -> Part:
    return Part(limit_s, lambda out, dry: [sys.executable, "-c", code, str(out)], lambda result: f"x {result['x']}")


WRITE = "import json, pathlib, sys; pathlib.Path(sys.argv[1], 'p.json').write_text(json.dumps({'x': 7})); "


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_wrote(tmp_path):
    child = tmp_path / "child"
    shell = f"sleep 4; touch {child}"
    code = WRITE + f"import subprocess, time; subprocess.Popen(['sh', '-c', {shell!r}]); "
    code += "print('so far', flush=True); time.sleep(60)"
    began = time.perf_counter()
    report = run_part("p", python(code, limit_s=2), tmp_path, False)
    assert time.perf_counter() - began < 20
    assert (report["status"], report["exit_code"], report["result"]) == ("timeout", None, {"x": 7})
    assert "so far" in report["output"]
    assert gpu_check.headline(python(""), report) == "x 7"
    time.sleep(max(0, 5 - (time.perf_counter() - began)))
    assert not child.exists()


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("raise ValueError('spoilt')", "failed", "ValueError: spoilt"),
        ("print('nothing written')", "failed", "nothing written"),
        (WRITE, "ok", "x 7"),
        (WRITE + "sys.exit(1)", "failed", "x 7"),
    ],
)
def test_the_status_of_a_part(tmp_path, code, status, words):
    report = run_part("p", python(code), tmp_path, False)
    assert report["status"] == status
    assert words in gpu_check.headline(python(""), report)


def test_one_failing_part_fails_the_whole_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    parts = {"bad": python("raise SystemExit(3)"), "p": python(WRITE)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 1
    report = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert (report["bad"]["status"], report["bad"]["exit_code"]) == ("failed", 3)
    assert report["p"]["result"] == {"x": 7}
    assert "x 7" in capsys.readouterr().out


def test_failing_tests_are_named(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    junit = tmp_path / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        f"--junitxml={junit}",
        str(tmp_path / "test_x.py"),
    ]
    part = Part(60, lambda out, dry: command, gpu_check.of_tests)
    report = run_part("tests", part, tmp_path, False)
    assert report["status"] == "failed"
    assert report["result"]["bad"] == ["test_x.test_bad"]
    assert gpu_check.headline(part, report) == "2 tests, 1 failures, 0 errors, 0 skipped"


@pytest.mark.soak
def test_tests_that_take_too_long_leave_what_they_found(tmp_path):
    code = "import time\ndef test_bad(): assert False\ndef test_slow(): time.sleep(60)\n"
    (tmp_path / "test_x.py").write_text(code)
    options = ["-q", "-c", "/dev/null", f"--junitxml={tmp_path / 'tests.xml'}", str(tmp_path / "test_x.py")]
    part = Part(8, lambda out, dry: [sys.executable, "-m", "pytest", *options], gpu_check.of_tests)
    report = run_part("tests", part, tmp_path, False)
    assert report["status"] == "timeout"
    assert report["result"]["bad"] == ["test_x.test_bad"]


def test_without_pytest_each_operation_is_checked_by_itself(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = gpu_check.tests(tmp_path, False)
    assert command[1:3] == [str(Path(gpu_check.__file__).parent / "gpu_parts.py"), "correctness"]


def test_an_operation_that_is_wrong_is_bad(monkeypatch):
    import torch

    from bench import gpu_parts

    right = torch.ones(4)
    cases = {"right": right, "wrong": right * 1.001, "nan": right * float("nan")}

    def operations(device, dtype, small):
        for name, got in cases.items():
            yield name, lambda got=got: [got], [right.double()]

    monkeypatch.setattr(gpu_parts, "flat_operations", lambda *_: [])
    monkeypatch.setattr(gpu_parts, "head_operations", lambda *_: [])
    monkeypatch.setattr(gpu_parts, "operations", operations)
    result = gpu_parts.correctness(torch.device("cpu"), True)
    assert [line.split()[0] for line in result["bad"]] == ["wrong", "nan"]
    flips = iter(range(100))
    monkeypatch.setattr(gpu_parts, "operations", lambda *_: [("drifts", lambda: [right + next(flips)], [right])])
    assert gpu_parts.determinism(torch.device("cpu"), True)["bad"] == ["drifts torch.float32"]
