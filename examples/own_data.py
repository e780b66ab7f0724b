"""Rows of one's own: a folder with train.jsonl and dev.jsonl, and what the columns mean.

python examples/own_data.py --budget 30s
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import fastpeft

OPINIONS = {
    "good": ["I liked it", "works well", "a fine product"],
    "bad": ["broke at once", "never again", "a poor product"],
}
SUBJECTS = ["The kettle", "This lamp", "My phone", "The chair", "That book"]


def write(path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            verdict = rng.choice(list(OPINIONS))
            row = {"review": f"{rng.choice(SUBJECTS)}: {rng.choice(OPINIONS[verdict])}", "verdict": verdict}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="30s")
    parser.add_argument("--model", help="a folder or a name on the hub; a small encoder of the package's when absent")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    folder = arguments.results_dir / "own-data"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", 400, seed=0)
    write(folder / "dev.jsonl", 100, seed=1)

    run = fastpeft.load_run(
        "lora_mnli",
        budget=arguments.budget,
        model={"name": arguments.model or "embedded/deberta-tiny"},
        dataset={"name": "reviews", "path": str(folder), "columns": {"text": "review", "label": "verdict"}},
        adapter={"target_modules": "all-linear"},
        training={"learning_rate": 3e-3, "threads": 1},
        schedule={"warmup_steps": 5},
    )
    result = fastpeft.train(run, results_dir=arguments.results_dir, name="reviews")
    print(f"{result.metric['name']} {result.metric['value']:.3f} on {', '.join(result.labels)}")


if __name__ == "__main__":
    main()
