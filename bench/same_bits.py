"""Bitwise comparison of training before and after a refactoring.

    python bench/same_bits.py record FILE     on the code as it was
    python bench/same_bits.py check FILE      on the code as it is; exit code 1 and the first difference

Each preset takes 20 steps on its stand-in in fp32 on one thread, stops in the middle and resumes. Compared are
every logged loss and the SHA-256 of the final weights. A record is valid for one machine and one release of torch only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # use the stand-ins even if a hub can be reached
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PRESETS = ("iwlora_mnli", "adalora_mnli", "full_mnli", "linear_gsm8k", "graff_gsm8k", "fot_mnli")
NUM_STEPS, STOP_AFTER = 20, 10
OVERRIDES = {
    "budget": f"{NUM_STEPS}steps",
    "training.precision": "fp32",
    "training.threads": 1,
    "training.checkpoint_steps": STOP_AFTER,
    "evaluation.every": "end",
    "evaluation.max_examples": 32,
    "evaluation.max_test_examples": 16,
    "evaluation.max_new_tokens": 8,
    "wandb.mode": "disabled",
}
OWN = {
    "iwlora_mnli": {"regulariser.warmup_steps": 4},
    "graff_gsm8k": {"schedule.graff.regret": "step"},  # the paper's regret depends on the clock
}


def run_preset(preset: str, folder: Path) -> dict[str, Any]:
    """{losses, sha256, steps} of one preset, stopped at its first checkpoint and resumed."""
    from fastpeft import load_run, train
    from fastpeft.trainer import StopRequest

    run, stop = load_run(preset, **OVERRIDES, **OWN.get(preset, {})), StopRequest()

    class StopAtCheckpoint:
        def say(self, message: str) -> None: ...

        def on_event(self, event: dict[str, Any]) -> None:
            if event["type"] == "checkpoint" and stop.signal is None:
                stop.signal = signal.SIGTERM

    first = train(run, results_dir=folder, name=preset, reporter=StopAtCheckpoint(), stop=stop)
    assert first.status == "stopped", first.status
    result = train(run, results_dir=folder, name=preset, resume=True)
    assert (result.status, result.steps) == ("done", NUM_STEPS), result
    events = map(json.loads, (folder / preset / "events.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if event["type"] == "step"]
    weights = next(path for path in (folder / preset / "adapter", folder / preset / "model") if path.is_dir())
    return {"steps": result.steps, "losses": losses, "sha256": weights_sha256(weights)}


def weights_sha256(folder: Path) -> str:
    """Digest of all tensors in a folder's safetensors files, by name, so that the file layout does not matter."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """First difference in words; None if all results are the same."""
    for step, (before, after) in enumerate(zip(then["losses"], now["losses"])):
        if before != after:
            return f"the loss of step {step} was {before!r} and is {after!r}"
    if len(then["losses"]) != len(now["losses"]):
        return f"{len(then['losses'])} losses were logged, and {len(now['losses'])} are"
    return None if then["sha256"] == now["sha256"] else "the final weights are others"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    args = parser.parse_args()
    recorded = json.loads(args.file.read_text()) if args.action == "check" else {}
    found, num_wrong = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.presets:
            found[preset] = run_preset(preset, Path(folder))
            wrong = difference(recorded[preset], found[preset]) if args.action == "check" else None
            num_wrong += wrong is not None
            print(
                f"{preset:16} {found[preset]['sha256'][:16]} {wrong or ('same' if recorded else 'recorded')}",
                flush=True,
            )
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
