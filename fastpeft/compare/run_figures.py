"""Figures of one run, drawn only from its event log and its recorded answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpeft.compare.figure_files import COLOURS, drawing, save
from fastpeft.compare.history import History, Snapshot, binned
from fastpeft.data.predictions import Predictions
from fastpeft.runs.events import Event, number
from fastpeft.runs.store import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _Draw = Callable[[Axes, History, Result], None]

NUM_BINS = 400
MAX_CLASSES = 40
"""Limit of a confusion matrix: more classes are not readable."""
_NUMBERED_CLASSES = 12
_NUM_SHADES = 40
"""Shades of a heatmap. With 50 or more, matplotlib rasterises the colour bar."""
_SLANT = 40
"""Degrees of the names under a heatmap's columns."""
_SLANTED: dict[str, Any] = {"rotation": _SLANT, "ha": "right", "rotation_mode": "anchor"}
_WIDTH = 4.8
"""Width of a column of curves, in inches."""
_NUM_TICKS = 5
"""Maximum per axis: ticks take most of the drawing time."""
CLOCK = "time on the budget clock (s)"


def draw_curves(history: History, result: Result, stem: Path) -> str:
    """Loss, metric and learning rate over time. Metered runs add power, energy, and the metric over energy.

    Margins and label positions are fixed: measuring texts to find them would take half of the drawing time.
    """
    has_meter = result.energy_j is not None
    over_time: list[_Draw] = [_draw_loss, _draw_metric, _draw_rate]
    over_time += [_draw_power, _draw_energy] if has_meter else []
    test = f", test {number(result.test['value']):.4f}" if "value" in result.test else ""
    width, left = _WIDTH * (1 + has_meter), 0.75
    with drawing(f"{result.name}{test}", (width, 6.4), [result]) as figure:
        figure.set_layout_engine(None)
        room = {"left": left / width, "right": 1 - 0.15 / width, "top": 0.93, "bottom": 0.08}
        axes = figure.subplots(3, 1 + has_meter, squeeze=False, gridspec_kw={**room, "wspace": 0.24, "hspace": 0.36})
        for place, column in enumerate(axes.T):
            for panel in column:
                panel.locator_params(nbins=_NUM_TICKS)
                panel.yaxis.set_label_coords(-0.62 / _WIDTH, 0.5)
                panel.xaxis.set_label_coords(0.5, -0.19)
            *above, last = column[:2] if place else column
            for panel in above:
                panel.sharex(last)
                panel.tick_params(labelbottom=False)
            last.set_xlabel(CLOCK)
        for panel, draw in zip(axes.T.flat, over_time):
            draw(panel, history, result)
        if has_meter:
            _draw_metric_over_energy(axes[2, 1], history, result)
        return save(figure, stem)


def _draw_loss(panel: Axes, history: History, result: Result) -> None:
    curve = binned(history.steps["elapsed_s"], history.steps["loss"], NUM_BINS)
    if curve.per_bin > 1:
        panel.fill_between(curve.x, curve.low, curve.high, color=COLOURS[0], alpha=0.2, linewidth=0)
        said = f"mean and range of {curve.per_bin} steps"
        panel.text(0.99, 0.97, said, transform=panel.transAxes, ha="right", va="top", fontsize=8)
    panel.plot(curve.x, curve.mean, color=COLOURS[0], linewidth=1)
    panel.set_ylabel("task loss")


def _draw_metric(panel: Axes, history: History, result: Result) -> None:
    draw_scores(panel, history.validations, "elapsed_s", 1, color=COLOURS[0])
    panel.set_ylabel(f"validation {result.metric.get('name', 'metric')}")


def _draw_rate(panel: Axes, history: History, result: Result) -> None:
    rate = binned(history.steps["elapsed_s"], history.steps["lr"], NUM_BINS)
    panel.plot(rate.x, rate.mean, color=COLOURS[0], linewidth=1)
    panel.ticklabel_format(axis="y", scilimits=(-2, 3))
    panel.set_ylabel("learning rate")


