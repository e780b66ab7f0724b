"""Several runs on one axis, and what came out of them."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, Footer, Static
from textual.widgets.data_table import ColumnKey

from fastpeft.compare.comparison import Comparison, compare
from fastpeft.runs.store import MAJORITY, RunFolder
from fastpeft.tui import cells
from fastpeft.tui.format import decimal, duration, short, shortened
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.screens.screen import RunsKeys
from fastpeft.tui.tail import RunTail
from fastpeft.tui.theme import curve_color
from fastpeft.tui.widgets.plot import Curve, LinePlot
from fastpeft.tui.widgets.text import Lines

DRAW_EVERY_S = 0.25
MAX_RUNS = 24
SMOOTHING = 0.9
"""At first: several curves of single steps hide each other."""
_FIRST = (
    "eval/loss",
    "lr",
    "tokens_per_s",
    "energy_j",
    "power_w",
    "penalty",
    "grad_norm",
)
_COLUMNS = (("", 3), ("run", 26), ("status", 10), ("now", 8), ("best", 7), ("time", 7), ("energy", 8), ("seed", 6))
_PARTS = Binding.Group("Parts", compact=True)


class CompareTable(DataTable):
    """Which run is which line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False, id="legend.down"),
        Binding("k", "cursor_up", "Up", show=False, id="legend.up"),
        Binding("g", "scroll_top", "First", show=False, id="legend.first"),
        Binding("G", "scroll_bottom", "Last", show=False, id="legend.last"),
    ]


