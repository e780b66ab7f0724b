"""Time of rendering and tokenising conversations over the tokenizer's own time on the same texts, in turns.

    python bench/tokenising.py --model DIR --data FILE [--template NAME] [--rows 50000] [--rounds 5] [--json OUT]

`--data` is a file in Alpaca's format (instruction, input, output). Its rows are repeated, each with its number
in front of the instruction, so that no two are the same. `tokenizer` is one call of the tokenizer for every 512
rendered texts; `fastpeft` is everything from conversations in memory to the arrays of a run, without the cache.
Both by the wall clock, with all threads of the tokenizer, and by CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.interleave import interleave, positive
from bench.report import about, json_path, write_json
from fastpeft.config.schema import DatasetConfig
from fastpeft.tasks import load_task
from fastpeft.tasks.chat.answer_spans import Renderer
from fastpeft.tasks.chat.chat_rows import ChatOptions, encode_chats
from fastpeft.tasks.chat.reading import Conversations
from fastpeft.tasks.chat.task import Chat
from fastpeft.tasks.chat.templates import ChatTemplate, choose_template

PART = 512


def conversations(data: Path, count: int) -> Conversations:
    """Conversations as a run reads them, all of them training rows."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    numbered = (
        {**rows[i % len(rows)], "instruction": f"{i}. {rows[i % len(rows)]['instruction']}"} for i in range(count)
    )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in numbered), encoding="utf-8")
        config = DatasetConfig(name="alpaca", path=str(path), validation_fraction=2 / count)
        task = load_task(config)
    assert isinstance(task, Chat)
    return task.splits.train


def alternatives(chats: Conversations, template: ChatTemplate) -> dict[str, Callable[[int], object]]:
    renderer = Renderer(template, "assistant")
    texts = [row.text for chat in chats.rows for row in renderer.render(chat).rows]
    call: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}

    def tokenizer(_: int) -> None:
        for start in range(0, len(texts), PART):
            template.tokenizer(texts[start : start + PART], **call)

    def fastpeft(_: int) -> None:
        encode_chats(chats, template, ChatOptions(max_length=4096), "training")

    return {"tokenizer": tokenizer, "fastpeft": fastpeft}


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--template", help="the model's own when absent")
    parser.add_argument("--rows", type=positive, default=50_000)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    template = choose_template(args.template, tokenizer, str(args.model))
    chats = conversations(args.data, args.rows)
    cpu_s: dict[str, list[float]] = {"tokenizer": [], "fastpeft": []}
    timed = {name: _with_cpu_time(run, cpu_s[name]) for name, run in alternatives(chats, template).items()}
    times = interleave(timed, 1, args.rounds, lambda: False, _wall_s)
    ratio, low, high = times.ratio("fastpeft", "tokenizer")
    by_cpu = median(cpu_s["fastpeft"]) / median(cpu_s["tokenizer"])
    found = {
        "rows": len(chats),
        "template": args.template,
        "seconds": {name: times.median_s(name) for name in timed},
        "cpu_seconds": {name: median(values) for name, values in cpu_s.items()},
        "ratio": ratio,
        "interval": [low, high],
        "cpu_ratio": by_cpu,
    }
    interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
    print(f"{len(chats):,} conversations: {ratio:.2f}{interval} times the tokenizer's own, {by_cpu:.2f} by CPU time")
    if args.json:
        write_json(args.json, about(torch.device("cpu")) | found)


def _with_cpu_time(run: Callable[[int], object], kept: list[float]) -> Callable[[int], object]:
    def timed(index: int) -> None:
        began = time.process_time()
        run(index)
        kept.append(time.process_time() - began)

    return timed


def _wall_s(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