def _draw_power(panel: Axes, history: History, result: Result) -> None:
    """Power from the heartbeats, or else the slope of the energy in the step events."""
    x, power = history.system["elapsed_s"], history.system["power_w"]
    if not np.isfinite(power).any():
        energy = binned(history.steps["elapsed_s"], history.steps["energy_j"], NUM_BINS)
        span = np.diff(energy.x)
        power = np.divide(np.diff(energy.mean), span, out=np.full_like(span, np.nan), where=span > 0)
        x = (energy.x[1:] + energy.x[:-1]) / 2
    curve = binned(x, power, NUM_BINS)
    panel.plot(curve.x, curve.mean, color=COLOURS[1], linewidth=1)
    panel.set_ylim(0, 1.1 * curve.mean.max() if len(curve.mean) else None)
    panel.set_ylabel("power (W)")


def _draw_energy(panel: Axes, history: History, result: Result) -> None:
    energy = binned(history.steps["elapsed_s"], history.steps["energy_j"], NUM_BINS)
    panel.plot(energy.x, energy.mean / 1000, color=COLOURS[1], linewidth=1)
    panel.set_ylabel("energy (kJ)")


def _draw_metric_over_energy(panel: Axes, history: History, result: Result) -> None:
    draw_scores(panel, history.validations, "energy_j", 1e-3, color=COLOURS[0])
    panel.set_ylabel(f"validation {result.metric.get('name', 'metric')}")
    panel.set_xlabel("energy (kJ)")


def draw_scores(
    panel: Axes, evaluations: Sequence[Event], over: str, unit: float, label: str | None = None, **style: Any
) -> None:
    """The metric of each evaluation over its field `over` times `unit`. Evaluations without the field are left out."""
    there = [event for event in evaluations if event.get(over) is not None]
    x, values = [number(event[over]) * unit for event in there], [number(event["value"]) for event in there]
    panel.plot(x, values, marker="o", markersize=3, linewidth=1, label=label, **style)


# ---- importance ----------------------------------------------------------------------------


def draw_importance(history: History, result: Result, stem: Path) -> str:
    """The last importances by layer and projection, and their drift if measured more than once."""
    first, last = history.importance[0], history.importance[-1]
    is_repeated = len(history.importance) > 1
    width, height = 8.5, 4.2
    with drawing(f"{result.name}: importance of the adapted matrices", (width, height), [result]) as figure:
        share = 0.52 if is_repeated else 1.0
        grid = _Grid.on(figure, (share * width, height - 0.3), dict.fromkeys(last.projection), map(str, last.layer))
        _draw_heatmap(grid, last)
        if is_repeated:
            left, bottom = share + 0.7 / width, 0.5 / height
            drift = figure.add_axes((left, bottom, 0.98 - left, 0.85 - bottom))
            _draw_drift(drift, history.importance, first)
        return save(figure, stem)


@dataclass(frozen=True)
class _Grid:
    """A heatmap and its colour bar, with fixed margins: measuring every text would take a third of the drawing time."""

    panel: Axes
    bar: Axes

    @classmethod
    def on(cls, figure: Figure, size: tuple[float, float], columns: Iterable[str], rows: Iterable[str]) -> _Grid:
        """A grid in the lower left `size` inches of the figure, with room for the names of its columns and rows."""
        figure.set_layout_engine(None)
        width, height = size
        below = 0.1 + min(_longest(figure, columns) * math.sin(math.radians(_SLANT)) + 0.12, 0.4 * height)
        beside = 0.1 + min(_longest(figure, rows), 0.4 * width)
        left, bottom, right, top = beside + 0.28, below + 0.25, width - 1.0, height - 0.35
        whole_width, whole_height = figure.get_size_inches()

        def axes(start: float, end: float) -> Axes:
            return figure.add_axes(
                (start / whole_width, bottom / whole_height, (end - start) / whole_width, (top - bottom) / whole_height)
            )

        panel, bar = axes(left, right), axes(right + 0.12, right + 0.26)
        panel.xaxis.set_label_coords(0.5, -below / (top - bottom))
        panel.yaxis.set_label_coords(-beside / (right - left), 0.5)
        bar.yaxis.set_label_coords(0.72 / 0.14, 0.5)
        return cls(panel, bar)

    def draw(self, values: np.ndarray, label: str, most: float) -> None:
        """Draw `values` as vector rectangles, with few enough shades that the colour bar is vector graphics too."""
        import matplotlib

        shades = matplotlib.colormaps["cividis"].resampled(_NUM_SHADES)
        rows, columns = values.shape
        at = np.arange(columns), np.arange(rows)
        cells = self.panel.pcolormesh(*at, values, shading="nearest", cmap=shades, vmin=0, vmax=most)
        self.panel.grid(visible=False)
        assert self.panel.figure is not None
        self.panel.figure.colorbar(cells, cax=self.bar, label=label)


