"""Record of a run's training data, stored with the run and its weights, so that changed data are detected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fastpeft.data.fingerprint import Fingerprint, differences
from fastpeft.runs.store import RunFolder, read_json, write_json

FILE = "trained_on.json"
"""In a run's folder, and beside the weights."""


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    dataset: str
    """Its name, as results have it."""
    kind: str
    """Of task, as in dataset.task."""
    labels: tuple[str, ...]
    """In the order of their numbers; empty where the task has none."""
    data: Fingerprint
    specimen: tuple[dict[str, Any], ...]
    """Task.specimen: rows that stand for the data where they are gone."""

    def write(self, folder: Path) -> None:
        values = {"dataset": self.dataset, "kind": self.kind, "labels": list(self.labels)}
        write_json(folder / FILE, values | {"data": self.data.to_json(), "specimen": list(self.specimen)})

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None where an earlier version trained, which wrote no such file."""
        values = read_json(folder / FILE)
        if values is None:
            return None
        try:
            return cls(
                dataset=values["dataset"],
                kind=values["kind"],
                labels=tuple(values["labels"]),
                data=Fingerprint.from_json(values["data"]),
                specimen=tuple(values["specimen"]),
            )
        except (KeyError, TypeError, AttributeError):
            return None

    def differing(self, now: TrainedOn) -> Iterator[str]:
        """What is other about `now`, a clause a fact; nothing where it is the same."""
        yield from _differing_labels(self.kind, self.labels, now)
        yield from differences(self.data, now.data)


def changed_since(folder: RunFolder, now: TrainedOn) -> list[str]:
    """What is other than when the run was begun, a clause a fact.

    Of a run of an earlier version, which noted no hash, its result has kind and labels at least.
    """
    noted, result = TrainedOn.read(folder.path), folder.read_result()
    if noted is not None:
        return list(noted.differing(now))
    return list(_differing_labels(result.kind, tuple(result.labels), now)) if result is not None and result.kind else []


def _differing_labels(kind: str, labels: tuple[str, ...], now: TrainedOn) -> Iterator[str]:
    if now.kind != kind:
        yield f"the task is {now.kind} and was {kind}"
    elif now.labels != labels:
        yield f"the labels are {', '.join(now.labels)} and were {', '.join(labels)}"
