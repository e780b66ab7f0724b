"""Rows in files of every format that is read, and a small task made of them."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from fastpeft.config.schema import DatasetConfig


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """In the format that the path's suffix names."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
        return path
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def config(path: Path, **fields) -> DatasetConfig:
    return DatasetConfig(path=str(path), **fields)


def folder_of(folder: Path, train: list[dict], dev: list[dict] | None = None) -> Path:
    """`folder` with train.jsonl and dev.jsonl, which have the same rows where `dev` is not given."""
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "dev.jsonl", dev or train)
    return folder


def write_equal_pairs(folder: Path, num_train: int = 96, num_dev: int = 32, seed: int = 0) -> Path:
    """`train.jsonl` and `dev.jsonl` of pairs of sentences; the label is whether the two are equal."""
    rng = random.Random(seed)
    words = ["dog", "cat", "bird", "every", "some", "no", "ran", "slept", "the", "a"]
    for name, count in (("train", num_train), ("dev", num_dev)):
        rows = []
        for i in range(count):
            text = " ".join(rng.choices(words, k=rng.randint(3, 12)))
            other = text if i % 2 else " ".join(rng.choices(words, k=rng.randint(3, 12)))
            rows.append({"premise": text, "hypothesis": other, "label": ["no", "yes"][i % 2]})
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder
