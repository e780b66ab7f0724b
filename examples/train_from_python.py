"""Load a preset, change settings, train for a budget, and read the result.

python examples/train_from_python.py --budget 60s
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastpeft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="60s", help="90s, 30m, 2000steps, 5Mtok or 50kJ")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    arguments = parser.parse_args()

    run = fastpeft.load_run(
        "lora_mnli",
        budget=arguments.budget,
        training={"batch_size": 16, "seed": 1},
        schedule={"name": "wsd"},
    )
    result = fastpeft.train(run, results_dir=arguments.results_dir, name="from-python")

    print(f"{result.status} after {result.steps} steps, {result.tokens:,} tokens and {result.elapsed_s:.1f} s")
    last, best = result.metric["value"], result.best["value"]
    print(f"{result.metric['name']} of the last weights {last:.3f}, of the best {best:.3f}")
    if result.stand_in:
        print("the hub could not be reached: these are numbers of the stand-in")
    print(f"the adapter is in {arguments.results_dir / result.name / 'adapter_best'}")


if __name__ == "__main__":
    main()
