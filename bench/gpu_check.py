"""All checks that need a GPU, in one command: tests, tuning, kernels, cost of adapters, throughput, determinism.

    python bench/gpu_check.py [--json OUT] [--only tests,kernels] [--dry-run]

Under 9 minutes on one GPU, without a network, from a checkout that need not be installed. Every part is its own
process with its own time limit: a part that fails or hangs does not affect the others, and its partial results are
kept. Later parts use the table of kernel choices that the tuning measures; the user's own table is not changed.
Results go to bench/results/gpu_check_GPU_DATE.json. Exit 1 if a part did not succeed. Without a GPU: exit 2;
`--dry-run` runs every part in miniature on the CPU, to check this script, and writes only what --json names.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.interleave import names_in
from bench.report import about, json_path, print_table, write_json

ROOT = Path(__file__).resolve().parents[1]
DRY_LIMIT_S = 300.0
GRACE_S = 10.0
TAIL = 4000
"""Last characters of a part's output that are kept."""


@dataclass(frozen=True)
class Part:
    limit_s: float
    command: Callable[[Path, bool], list[str]]
    """(folder for results, whether it is a dry run) -> command, which writes NAME.json there."""
    headline: Callable[[dict[str, Any]], str]
    """Summary of the result in the table."""


def bench(script: str, *args: object) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / script), *map(str, args)]


def tests(out: Path, dry: bool) -> list[str]:
    """Tests of the kernels, compiled where there is a GPU; without pytest a short check of each operation."""
    if importlib.util.find_spec("pytest") is None:
        return bench("gpu_parts.py", "correctness", "--json", out / "tests.json", *(["--dry-run"] if dry else []))
    chosen = ["tests/kernels/test_dispatch.py"] if dry else ["tests/kernels", "--ignore=tests/kernels/test_aot.py"]
    spread = ["-n", "6"] if not dry and importlib.util.find_spec("xdist") else []
    return [
        sys.executable,
        "-m",
        "pytest",
        *chosen,
        *spread,
        "-p",
        "no:cacheprovider",
        f"--junitxml={out / 'tests.xml'}",
    ]


def part(name: str) -> Callable[[Path, bool], list[str]]:
    def command(out: Path, dry: bool) -> list[str]:
        return bench("gpu_parts.py", name, "--json", out / f"{name}.json", *(["--dry-run"] if dry else []))

    return command


def kernels(out: Path, dry: bool) -> list[str]:
    small = ["--device", "cpu", "--seconds", 2] if dry else ["--seconds", 90]
    return bench("kernels.py", "--json", out / "kernels.json", *small)


def overhead(out: Path, dry: bool) -> list[str]:
    small: list[object] = ["--seconds", 40]
    if dry:
        (out / "config.json").write_text(json.dumps(TINY["mnli"]))
        small = ["--model", out, "--device", "cpu", "--batch-size", 2, "--repeats", 1, "--steps", 1]
    return bench("overhead.py", "--json", out / "overhead.json", *small)


def throughput(preset: str) -> Callable[[Path, bool], list[str]]:
    """The training loop with captured steps, padded and packed, and without capture, against Hugging Face's Trainer
    with rows grouped by length."""

    def command(out: Path, dry: bool) -> list[str]:
        small: list[object] = ["--seconds", 10]
        if dry:
            shape = out / preset
            shape.mkdir()
            (shape / "config.json").write_text(json.dumps(TINY[preset]))
            small = ["--model", shape, "--device", "cpu", "--rounds", 1, "--steps", 1, "training.batch_size=2"]
        rows = "hf_grouped,fastpeft,fastpeft_launched,fastpeft_packed"
        chosen = ["--preset", preset, "--rows", rows, "--json", out / f"throughput_{preset}.json"]
        return bench("throughput.py", *chosen, *small)

    return command


_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY = {
    "mnli": _SIZES | {"model_type": "bert", "vocab_size": 32},
    "gsm8k": _SIZES | {"model_type": "qwen3", "vocab_size": 32, "num_key_value_heads": 1, "head_dim": 8},
}
"""Configs of the dry run, by preset."""


# ---- headlines -----------------------------------------------------------------------------


def of_tests(result: dict[str, Any]) -> str:
    if "relative_errors" in result:
        return f"{len(result['relative_errors'])} checks, {len(result['bad'])} bad"
    return ", ".join(f"{result[key]} {key}" for key in ("tests", "failures", "errors", "skipped"))


def of_tuning(result: dict[str, Any]) -> str:
    fused = sum(row["form"] != "split" for row in result["rows"])
    return f"{len(result['rows'])} of {result['wanted']} measured, {fused} of them fused"