def _longest(figure: Figure, names: Iterable[str]) -> float:
    """Width of the longest of `names` on the figure, in inches."""
    from matplotlib.text import Text

    longest = max(names, key=len, default="")
    text = Text(text=longest)
    text.set_figure(figure)
    return text.get_window_extent().width / figure.dpi


def _draw_heatmap(grid: _Grid, snapshot: Snapshot) -> None:
    layers, projections = sorted(set(snapshot.layer)), list(dict.fromkeys(snapshot.projection))
    values = np.full((len(layers), len(projections)), np.nan)
    for layer, projection, weight in zip(snapshot.layer, snapshot.projection, snapshot.weights):
        values[layers.index(layer), projections.index(projection)] = weight
    step = -(-len(layers) // 12)
    grid.draw(values, "share of the total weight", float(np.nanmax(values)))
    grid.panel.set_xticks(range(len(projections)), projections, **_SLANTED)
    grid.panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    grid.panel.set_ylabel("layer")
    grid.panel.set_title(f"after {snapshot.elapsed_s:,.0f} s")


def _draw_drift(panel: Axes, snapshots: Sequence[Snapshot], first: Snapshot) -> None:
    """Total variation distance from the first importances: the share of weight that moved to other matrices."""
    same = [one for one in snapshots if one.names == first.names]
    apart = [float(np.abs(one.weights - first.weights).sum() / 2) for one in same]
    panel.plot([one.elapsed_s for one in same], apart, marker="o", markersize=3, linewidth=1, color=COLOURS[1])
    panel.set_ylim(bottom=0)
    panel.set_ylabel("weight on other matrices than at first (share)")
    panel.set_xlabel(CLOCK)
    panel.set_title("drift")


# ---- answers -------------------------------------------------------------------------------


def classes_of(predictions: Predictions, labels: Sequence[str]) -> list[str] | None:
    """Classes of a confusion matrix, those of `labels` first; None without 2 to MAX_CLASSES classes to show."""
    answers = predictions.answers
    if not all(isinstance(one.gold, str) and isinstance(one.predicted, str) for one in answers):
        return None
    found = {name for one in answers for name in (one.gold, one.predicted)}
    names = [*(name for name in labels if name in found), *sorted(found - set(labels))]
    return names if 2 <= len(names) <= MAX_CLASSES and len(names) < len(answers) else None


def draw_confusion(predictions: Predictions, classes: list[str], result: Result, stem: Path) -> str:
    """Confusion matrix, normalised by gold class, with counts if there are few classes."""
    place = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    gold, said = ([place[getattr(one, of)] for one in predictions.answers] for of in ("gold", "predicted"))
    np.add.at(counts, (gold, said), 1)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = min(9.0, 2.4 + 0.45 * len(classes))
    title = f"{result.name}: {predictions.split}, {len(gold):,} rows"
    with drawing(title, (side + 1.2, side), [result]) as figure:
        grid = _Grid.on(figure, (side + 1.2, side), classes, classes)
        grid.draw(shares, "share of the gold class", 1.0)
        panel = grid.panel
        panel.invert_yaxis()
        panel.set_xticks(range(len(classes)), classes, **_SLANTED)
        panel.set_yticks(range(len(classes)), classes)
        panel.set_xlabel("predicted")
        panel.set_ylabel("gold")
        if len(classes) <= _NUMBERED_CLASSES:
            for (row, column), count in np.ndenumerate(counts):
                ink = "#111111" if shares[row, column] > 0.5 else "#FFFFFF"  # the background is the cell, not the page
                panel.text(column, row, f"{count:,}", ha="center", va="center", color=ink)
        return save(figure, stem)
