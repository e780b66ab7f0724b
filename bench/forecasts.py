"""Error of forecasts of a run's final loss from the first part of its curve: several methods on the same runs.

    python bench/forecasts.py RUN... [--at 0.25,0.5,0.75] [--json OUT]

RUN is the folder of a run at a constant learning rate with several evaluations. The forecast is of the final loss: for
training the mean of the last tenth of the steps, for validation the last evaluation. FoT (fastpeft.schedules.forecast)
uses `blocks of 16, no floor`; the paper claims a median error under 3 %.

blocks of 16   means of 16 steps each
log-spaced     means of at most 24 groups of steps whose borders are a constant factor apart
validation     the evaluations
no floor       a (t + b)^-alpha
floor          c + a (t + b)^-alpha
last           constant at the last point
plateau        `last` where the losses of the last third do not fall (Mann and Kendall's test, 5 %), else `floor`
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.stats import kendalltau

from bench.report import json_path, print_table, write_json
from fastpeft.compare.history import read_history
from fastpeft.errors import UserError
from fastpeft.runs.events import number, read_lines
from fastpeft.runs.store import RunFolder
from fastpeft.schedules.power_law import fit_power_law

BLOCK = 16
NUM_GROUPS = 24
LAST_SHARE = 0.1
LEVEL = 0.05
Curve = tuple[np.ndarray, np.ndarray]
"""Steps, from 1, and losses."""


def blocks(curve: Curve) -> Curve:
    count = len(curve[0]) // BLOCK
    return tuple(column[: count * BLOCK].reshape(count, BLOCK).mean(1) for column in curve)  # type: ignore[return-value]


def log_spaced(curve: Curve) -> Curve:
    t_N, loss_N = curve
    borders = np.unique(np.geomspace(1, len(t_N) + 1, NUM_GROUPS + 1).round().astype(int)) - 1
    parts = [slice(a, b) for a, b in pairwise(borders)]
    return np.array([t_N[part].mean() for part in parts]), np.array([loss_N[part].mean() for part in parts])


def law(with_floor: bool) -> Callable[[Curve, float], float]:
    def forecast(points: Curve, end: float) -> float:
        fitted = fit_power_law(*points, now=float(points[0][-1]), with_floor=with_floor)
        return float("nan") if fitted is None else fitted(end)

    return forecast


def last(points: Curve, end: float) -> float:
    return float(points[1][-1])


def plateau(points: Curve, end: float) -> float:
    t_N, loss_N = (column[-max(4, len(column) // 3) :] for column in points)
    found = kendalltau(t_N, loss_N, alternative="less")
    return law(True)(points, end) if found.pvalue < LEVEL else last(points, end)


POINTS: dict[str, Callable[[Curve], Curve]] = {
    f"blocks of {BLOCK}": blocks,
    "log-spaced": log_spaced,
    "validation": lambda curve: curve,
}
FORMS = {"no floor": law(False), "floor": law(True), "last": last, "plateau": plateau}


def curves_of(folder: Path) -> dict[str, Curve]:
    """`training` and `validation`.

    Raises:
        UserError: no run, or too few training steps or evaluations.
    """
    events = RunFolder(folder).events
    if not events.is_file():
        raise UserError(f"{folder}: no run is there; give the folder of one")
    history = read_history(read_lines(events))
    found = [(number(event["step"]), number(event["loss"])) for event in history.validations]
    if len(history) < 8 * BLOCK or len(found) < 8:
        raise UserError(
            f"{folder}: {len(history)} steps and {len(found)} evaluations; a forecast takes {8 * BLOCK} and 8, so set "
            "evaluation.every=5%"
        )
    training = np.arange(1.0, len(history) + 1), history.steps["loss"]
    return {"training": training, "validation": tuple(np.array(found).T)}  # type: ignore[dict-item]


def errors(curves: dict[str, Curve], share: float) -> dict[tuple[str, str], float]:
    """(points, form) -> |forecast - loss| / loss, for the forecast from the first `share` of the run."""
    found = {}
    for points, thinned in POINTS.items():
        t_N, loss_N = curves["validation" if points == "validation" else "training"]
        end = float(t_N[-1])
        tail = 1 if points == "validation" else max(1, round(LAST_SHARE * len(loss_N)))
        wanted = float(loss_N[-tail:].mean())
        known = t_N <= share * end
        for form, forecast in FORMS.items():
            found[points, form] = abs(forecast(thinned((t_N[known], loss_N[known])), end) - wanted) / wanted
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--at", type=lambda text: [float(part) for part in text.split(",")], default=[0.25, 0.5, 0.75])
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args(argv)
    try:
        curves = [curves_of(folder) for folder in options.runs]
    except UserError as error:
        parser.error(str(error))
    of: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for share in options.at:
        for key in (found := [errors(one, share) for one in curves])[0]:
            of[key].append([own[key] for own in found])
    lines = [
        [*key, *(f"{statistics.median(own):.1%} ({max(own):.0%})" for own in values)] for key, values in of.items()
    ]
    places = [f"after {share:.0%}" for share in options.at]
    print_table(f"error of the last loss, median (largest) of {len(curves)} runs", ["points", "form", *places], lines)
    if options.json:
        rows = [{"points": p, "form": f, "errors": values} for (p, f), values in of.items()]
        write_json(options.json, {"runs": [folder.name for folder in options.runs], "at": options.at, "rows": rows})


if __name__ == "__main__":
    main()
