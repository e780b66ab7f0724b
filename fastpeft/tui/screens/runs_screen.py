"""Every run of the results folder."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import DataTable, Footer, Input

from fastpeft.tui import cells
from fastpeft.tui.format import amount, decimal, duration, fitted, headed, joined, short, shortened, sparkline
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.screens.screen import RESUME, STOP, RunsKeys
from fastpeft.tui.series import Series
from fastpeft.tui.theme import NOTE, SPARK
from fastpeft.tui.widgets.plot import Curve, LinePlot
from fastpeft.tui.widgets.text import Lines

EMPTY = """\
No runs in {folder} yet.

n starts one from a preset.

In another terminal:
fastpeft train --run iwlora_mnli --results-dir {folder}

It shows up here as soon as it trains."""


_MARGINS = 5
"""Cells not used by the table's columns: padding, marks and a scroll bar."""


class RunsTable(DataTable):
    """A table with a pager's keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False, id="list.down"),
        Binding("k", "cursor_up", "Up", show=False, id="list.up"),
        Binding("g", "scroll_top", "First", show=False, id="list.first"),
        Binding("G", "scroll_bottom", "Last", show=False, id="list.last"),
    ]


class RunsScreen(RunsKeys):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", id="runs.open"),
        Binding("T", "stop", "Stop", tooltip=STOP, id="run.stop"),
        Binding("R", "resume", "Resume", tooltip=RESUME, id="run.resume"),
        Binding("n", "new", "New", tooltip="Start a run", id="runs.new"),
        Binding("space,m", "mark", "Mark", key_display="space", tooltip="Mark the run, to compare it", id="runs.mark"),
        Binding("c", "compare", "Compare", tooltip="Compare what is marked, or all", id="runs.compare"),
        Binding("slash", "filter", "Filter", key_display="/", id="runs.filter"),
        Binding("greater_than_sign", "sort(1)", "Sort", key_display=">", tooltip="Sort otherwise", id="runs.sort"),
        Binding("less_than_sign", "sort(-1)", "Sort back", key_display="<", show=False, id="runs.sort_back"),
        Binding("i", "invert", "Invert the order", show=False, id="runs.invert"),
        Binding("t", "group", "Group", tooltip="Seeds of a run under one line", show=False, id="runs.group"),
        Binding("u", "unmark", "Unmark all", show=False, id="runs.unmark"),
        Binding("escape", "clear", "Clear the filter", show=False, id="runs.clear"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.sort_by, self.descending = "created", True
        self.group = True
        self.folded: set[str] = set()
        self._lines: dict[str, RunRow | cells.Group] = {}
        self._cells: dict[str, list[Text]] = {}
        self._columns = cells.COLUMNS
        """The visible columns."""
        self._sorts = cells.sorts(cells.COLUMNS)
        self._breadth = 0
        self._drawn: object = None

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        yield RunsTable(id="runs", cursor_type="row", cell_padding=0, cursor_foreground_priority="renderable")
        yield Lines(id="empty")
        with Horizontal(id="preview"):
            yield Lines(id="facts")
            yield LinePlot("loss, sampled", axis="steps", id="spark")
        yield Input(id="filter", placeholder="words of a run's name, method, model, data or status", compact=True)
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.query_one("#preview").display = False
        self.query_one("#spark").can_focus = False
        self.query_one(RunsTable).focus()
        self.draw()

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw_again)

    def on_screen_resume(self) -> None:
        self.draw()

    # ---- drawing ---------------------------------------------------------------------------

    def lines(self) -> list[RunRow | cells.Group]:
        """The listed lines, in order."""
        found = cells.matching(self.app.rows, self.query_one("#filter", Input).value)
        found = cells.ordered(found, self.sort_by, self.descending)
        return cells.grouped(found, self.folded) if self.group else list(found)

    def draw(self) -> None:
        self._breadth = 2 if self.size.width >= 170 else 1 if self.size.width >= 110 else 0
        there = cells.columns_of(self.app.rows)
        self._sorts = cells.sorts(there)
        self._columns = cells.fitting(there, self._breadth, self.size.width - _MARGINS)
        if self.sort_by not in self._sorts:
            self.sort_by = "created"
        lines = self.lines()
        self._lines = {line.key if isinstance(line, cells.Group) else line.name: line for line in lines}
        self._fill({key: self._row(line) for key, line in self._lines.items()})
        has_runs = bool(self.app.rows)
        self.query_one(RunsTable).display = has_runs
        empty = self.query_one("#empty", Lines)
        empty.display = not has_runs
        if not has_runs:
            empty.show(Text(EMPTY.format(folder=self.app.results_dir)))
        self._draw_title(len(lines))
        self._draw_preview()

    def _row(self, line: RunRow | cells.Group) -> list[Text]:
        if isinstance(line, cells.Group):
            marked = all(row.name in self.app.marked for row in line.rows)
            return [_mark(marked), *cells.group_cells(line, self._columns, self._breadth)]
        indent = "  " if self.group and line.group is not None else ""
        return [_mark(line.name in self.app.marked), *cells.cells(line, self._columns, self._breadth, indent)]

    def _fill(self, drawn: dict[str, list[Text]]) -> None:
        """Update the changed cells; if the lines or their order have changed, all cells."""
        table = self.query_one(RunsTable)
        header = self._header()
        layout = (self._breadth, self._columns)
        if layout != self._drawn or not table.columns:
            self._drawn = layout
            table.clear(columns=True)
            self._cells = {}
            table.add_column(header[0], key="mark", width=2)
            for column, label in zip(self._columns, header[1:]):
                table.add_column(label, key=column.key, width=column.width[self._breadth] + 1)  # and a space
        for column, label in zip(table.ordered_columns, header):
            column.label = label
        if list(drawn) == list(self._cells):
            for key, row in drawn.items():
                for column, old, new in zip(table.ordered_columns, self._cells[key], row):
                    if old != new:
                        table.update_cell(key, column.key, new)
            self._cells = drawn
            return
        at, before, scroll_y = self.current, table.cursor_row, table.scroll_y
        table.clear()
        for key, row in drawn.items():
            table.add_row(*row, key=key)
        self._cells = drawn
        if drawn:
            row = list(drawn).index(at) if at in drawn else min(before, len(drawn) - 1)
            table.move_cursor(row=row, animate=False, scroll=False)
            table.scroll_to(y=scroll_y, animate=False)

    def _header(self) -> list[Text]:
        out = [Text("")]
        for column in self._columns:
            arrow = ("▼" if self.descending else "▲") if column.key == self.sort_by else ""
            label = f"{arrow}{column.label}" if column.right else f"{column.label}{arrow}"
            width = column.width[self._breadth]
            out.append(Text(label.rjust(width) if column.right else label, style="bold" if arrow else ""))
        return out

    def _draw_title(self, num_lines: int) -> None:
        app = self.app
        running = sum(row.status == "running" for row in app.rows)
        width, words = self.size.width - 2, self.query_one("#filter", Input).value
        parts = [
            Text("fastpeft", "bold"),
            f"{_count(len(app.rows), 'run')}, {running} running",
            Text(f"{len(app.marked)} marked" if app.marked else "", "bold"),
            Text(f"/{shortened(words, width // 3)}: {_count(num_lines, 'line')}" if words else "", "bold"),
            Text(self._order(), "dim"),
        ]
        room = width - joined(parts).cell_len - 2
        if room >= 12:
            parts.append(Text(shortened(str(app.results_dir), room), "dim"))
        lines = [fitted(parts, width)]
        for launch in app.starting:
            said = launch.text(2000).splitlines()
            lines.append(Text(f"● starting {launch.name}: {said[-1] if said else 'python is loading'}", SPARK))
            lines[-1].truncate(width, overflow="ellipsis")
        self.query_one("#title", Lines).show(Text("\n").join(lines))

    def _order(self) -> str:
        """The sort order in words, if no column's heading shows it."""
        if self.sort_by == "created":
            return "newest first" if self.descending else "oldest first"
        if self.sort_by in [column.key for column in self._columns]:
            return ""
        return f"by {self.sort_by}, {'falling' if self.descending else 'rising'}"

    def _draw_preview(self) -> None:
        line = self._lines.get(self.current or "")
        preview = self.query_one("#preview")
        preview.display = isinstance(line, RunRow)
        if not isinstance(line, RunRow):
            return
        tall = self.size.height >= 34
        room = self.size.width // 2 - 4 if tall else self.size.width - 2
        self.query_one("#facts", Lines).show(_facts(line, room) if tall else _strip(line, room))
        if tall:
            losses = np.array(line.sparkline)
            at = np.arange(1, len(losses) + 1) / max(len(losses), 1) * (line.steps or 0)
            self.query_one("#spark", LinePlot).show([Curve("loss", Series.of(at, losses))] if line.sparkline else [])

    # ---- the line under the cursor ---------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The key of the line under the cursor."""
        keys, row = list(self._cells), self.query_one(RunsTable).cursor_row
        return keys[row] if 0 <= row < len(keys) else None

    def target(self) -> str | None:
        line = self._lines.get(self.current or "")
        return line.name if isinstance(line, RunRow) else None

    def on_data_table_row_highlighted(self) -> None:
        self._draw_preview()

    def on_data_table_row_selected(self) -> None:
        self.action_open()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        key = event.column_key.value
        if key == self.sort_by:
            self.action_invert()
        elif key in self._sorts:
            self.sort_by = key
            self.draw()

    # ---- keys ------------------------------------------------------------------------------

    def action_open(self) -> None:
        line = self._lines.get(self.current or "")
        if isinstance(line, cells.Group):
            self.folded ^= {line.name}
            self.draw()
        elif line is not None:
            self.app.open_run(line.name)

    def action_new(self) -> None:
        self.app.start_run()

    def action_mark(self) -> None:
        line = self._lines.get(self.current or "")
        if line is None:
            return
        names = [row.name for row in line.rows] if isinstance(line, cells.Group) else [line.name]
        marked = self.app.marked
        if all(name in marked for name in names):
            for name in names:
                del marked[name]
        else:
            marked |= dict.fromkeys(names)
        self.query_one(RunsTable).action_cursor_down()
        self.draw()

    def action_unmark(self) -> None:
        self.app.marked.clear()
        self.draw()

    def action_compare(self) -> None:
        there = [row.name for row in self.app.rows]
        names = [name for name in self.app.marked if name in there]
        shown = [line for line in self._lines.values() if isinstance(line, RunRow)]
        names = names or [row.name for row in shown]
        if names:
            self.app.compare(names)
        else:
            self.app.bell()

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_clear(self) -> None:
        field = self.query_one("#filter", Input)
        field.value, field.display = "", False
        self.query_one(RunsTable).focus()

    def on_input_changed(self) -> None:
        self.draw()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.input.display = bool(event.value)
        self.query_one(RunsTable).focus()

    def action_sort(self, by: int) -> None:
        there = self._sorts
        self.sort_by = there[(there.index(self.sort_by) + by) % len(there)]
        self.draw()

    def action_invert(self) -> None:
        self.descending = not self.descending
        self.draw()

    def action_group(self) -> None:
        self.group = not self.group
        self.draw()


