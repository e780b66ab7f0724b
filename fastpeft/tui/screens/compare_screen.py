"""Several runs in one plot, and a table of their results."""

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
from fastpeft.tui.format import decimal, duration, flowed, short, shortened
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.screens.screen import RunsKeys
from fastpeft.tui.tail import RunTail
from fastpeft.tui.theme import NOTE, curve_color
from fastpeft.tui.widgets.plot import Curve, LinePlot
from fastpeft.tui.widgets.text import Lines

DRAW_EVERY_S = 0.25
MAX_RUNS = 24
SMOOTHING = 0.9
"""Initial smoothing: unsmoothed curves of several runs hide each other."""
_FIRST = (
    "eval/loss",
    "lr",
    "tokens_per_s",
    "energy_j",
    "power_w",
    "penalty",
    "grad_norm",
)
_COLUMNS = {"": 4, "run": 20, "status": 11, "now": 8, "best": 8, "time": 7, "energy": 9, "seed": 6}
"""Widths of columns, including a blank."""
_RIGHT = ("now", "best", "time", "energy", "seed")
_MARKS = "123456789abcdefghijklmnopqrstuvwxyz"
_PARTS = Binding.Group("Parts", compact=True)


class CompareTable(DataTable):
    """The legend: which run is which line."""

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
        """Smoothing of per-step quantities (False), and of those measured at evaluations (True)."""
        self._tails: dict[str, RunTail] = {}
        self._comparison = Comparison(None, [], {})
        self._drawn: object = None
        self._name_width = 0
        self._is_comparing = False

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
        self._lay_legend()
        self.query_one("#overlay", LinePlot).smoothing = SMOOTHING
        self.action_part("overlay")
        self.draw()  # shows the runs before their logs are read
        self._follow()
        self._compare()

    def target(self) -> str | None:
        row = self.query_one(CompareTable).cursor_row
        return self.names[row] if 0 <= row < len(self.names) else None

    # ---- reading ---------------------------------------------------------------------------

    @work(group="follow")
    async def _follow(self) -> None:
        """Read all logs in turn, so that each gets its share of the time."""
        stale = True
        while True:
            for tail in list(self._tails.values()):
                stale |= await asyncio.to_thread(tail.poll, 0.02)
            if stale and self.is_current:
                self.draw_again()
                stale = False
            await asyncio.sleep(DRAW_EVERY_S)

    @work(group="compare")
    async def _compare(self) -> None:
        """Compute one comparison at a time: on a busy machine the first takes many seconds, and threads waiting for it
        would leave none to read the logs."""
        if self._is_comparing:
            return
        self._is_comparing = True
        try:
            comparison = await asyncio.to_thread(self._read_results)
        finally:
            self._is_comparing = False
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
        plot.show(
            [
                Curve(name, tail.series[self.metric], colors[name], mark)
                for mark, (name, tail) in zip(_MARKS, self._tails.items())
                if name not in self.hidden and self.metric in tail.series
            ]
        )
        self._draw_title()
        self._draw_legend()
        if self._drawn != (drawn := (self._comparison, self.size.width)):
            self._drawn = drawn
            self.query_one("#comparison", Static).update(_comparison(*drawn))

    def metrics(self) -> list[str]:
        """The quantities that at least one run has measured."""
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
        rows = [row for row in self.app.rows if row.name in self._tails]
        num_reading = sum(not tail.is_caught_up for tail in self._tails.values())
        unlike = len({row.metric_name for row in rows} - {""}) > 1
        parts = [
            Text("compare", "bold"),
            "1 run" if len(self.names) == 1 else f"{len(self.names)} runs",
            Text(f"{self.num_left_out} more left out: mark fewer" if self.num_left_out else "", "bold"),
            Text(f"reading {num_reading}" if num_reading else "", "bold"),
            cells.stand_in_badge() if any(row.stand_in for row in rows) else "",
            Text("several metrics: their values do not compare" if unlike else "", NOTE),
        ]
        self.query_one("#title", Lines).show(flowed(parts, self.size.width - 2))

    def _draw_legend(self) -> None:
        legend, colors = self.query_one(CompareTable), self.line_colors()
        rows = {row.name: row for row in self.app.rows}
        width = self._lay_legend()
        for i, (mark, name) in enumerate(zip(_MARKS, self.names)):
            row = rows.get(name)
            line = Text.assemble((f"  {mark}" if name in self.hidden else f"━{mark}━", colors[name]))
            wanted = [line, Text(shortened(name, width)), *self._facts(row, self._tails[name])]
            for column, new in zip(legend.ordered_columns, wanted):
                if legend.get_row_at(i)[column_index(legend, column.key)] != new:
                    legend.update_cell(name, column.key, new)

    def _lay_legend(self) -> int:
        """Lay out the legend's columns, if the names' width has changed. Returns the characters for a name."""
        legend = self.query_one(CompareTable)
        room = self.size.width - sum(_COLUMNS.values()) + _COLUMNS["run"] - 3
        width = max(_COLUMNS["run"], min(room, max(map(len, self.names)) + 2))
        if width != self._name_width:
            self._name_width, row = width, legend.cursor_row
            legend.clear(columns=True)
            for label, wide in (_COLUMNS | {"run": width}).items():
                legend.add_column(Text(label.rjust(wide - 1) if label in _RIGHT else label), key=label, width=wide)
            for name in self.names:
                legend.add_row(*[""] * len(_COLUMNS), key=name)
            legend.move_cursor(row=row, animate=False)
        return width - 1

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
        numbers = [Text(text.rjust(_COLUMNS[label] - 1)) for text, label in zip(texts, _RIGHT)]
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
    if width < 110:  # only the compared metric
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
    if len(tasks := {row.task for row in rows}) == 1 and not comparison.glue:  # the same in every row
        del columns["task"]
        table.title, table.title_style, table.title_justify = *tasks, "dim", "left"
    for name in columns:
        table.add_column(name, header_style="dim", no_wrap=name not in ("method", "task"))
    for values in zip(*columns.values()):
        table.add_row(*("-" if value is None else str(value) for value in values))
    for label, mean in comparison.glue.items():
        left = ["-"] * (len(columns) - 4)
        table.add_row(label, str(mean.count), str(mean), *left, "GLUE average", style="bold")
    return table
