"""Figures of a study: the value of each trial, and the importance of each setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"
"""From the palette of Okabe and Ito, which colour-blind readers can tell apart."""
_MIN_TRIALS = 4
"""Complete trials needed to estimate importances."""


def draw_sweep(study: Study, folder: Path, metric: str, stand_in: bool) -> None:
    """Write the figures `history` and, with enough trials, `importance`, each as PDF and PNG.

    Args:
        metric: name of the trials' values, for the axes.
    """
    title = f"{study.study_name} (STAND-IN: no numbers of a real model)" if stand_in else study.study_name
    _save(_history(study, metric, title), folder / "history")
    weights = importances(study)
    if weights:
        _save(_importance(weights, metric, title), folder / "importance")


def importances(study: Study) -> dict[str, float]:
    """Importance of each key for a trial's value, the largest first (PED-ANOVA, arXiv:2304.10255). Empty if there are
    too few complete trials, or if their values are all equal or not all finite."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = {trial.value for trial in complete}
    if len(complete) < _MIN_TRIALS or len(values) < 2 or not all(math.isfinite(value or 0.0) for value in values):
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _history(study: Study, name: str, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    marks = {TrialState.COMPLETE: ("o", _BLUE, "complete"), TrialState.PRUNED: ("x", _GREY, "pruned, last evaluation")}
    for state, (mark, colour, label) in marks.items():
        trials = study.get_trials(deepcopy=False, states=(state,))
        found = {trial.number: trial.value for trial in trials if trial.value is not None}
        if found:
            panel.plot(list(found), list(found.values()), mark, color=colour, label=f"{label} (n = {len(found)})")
    numbers, best = _best_so_far(study)
    panel.step(numbers, best, where="post", color=_ORANGE, label="best so far")
    panel.set_xlabel("trial")
    panel.set_ylabel(name)
    panel.set_title(title)
    panel.legend()
    return figure


def _best_so_far(study: Study) -> tuple[list[int], list[float]]:
    better = min if study.direction == StudyDirection.MINIMIZE else max
    numbers: list[int] = []
    best: list[float] = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.value is not None and math.isfinite(trial.value):
            numbers.append(trial.number)
            best.append(better(best[-1], trial.value) if best else trial.value)
    return numbers, best


def _importance(weights: dict[str, float], name: str, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.4 * len(weights)), layout="constrained")
    panel = figure.subplots()
    keys, shares = list(weights)[::-1], list(weights.values())[::-1]
    bars = panel.barh(keys, shares, color=_BLUE)
    panel.bar_label(bars, fmt="{:.2f}", padding=3)
    panel.set_xlim(0, 1.1)
    panel.set_xlabel(f"share in the {name} of complete trials (PED-ANOVA)")
    panel.set_title(title)
    return figure


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # embeds fonts, so that text stays text
        figure.savefig(path.with_suffix(".pdf"))
        figure.savefig(path.with_suffix(".png"), dpi=150)
