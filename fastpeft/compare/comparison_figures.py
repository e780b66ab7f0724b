"""Figures of a comparison: means with intervals, every seed, and the metric over time and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpeft.compare.comparison import Comparison, Contrast, Row, mean_of
from fastpeft.compare.figure_files import INK, drawing, save, style_of
from fastpeft.compare.run_figures import CLOCK, draw_scores
from fastpeft.runs.events import Event
from fastpeft.runs.store import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"metric": "last weights, validation", "best": "best weights, validation", "test": "test"}


@dataclass(frozen=True)
class Drawn:
    """A run with the data of its curve."""

    result: Result
    label: str
    task: str
    validations: Sequence[Event]


def topics_of(runs: Sequence[Drawn]) -> list[str]:
    """Figures of a comparison of `runs`: joules only if some run was metered."""
    if not runs:
        return []
    return ["bar", "box", "seconds", *(["joules"] if any(_is_metered(run) for run in runs) else [])]


def draw_comparison(topic: str, comparison: Comparison, runs: Sequence[Drawn], folder: Path) -> str:
    """Write FOLDER/comparison_TOPIC.{pdf,png} and return its SVG."""
    labels = list(dict.fromkeys(row.label for row in comparison.rows))
    if topic == "joules":
        return _draw_over([run for run in runs if _is_metered(run)], labels, folder, topic)
    if topic == "seconds":
        return _draw_over(runs, labels, folder, topic)
    return _draw_rows(comparison, [run.result for run in runs], labels, folder, topic)


def _is_metered(run: Drawn) -> bool:
    return run.result.energy_j is not None


def _tasks(comparison: Comparison) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in comparison.rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _draw_rows(comparison: Comparison, results: Sequence[Result], labels: list[str], folder: Path, topic: str) -> str:
    """One panel per task, one line per label."""
    tasks = _tasks(comparison)
    num_lines = max(2 * sum(one is not None for one in (row.seeds_test, row.rows_test)) for row in comparison.rows)
    heights = [0.9 + max(0.42, 0.14 * num_lines) * len(rows) for rows in tasks.values()]
    what = "mean and 95 % t-interval over seeds" if topic == "bar" else "every seed: median, quartiles, range"
    with drawing(f"{_NAMES[comparison.by]}: {what}", (9.0, 0.8 + sum(heights)), results) as figure:
        grid = figure.add_gridspec(len(tasks), 2, height_ratios=heights, width_ratios=(1.0, 0.55))
        for at, (task, rows) in enumerate(tasks.items()):
            panel = figure.add_subplot(grid[at, 0])
            (_bars if topic == "bar" else _boxes)(panel, rows, labels)
            panel.set_yticks(range(len(rows)), [f"{row.label}\nn = {row.metric.count}" for row in rows])
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
            panel.set_xlabel(rows[0].measures)
            panel.set_title(task, loc="left")
            _write_contrasts(figure.add_subplot(grid[at, 1], sharey=panel), rows, comparison.baseline)
        return save(figure, folder / f"comparison_{topic}")


def _bars(panel: Axes, rows: Sequence[Row], labels: list[str]) -> None:
    """Bars start at 0, so that their length is proportional to the metric."""
    for at, row in enumerate(rows):
        values = list(row.by_seed.values())
        mean = mean_of(values)
        panel.barh(at, mean.value, height=0.6, color=style_of(labels.index(row.label))["color"], alpha=0.85)
        if mean.count > 1:
            panel.errorbar(mean.value, at, xerr=mean.half_width, color=INK, capsize=3, linewidth=1)
        panel.plot(values, np.full(len(values), at), "|", color=INK, markersize=5, alpha=0.6)


def _boxes(panel: Axes, rows: Sequence[Row], labels: list[str]) -> None:
    """Whiskers span the range: a few seeds are too few to define outliers."""
    for at, row in enumerate(rows):
        values, colour = list(row.by_seed.values()), style_of(labels.index(row.label))["color"]
        drawn = panel.boxplot(
            [values], positions=[at], orientation="horizontal", widths=0.55, whis=(0, 100), patch_artist=True,
            manage_ticks=False, medianprops={"color": INK},
        )  # fmt: skip
        drawn["boxes"][0].set(facecolor=colour, alpha=0.6)
        panel.plot(values, np.full(len(values), at), "o", color=INK, markersize=3, alpha=0.7, zorder=3)


def _write_contrasts(panel: Axes, rows: Sequence[Row], baseline: str | None) -> None:
    """Beside each line its difference from the baseline, with effect size and number of seeds or rows."""
    panel.set_axis_off()
    for at, row in enumerate(rows):
        texts = [contrast_text(one) for one in (row.seeds_test, row.rows_test) if one is not None]
        if row.label == baseline:
            texts = ["baseline"]
        panel.text(0.0, at, "\n".join(texts), va="center", fontsize=7)


def contrast_text(contrast: Contrast) -> str:
    """Two lines: difference, interval and effect size; then test, sample sizes and Holm's p."""
    ours, others = contrast.count
    unit = "rows" if contrast.test in ("McNemar", "paired bootstrap") else "seeds"
    count = f"{ours:,}" if ours == others else f"{ours:,} and {others:,}"
    interval = f" [{contrast.low:+.4f}, {contrast.high:+.4f}]" if contrast.low == contrast.low else ""
    effect = f", {contrast.effect_name} {contrast.effect:.2f}" if contrast.effect is not None else ""
    p = f", Holm's p {p_text(contrast.p_holm)}" if contrast.p_holm is not None else f", {contrast.note}"
    return f"{contrast.difference:+.4f}{interval}{effect}\n{contrast.test}, {count} {unit}{p}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _draw_over(runs: Sequence[Drawn], labels: list[str], folder: Path, unit: str) -> str:
    """Validation metric of every run over `unit`: one panel per task, one colour per label."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    over, factor, axis = ("elapsed_s", 1.0, CLOCK) if unit == "seconds" else ("energy_j", 1e-3, "energy (kJ)")
    title = f"validation metric over {'time' if unit == 'seconds' else 'energy'}, a line a run"
    with drawing(title, (7.5, 3.0 * len(tasks) + 0.6), [run.result for run in runs]) as figure:
        for panel, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks):
            counts: dict[str, int] = {}
            own = [run for run in runs if run.task == task]
            for run in own:
                counts[run.label] = counts.get(run.label, 0) + 1
            named = set()
            for run in own:
                label = None if run.label in named else f"{run.label}, n = {counts[run.label]}"
                named.add(run.label)
                draw_scores(panel, run.validations, over, factor, label, **style_of(labels.index(run.label)))
            panel.set_title(task, loc="left")
            panel.set_ylabel(str(own[0].result.metric.get("name", "metric")))
            panel.set_xlabel(axis)
            panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return save(figure, folder / f"comparison_{unit}")