def _count(num: int, what: str) -> str:
    return f"{num} {what}" if num == 1 else f"{num} {what}s"


def _mark(marked: bool) -> Text:
    return Text("▌" if marked else " ", style=NOTE)


def _budget(row: RunRow) -> str:
    if row.budget_limit is None:
        return "-"
    spent = amount(row.budget_spent or 0.0, row.budget_kind)
    return f"{spent} of {amount(row.budget_limit, row.budget_kind)}{' steps' if row.budget_kind == 'steps' else ''}"


def _strip(row: RunRow, width: int) -> Text:
    """Two lines with the facts that a narrow terminal's columns leave out."""
    badge = [cells.stand_in_badge()] if row.stand_in else []
    second = [
        "" if row.test is None else f"test {decimal(row.test)}",
        "" if row.tokens_per_s is None else f"{short(row.tokens_per_s)} tok/s",
        "" if row.energy_j is None else short(row.energy_j, "J"),
        "" if row.budget_limit is None else _budget(row),
        Text(sparkline(row.sparkline, 24), SPARK),
    ]
    if not any(second):
        second = ["nothing is logged yet"]
    first = headed(row.name, badge, cells.method_and_where(row), width)
    return Text("\n").join([first, fitted(second, width)])


def _facts(row: RunRow, width: int) -> Text:
    """One fact per line."""
    badges = [cells.status_badge(row.status), cells.stand_in_badge() if row.stand_in else ""]
    out = headed(row.name, badges, "", width)
    seed = "" if row.seed is None else f", seed {row.seed}"
    test = "" if row.test is None else f", test {decimal(row.test)}"
    facts = {
        "method": f"{row.method}{seed}",
        "model": row.model,
        "data": row.dataset,
        "budget": _budget(row) + ("" if row.eta_s is None else f", {duration(row.eta_s)} left"),
        row.metric_name or "metric": f"{decimal(row.metric)}, best {decimal(cells.best_of(row))}{test}",
        "loss": decimal(row.last_loss),
        "speed": f"{short(row.tokens_per_s)} tok/s, {row.steps or 0:,} steps in {duration(row.elapsed_s)}",
        "energy": "not measured" if row.energy_j is None else f"{short(row.energy_j, 'J')} ({row.energy_method})",
    }
    for key, value in facts.items():
        label = f"{shortened(key, 9):<10}"
        out.append(f"\n{label}", style="dim").append(shortened(value, width - len(label)))
    return out
