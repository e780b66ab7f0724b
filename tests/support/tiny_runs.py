"""What the trainer's tests share: runs of a random BERT on pairs that it learns at once, and real child processes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from safetensors.torch import load_file

from fastpeft.config import RunConfig
from fastpeft.runs.events import Event
from fastpeft.runs.store import Result
from tests.support.run_files import load_with
from tests.support.tiny import WORDS, make_model

NUM_TRAIN, BATCH_SIZE, STEPS_PER_EPOCH = 96, 8, 12
POLL_S = 0.001


def write_pairs(folder: Path, num_train: int = NUM_TRAIN, num_dev: int = 64, seed: int = 0) -> Path:
    """The label is whether the hypothesis says good or bad."""
    rng = random.Random(seed)
    fillers = [word for word in WORDS if word not in ("good", "bad")]
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("dev", num_dev)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(count):
                premise, hypothesis = (rng.choices(fillers, k=rng.randint(2, 9)) for _ in range(2))
                hypothesis[rng.randrange(len(hypothesis))] = ["bad", "good"][i % 2]
                row = {"premise": " ".join(premise), "hypothesis": " ".join(hypothesis), "label": ["no", "yes"][i % 2]}
                file.write(json.dumps(row) + "\n")
    return folder


def write_run(folder: Path, num_dev: int = 64, num_train: int = NUM_TRAIN) -> Path:
    """Model, data and run.yaml in `folder`. Dropout is on in the model and in the adapter."""
    make_model(folder / "model", "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    write_pairs(folder / "pairs", num_train, num_dev)
    values = {
        "run_id": "tiny",
        "method": "iw_lora",
        "model": {"name": str(folder / "model")},
        "adapter": {"target_modules": "all-linear", "rank": 4, "dropout": 0.1},
        "regulariser": {"online": True, "warmup_steps": 4},
        "schedule": {"warmup_steps": 4},
        "dataset": {"path": str(folder / "pairs"), "max_length": 64},
        "training": {
            "learning_rate": 1e-2,
            "batch_size": BATCH_SIZE,
            "checkpoint_steps": 3,
            "precision": "fp32",
            "threads": 1,
        },
        "evaluation": {"every": "10steps"},
        "budget": "20steps",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def tiny_run(folder: Path, **sections: Any) -> RunConfig:
    """A run as `write_run` writes it, with settings over it: `training={"seed": 1}` or `budget="9steps"`."""
    path = folder / "run.yaml"
    if not path.is_file():
        write_run(folder)
    return load_with(path, sections)


class Listener:
    """A Reporter that keeps everything, and passes each event on to `on`."""

    def __init__(self, on: Callable[[Event], None] = lambda _: None) -> None:
        self.said: list[str] = []
        self.events: list[Event] = []
        self._on = on

    def say(self, message: str) -> None:
        self.said.append(message)

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        self._on(event)

    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events if event["type"] == "warning"]


def strict_events(folder: Path) -> list[Event]:
    """Every line of events.jsonl, each of which has to be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "events.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps_logged(folder: Path) -> list[int]:
    return [event["step"] for event in strict_events(folder) if event["type"] == "step"]


def weights(folder: Path, adapter: str = "adapter") -> dict[str, torch.Tensor]:
    """Of all files there."""
    files = sorted((folder / adapter).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def peft_accuracy(files: Path, adapter: Path) -> float:
    """Of an adapter on the development rows of a run by `write_run`, with transformers and PEFT alone."""
    rows = [json.loads(line) for line in (files / "pairs" / "dev.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    pairs = [row["premise"] for row in rows], [row["hypothesis"] for row in rows]
    inputs = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
    with torch.inference_mode():
        predicted = model(**inputs).logits.argmax(-1).tolist()
    return sum(["no", "yes"][p] == row["label"] for p, row in zip(predicted, rows)) / len(rows)


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 0
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def assert_same_outcome(a: Result, b: Result) -> None:
    """Of a run that was interrupted and one that was not."""
    for field in ("status", "metric", "best", "tokens", "steps", "budget"):
        assert getattr(a, field) == getattr(b, field), field


# ---- real processes --------------------------------------------------------------------------


def _heed_ctrl_c() -> None:
    """A shell's background job ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Child:
    """`python -m fastpeft ...`, running; its output goes to a file."""

    def __init__(self, log: Path, *args: str) -> None:
        self.log = log
        with log.open("wb") as file:
            command = [sys.executable, "-m", "fastpeft", *args]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_heed_ctrl_c)

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 90) -> None:
        """Poll until `happened`; fails if the process ends before."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self.process.poll() is None, f"ended before it was meant to:\n{self.output()}"
            assert time.monotonic() < deadline, f"never happened:\n{self.output()}"
            time.sleep(POLL_S)

    def end(self, timeout_s: float = 90) -> int:
        return self.process.wait(timeout_s)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def has_event(folder: Path, wanted: Callable[[Event], bool]) -> bool:
    """Whether a whole line of the log is an event that is `wanted`."""
    try:
        text = (folder / "events.jsonl").read_text()
    except OSError:
        return False
    return any(wanted(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n"))