class CompareScreen(RunsKeys):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "metric(1)", "Metric", tooltip="Draw the next quantity that was measured", id="compare.metric"),
        Binding("M", "metric(-1)", "Metric before", show=False, id="compare.metric_back"),
        Binding("space", "hide", "Hide", tooltip="Hide or show a run", show=False, id="compare.hide"),
        Binding("t", "colors", "Colours", tooltip="A colour a run, or a method", show=False, id="compare.colors"),
        Binding("enter", "open", "Open", show=False, id="compare.open"),
        Binding("1", "part('overlay')", "Curves", group=_PARTS, id="compare.curves"),
        Binding("2", "part('lines')", "Runs", group=_PARTS, id="compare.runs"),
        Binding("3", "part('results')", "Results", group=_PARTS, id="compare.results"),
        Binding("escape", "back", "Back", id="compare.back"),
    ]  # fmt: skip

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names[:MAX_RUNS]
        self.num_left_out = len(names) - len(self.names)
        self.metric = "loss"
        self.hidden: set[str] = set()
        self.by_method = False
        self._smoothing = {False: SMOOTHING, True: 0.0}
        """Of the quantities measured at each step, and of those at evaluations."""
        self._tails: dict[str, RunTail] = {}
        self._comparison = Comparison(None, [], {})
        self._drawn: object = None

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        with Vertical(id="compare"):
            yield LinePlot(id="overlay")
            yield CompareTable(id="lines", cursor_type="row", cell_padding=0, cursor_foreground_priority="renderable")
            with VerticalScroll(id="results", can_focus=True):
                yield Static(id="comparison")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        self._tails = {name: self.app.tail(name) for name in self.names}
        legend = self.query_one(CompareTable)
        for label, width in _COLUMNS:
            right = label in ("now", "best", "time", "energy", "seed")
            legend.add_column(Text(label.rjust(width - 1) if right else label), key=label or "line", width=width)
        for name in self.names:
            legend.add_row(*[""] * len(_COLUMNS), key=name)
        self.query_one("#overlay", LinePlot).smoothing = SMOOTHING
        self.action_part("overlay")
        self._follow()
        self._compare()

    def target(self) -> str | None:
        row = self.query_one(CompareTable).cursor_row
        return self.names[row] if 0 <= row < len(self.names) else None

    # ---- reading ---------------------------------------------------------------------------

    @work(group="follow")
    async def _follow(self) -> None:
        """All logs in turn, so that each gets its share of the time."""
        stale = True
        while True:
            for tail in list(self._tails.values()):
                stale |= await asyncio.to_thread(tail.poll, 0.02)
            if stale and self.is_current:
                self.draw_again()
                stale = False
            await asyncio.sleep(DRAW_EVERY_S)

    @work(group="compare", exclusive=True)
    async def _compare(self) -> None:
        comparison = await asyncio.to_thread(self._read_results)
        if comparison != self._comparison:
            self._comparison = comparison
            self.draw_again()

    def _read_results(self) -> Comparison:
        found = [RunFolder(self.app.results_dir / name).read_result() for name in self.names]
        return compare([result for result in found if result is not None])

    def rows_changed(self) -> None:
        self.draw_again()
        if self.is_current:
            self._compare()

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self.draw_again)

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw_again)

    # ---- drawing ---------------------------------------------------------------------------

    def draw(self) -> None:
        plot = self.query_one("#overlay", LinePlot)
        plot.title = self.metric.removeprefix("eval/") if self.metric != "eval/loss" else "validation loss"
        colors = self.line_colors()
        width = 18 if self.size.width < 110 else 30
        plot.show(
            [
                Curve(shortened(name, width), tail.series[self.metric], colors[name])
                for name, tail in self._tails.items()
                if name not in self.hidden and self.metric in tail.series
            ]
        )
        self._draw_title()
        self._draw_legend()
        if self._drawn != (drawn := (self._comparison, self.size.width)):
            self._drawn = drawn
            self.query_one("#comparison", Static).update(_comparison(*drawn))

    def metrics(self) -> list[str]:
        """What some run has measured."""
        there = {name for tail in self._tails.values() for name in tail.series if not name.startswith("system/")}
        scores = {f"eval/{row.metric_name}" for row in self.app.rows if row.name in self._tails}
        first = ["loss", *sorted(scores), *_FIRST]
        return [*(n for n in first if n in there), *sorted(there - {*first, "tokens"})] or ["loss"]

    def line_colors(self) -> dict[str, str]:
        rows = {row.name: row for row in self.app.rows}
        if not self.by_method:
            return {name: curve_color(i) for i, name in enumerate(self.names)}
        methods = list(dict.fromkeys(rows[name].method for name in self.names if name in rows))
        return {
            name: curve_color(methods.index(rows[name].method)) if name in rows else "#999999" for name in self.names
        }

    def _draw_title(self) -> None:
        text = Text.assemble(("compare", "bold"), f"  {len(self.names)} runs")
        if self.num_left_out:
            text.append(f", {self.num_left_out} more left out: mark fewer", style="bold")
        reading = [tail for tail in self._tails.values() if not tail.is_caught_up]
        if reading:
            text.append(f"  reading {len(reading)}", style="bold")
        if any(row.stand_in for row in self.app.rows if row.name in self._tails):
            text.append("  ").append_text(cells.stand_in_badge())
        if len({row.metric_name for row in self.app.rows if row.name in self._tails} - {""}) > 1:
            text.append("  several metrics: their values do not compare", style="#E69F00")
        self.query_one("#title", Lines).show(text)

    def _draw_legend(self) -> None:
        legend, colors = self.query_one(CompareTable), self.line_colors()
        rows = {row.name: row for row in self.app.rows}
        for i, name in enumerate(self.names):
            row = rows.get(name)
            line = Text.assemble(("  " if name in self.hidden else "━━", colors[name]))
            wanted = [line, Text(shortened(name, _COLUMNS[1][1] - 1)), *self._facts(row, self._tails[name])]
            for column, new in zip(legend.ordered_columns, wanted):
                if legend.get_row_at(i)[column_index(legend, column.key)] != new:
                    legend.update_cell(name, column.key, new)

    def _facts(self, row: RunRow | None, tail: RunTail) -> list[Text]:
        if row is None:
            return [Text("deleted"), *[Text("")] * 5]
        series = tail.series.get(self.metric)
        texts = (
            decimal(series.last if series is not None else None),
            decimal(cells.best_of(row)),
            duration(row.elapsed_s),
            short(row.energy_j, "J"),
            "-" if row.seed is None else str(row.seed),
        )
        numbers = [Text(text.rjust(width - 1)) for text, (_, width) in zip(texts, _COLUMNS[3:])]
        return [cells.status_badge(row.status), *numbers]

    # ---- keys ------------------------------------------------------------------------------

    def action_metric(self, by: int) -> None:
        there, plot = self.metrics(), self.query_one("#overlay", LinePlot)
        self._smoothing[self.metric.startswith("eval/")] = plot.smoothing
        self.metric = there[(there.index(self.metric) + by) % len(there)] if self.metric in there else there[0]
        plot.smoothing = self._smoothing[self.metric.startswith("eval/")]
        self.draw()

    def action_hide(self) -> None:
        name = self.target()
        if name is not None:
            self.hidden ^= {name}
            self.draw()

    def action_colors(self) -> None:
        self.by_method = not self.by_method
        self.draw()

    def action_part(self, part: str) -> None:
        for name in ("overlay", "lines", "results"):
            self.set_class(name == part, f"-{name}")
        self.query_one(f"#{part}").focus()

    def on_data_table_row_selected(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        name = self.target()
        if name is not None:
            self.app.open_run(name)

    def action_back(self) -> None:
        self.dismiss()


def column_index(table: DataTable, key: ColumnKey) -> int:
    return [column.key for column in table.ordered_columns].index(key)


def _comparison(comparison: Comparison, width: int) -> Table | Text:
    """Means over seeds with 95 % t-intervals, and differences from the baseline paired by seed."""
    rows = comparison.rows
    if not rows:
        return Text("no result with a metric yet", style="dim")
    minus = f"minus {comparison.baseline}" if comparison.baseline else "difference"
    scores = {"metric": [row.metric for row in rows], "best": [row.best for row in rows]}
    scores |= {"test": [row.test for row in rows]} if any(row.test for row in rows) else {}
    if width < 110:  # only what is compared
        scores = {comparison.by: scores[comparison.by]}
    else:
        minus += f" ({comparison.by})"
    if width < 170 and comparison.by == "test":
        scores.pop("metric", None)
    columns = {
        "method": [row.label for row in rows],
        "seeds": [row.metric.count for row in rows],
        **scores,
        MAJORITY: [row.majority for row in rows],
        minus: [row.minus_baseline for row in rows],
        "AUC": [row.auc.get("seconds") for row in rows],
        "time": [duration(row.seconds.value) for row in rows],
        "energy": [short(row.joules.value, "J") if row.joules else None for row in rows],
        "task": [row.task for row in rows],
    }
    for name in ("AUC", MAJORITY):
        if width < 110 or not any(columns[name]):
            del columns[name]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, header_style="dim", no_wrap=name not in ("method", "task"))
    for values in zip(*columns.values()):
        table.add_row(*("-" if value is None else str(value) for value in values))
    for label, mean in comparison.glue.items():
        left = ["-"] * (len(columns) - 4)
        table.add_row(label, str(mean.count), str(mean), *left, "GLUE average", style="bold")
    return table