def of_kernels(result: dict[str, Any]) -> str:
    ours = [row for row in result["rows"] if row.get("ours") and row["operation"] == "lora_linear" and row["ratio"]]
    shown = [f"{row['shape']['in']}/r{row['shape']['rank']} {row['ratio']:.2f}" for row in ours]
    matmul = result["ceilings"]["matmul_flops"] / 1e12
    return f"{matmul:.2f} TFLOP/s; lora_linear over frozen: {', '.join(shown)}"


def of_overhead(result: dict[str, Any]) -> str:
    ratios = {row["name"]: row["ratio"] for row in result["rows"]}
    wanted = ("fastpeft_iwlora", "fastpeft_iwlora_online", "peft_adalora")
    return "over own LoRA: " + ", ".join(f"{name} {ratios[name]:.3f}" for name in wanted if ratios.get(name))


def of_throughput(result: dict[str, Any]) -> str:
    done = [row for row in result["rows"] if row["ratio"] is not None]
    return ", ".join(f"{row['name']} {row['tokens_a_s']:,.0f} tok/s, {row['ratio']:.2f}" for row in done)


def of_determinism(result: dict[str, Any]) -> str:
    return f"{result['checked']} operations, {len(result['bad'])} not the same twice"


PARTS = {
    "tests": Part(110, tests, of_tests),
    "determinism": Part(40, part("determinism"), of_determinism),
    "tuning": Part(95, part("tuning"), of_tuning),
    "kernels": Part(115, kernels, of_kernels),
    "overhead": Part(65, overhead, of_overhead),
    "throughput_mnli": Part(57, throughput("mnli"), of_throughput),
    "throughput_gsm8k": Part(57, throughput("gsm8k"), of_throughput),
}
"""Parts in the order in which they run; their limits add up to under 9 minutes."""


# ---- running -------------------------------------------------------------------------------


def run_part(name: str, part: Part, out: Path, dry: bool) -> dict[str, Any]:
    """Status (ok, failed, timeout), seconds, the end of the output, and the result, partial if the part was stopped."""
    log, began = out / f"{name}.log", time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(out / "cache"), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            part.command(out, dry), cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_heed_interrupts,
        )  # fmt: skip
        try:
            code = process.wait(DRY_LIMIT_S if dry else part.limit_s)
            status = "ok" if code == 0 else "failed"
        except BaseException as stopped:
            end(process)
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            code, status = None, "timeout"
    report = {"status": status, "exit_code": code, "seconds": round(time.perf_counter() - began, 1)}
    result = read_result(out, name)
    if result is None and status == "ok":
        report["status"] = "failed"
    return report | {"output": log.read_text(errors="replace")[-TAIL:], "result": result}


def _heed_interrupts() -> None:
    """Restore SIGINT, which a shell's background jobs and their children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen) -> None:
    """End the process and its children. SIGINT comes first, so that pytest writes its partial results."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_result(out: Path, name: str) -> dict[str, Any] | None:
    """Result that a part has written; None if there is none or it is incomplete."""
    try:
        if (out / f"{name}.xml").is_file():
            return read_junit(out / f"{name}.xml")
        return json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError, SyntaxError):
        return None


def read_junit(path: Path) -> dict[str, Any]:
    from xml.etree import ElementTree

    root = ElementTree.parse(path).getroot()
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    assert suite is not None
    bad = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} | {"bad": bad}


def headline(part: Part, report: dict[str, Any]) -> str:
    if report["result"] is None:
        lines = report["output"].strip().splitlines()
        return lines[-1][:120] if lines else "no output"
    return part.headline(report["result"])


def default_path(described: dict[str, Any]) -> Path:
    gpu = "".join(c if c.isalnum() else "-" for c in described["device"].lower())
    return ROOT / "bench" / "results" / f"gpu_check_{gpu}_{described['date'][:10]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=json_path)
    parser.add_argument("--only", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="in miniature on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "gpu_check needs a CUDA device, and torch sees none; --dry-run tries the script on a CPU", file=sys.stderr
        )
        raise SystemExit(2)
    described = about(torch.device("cpu" if args.dry_run else "cuda"))
    report = described | {"dry_run": args.dry_run, "parts": {}}
    path = args.json or (None if args.dry_run else default_path(described))
    lines = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for name in names_in(args.only, list(PARTS)):
            done = report["parts"][name] = run_part(name, PARTS[name], Path(folder), args.dry_run)
            lines.append([name, done["status"], f"{done['seconds']:.0f} s", headline(PARTS[name], done)])
            print(f"{name}: {done['status']} after {done['seconds']:.0f} s", flush=True)
            if path:
                write_json(path, report)
    print_table(f"{described['device']}, commit {described['commit']}", ["part", "", "", ""], lines)
    if path:
        print(path)
    raise SystemExit(any(done["status"] != "ok" for done in report["parts"].values()))


if __name__ == "__main__":
    main()
