"""One run: its curves, importance heatmap, machine, events and configuration."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.syntax import Syntax
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.widgets import Footer, Static

from fastpeft.tui import forecast_band, metrics
from fastpeft.tui.answer_list import answers_text
from fastpeft.tui.format import decimal, duration, printable
from fastpeft.tui.grids import Grid, importance_grid, rates_grid
from fastpeft.tui.parse import MAX_FIGURES
from fastpeft.tui.run_title import run_title
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.screens.dialogs import Reading
from fastpeft.tui.screens.screen import RunsKeys
from fastpeft.tui.tail import RunTail
from fastpeft.tui.theme import curve_color
from fastpeft.tui.widgets.event_list import EventLog
from fastpeft.tui.widgets.heatmap import Heatmap
from fastpeft.tui.widgets.plot import Band, Curve, LinePlot
from fastpeft.tui.widgets.system_panel import SystemPanel
from fastpeft.tui.widgets.text import Lines

DRAW_EVERY_S = 0.25

PLOTS = {
    "loss": ("loss", ("loss", "eval/loss")),
    "metric": ("metric", ()),
    "penalty": ("penalty", ("penalty",)),
    "lr": ("rate", ("lr",)),
    "energy": ("energy", ("energy_j",)),
    "power": ("power", ("power_w", "system/power_w")),
    "speed": ("tokens a second", ("tokens_per_s",)),
    "grad": ("gradient", ("grad_norm",)),
    "decode": ("decoding", ("eval/decode_s",)),
}
"""Plots: title and series. Plots without values are left out. One plot for each value of the schedule follows."""
MAX_PLOTS = 8
"""Most plots shown at once."""
MAPS = {"importance": importance_grid, "multipliers": rates_grid}
"""Heatmaps of the matrices: importances, and multipliers of the learning rate."""
LABELS = {
    "eval/loss": "validation",
    "system/power_w": "device",
    "lr": "learning rate",
    "grad_norm": "norm",
    "tokens_per_s": "tok/s",
    "energy_j": "J",
    "power_w": "W",
    "eval/decode_s": "s an evaluation",
}
_PANES = Binding.Group("Panes", compact=True)


class RunScreen(RunsKeys):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "pane('curves')", "Curves", group=_PANES, id="run.curves"),
        Binding("2", "pane('importance')", "Importance", group=_PANES, id="run.importance"),
        Binding("3", "pane('events')", "Events", group=_PANES, id="run.events"),
        Binding("4", "pane('config')", "Config", group=_PANES, id="run.config"),
        Binding("5", "pane('answers')", "Answers", group=_PANES, id="run.answers"),
        Binding("left_square_bracket", "step(-1)", "Plot before", key_display="[", show=False, id="run.before"),
        Binding("right_square_bracket", "step(1)", "Next", key_display="]", tooltip="Next plot", id="run.next"),
        Binding("m", "map", "Matrices", tooltip="Importances, or factors on the rate", show=False, id="run.map"),
        Binding("p", "parts", "Parts", tooltip="Scores of parts of the data", show=False, id="run.parts"),
        Binding("f", "forecast", "Forecast", tooltip="Show or hide the forecast", show=False, id="run.forecast"),
        Binding("z", "zoom", "Maximise", tooltip="The part in focus alone, and back", show=False, id="run.zoom"),
        Binding("c", "compare", "Compare", tooltip="Compare it with the marked runs", show=False, id="run.compare"),
        Binding("escape", "back", "Back", show=False, id="run.back"),
    ]  # fmt: skip

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run
        self.pane = "curves"
        self.plot = "loss"
        """The plot that is shown if there is room for only one."""
        self.snapshot = -1
        self.map = "importance"
        self.with_forecast = True
        self._plots: dict[str, LinePlot] = {}
        self._tail: RunTail | None = None
        self._drawn_importance: object = None
        self._knows_answers = False
        self._yaml = Static(id="yaml")

    def compose(self) -> ComposeResult:
        yield Lines(id="title")
        with Container(id="panes"):
            with Container(id="curves"):
                for key, (title, _) in PLOTS.items():
                    self._plots[key] = LinePlot(title, id=f"plot_{key}")
                    yield self._plots[key]
            with Vertical(id="importance"):
                yield Heatmap("importance", id="heatmap")
            with Vertical(id="events"):
                yield SystemPanel(id="system")
                yield Lines(id="schedule")
                yield EventLog(id="log")
            with VerticalScroll(id="config", can_focus=True):
                yield self._yaml
            with VerticalScroll(id="answers", can_focus=True):
                yield Lines(id="said")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        self._tail = self.app.tail(self.run)
        self.query_one("#events").border_title = "machine and events"
        self.action_pane("curves")
        self._read_config()
        self._follow()

    def target(self) -> str | None:
        return self.run

    @property
    def row(self) -> RunRow | None:
        return next((row for row in self.app.rows if row.name == self.run), None)

    @property
    def is_roomy(self) -> bool:
        """Whether several panes are shown at once."""
        return self.size.width >= 110 and self.size.height >= 34

    @property
    def is_wide(self) -> bool:
        return self.size.width >= 170 and self.size.height >= 34

    # ---- reading ---------------------------------------------------------------------------

    @work(group="follow")
    async def _follow(self) -> None:
        tail = self._tail
        assert tail is not None
        loop, drawn_s, stale = asyncio.get_running_loop(), 0.0, True
        while True:
            stale |= await asyncio.to_thread(tail.poll)
            if stale and self.is_current and loop.time() - drawn_s >= DRAW_EVERY_S:
                self.draw_again()
                drawn_s, stale = loop.time(), False
            await asyncio.sleep(0.01 if not tail.is_caught_up else DRAW_EVERY_S)

    @work(group="config")
    async def _read_config(self) -> None:
        path = self.app.results_dir / self.run / "run.yaml"
        try:
            text = await asyncio.to_thread(path.read_text, "utf-8", "replace")
        except OSError as error:
            text = f"# {path}: {error.strerror}"
        if self.is_mounted:
            theme = "ansi_dark" if self.app.current_theme.dark else "ansi_light"
            self._yaml.update(Syntax(printable(text), "yaml", theme=theme, background_color="default"))

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self.draw_again)

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw_again)

    # ---- drawing ---------------------------------------------------------------------------

    def draw(self) -> None:
        tail = self._tail
        assert tail is not None
        self._draw_title()
        self._draw_plots(tail)
        self._draw_importance(tail)
        self.query_one(SystemPanel).show(tail.series)
        self._draw_schedule(tail)
        self._draw_answers(tail)
        self.query_one(EventLog).show(tail.notable)

    def _draw_title(self) -> None:
        self.query_one("#title", Lines).show(run_title(self.row, self.run, self._tail, self.size.width))

    def _draw_schedule(self, tail: RunTail) -> None:
        panel, text = self.query_one("#schedule", Lines), forecast_band.summary(tail)
        panel.display = bool(text)
        panel.show(text)

    def _draw_answers(self, tail: RunTail) -> None:
        self.query_one("#said", Lines).show(answers_text(tail.example, tail.answers))
        if self.has_answers != self._knows_answers:
            self._knows_answers = self.has_answers
            self.refresh_bindings()

    @property
    def has_answers(self) -> bool:
        """Whether the log has a training example or answers, as a language model's has."""
        return self._tail is not None and bool(self._tail.answers or self._tail.example)

    def _draw_plots(self, tail: RunTail) -> None:
        self._add_plots(tail)
        there, shown = self.measured_plots(), self.shown_plots()
        for key, plot in self._plots.items():
            plot.display = key in shown
            if plot.display and plot.is_mounted:
                left = len(there) - len(shown) if key == shown[-1] and len(shown) > 1 else 0
                more = [f"{left} more: ]"] if left else []
                plot.show(self._curves(key), self._bands(key, plot.axis), [*self._notes(key), *more])
        self.query_one("#curves").set_class(len(shown) > 1, "-several")

    def _add_plots(self, tail: RunTail) -> None:
        """Add the missing plots: one for each value of the schedule, and for each metric with its own scale."""
        named = [name for name in tail.series if name.startswith("schedule/")]
        figures = [name for name in (*named, *metrics.others(tail.series)) if name not in self._plots]
        for name in figures[: len(PLOTS) + MAX_FIGURES - len(self._plots)]:
            title = name.partition("/")[2].replace("_", " ")
            axis = self._plots["loss"].axis
            self._plots[name] = plot = LinePlot(title, axis=axis, id=f"plot_{len(self._plots)}")
            plot.display = False
            self.query_one("#curves").mount(plot)
            self.call_after_refresh(self.draw_again)

    def measured_plots(self) -> list[str]:
        """Plots with values to draw, and always the loss."""
        return [key for key in self._plots if key == "loss" or self._curves(key)]

    def shown_plots(self) -> list[str]:
        """The chosen plot, and in a large terminal its neighbours."""
        there = self.measured_plots()
        at = there.index(self.plot) if self.plot in there else 0
        if not self.is_roomy:
            return there[at : at + 1]
        first = max(0, min(at - MAX_PLOTS + 1, len(there) - MAX_PLOTS))
        return there[first : first + MAX_PLOTS]

    def _curves(self, key: str) -> list[Curve]:
        assert self._tail is not None
        series = self._tail.series
        names = PLOTS[key][1] if key in PLOTS else (key,)
        if key == "metric":
            names = metrics.shares(series)
        if key == "penalty" and "penalty" in series and not series["penalty"].y.any():
            return []
        if "power_w" in series and key == "power":
            names = ("power_w",)
        first = list(self._plots).index(key) if len(names) == 1 else 0
        labels = [LABELS.get(name, name.rpartition("/")[2].replace("_", " ")) for name in names]
        return [
            Curve(label, series[name], curve_color(first + i))
            for i, (label, name) in enumerate(zip(labels, names))
            if name in series
        ]

    def _bands(self, key: str, axis: str) -> list[Band]:
        """The newest forecast, in the loss plot."""
        if key != "loss" or not self.with_forecast:
            return []
        assert self._tail is not None
        newest, loss = forecast_band.newest(self._tail), self._tail.series.get("loss")
        band = forecast_band.band(newest, loss, axis) if newest and loss else None
        return [band] if band else []

    def _notes(self, key: str) -> list[str]:
        """Notes beside the curves: scores of splits scored once, and the key for metrics of parts."""
        assert self._tail is not None
        if key != "metric":
            return []
        parts = ["p: parts"] if self._tail.parts else []
        return [*(f"{t.split} {decimal(t.value)}" for t in self._tail.tests), *parts]

    def _snapshots(self) -> dict[str, list]:
        """Heatmap -> its snapshots, for those that the log has; importances first."""
        assert self._tail is not None
        found = {"importance": self._tail.importance, "multipliers": self._tail.rates}
        return {name: snapshots for name, snapshots in found.items() if snapshots}

    def _draw_importance(self, tail: RunTail) -> None:
        there = self._snapshots()
        if self.map not in there:
            self.map, self.snapshot = next(iter(there), "importance"), -1
        snapshots = there.get(self.map, [])
        at = len(snapshots) - 1 if self.snapshot < 0 else min(self.snapshot, len(snapshots) - 1)
        drawn = (tail.generation, self.map, len(there), len(snapshots), at, self.size, self.pane, tail.is_caught_up)
        if drawn == self._drawn_importance:
            return
        self._drawn_importance = drawn
        pane, heatmap = self.query_one("#importance"), self.query_one(Heatmap)
        others = [f", m: {name}" for name in there if name != self.map]
        pane.border_title = {"multipliers": "factors on the learning rate"}.get(self.map, self.map) + "".join(others)
        self.set_class(not snapshots and self.pane != "importance", "-no-map")
        if not snapshots:
            ended = tail.is_caught_up and tail.series
            heatmap.nothing = "This method measures no importances." if ended else "nothing measured yet"
            heatmap.show(Grid((), (), heatmap.grid.values[:0, :0]))
            pane.border_subtitle = ""
            return
        grid = MAPS[self.map](snapshots, at)
        heatmap.show(grid, self.map)
        if self.is_wide:
            self.query_one("#panes").styles.grid_rows = f"{min(len(grid.rows) + 8, self.size.height // 2)} 1fr"
        when = f"step {snapshots[at].step:,}, {duration(snapshots[at].elapsed_s)}"
        pane.border_subtitle = f"snapshot {at + 1} of {len(snapshots)}, {when}"

    # ---- keys ------------------------------------------------------------------------------

    def action_pane(self, pane: str) -> None:
        self.minimize()
        self.pane = pane
        for name in ("curves", "importance", "events", "config", "answers"):
            self.set_class(name == pane, f"-{name}")
        focus = {"curves": f"#{self._plots[self.shown_plots()[0]].id}", "importance": "#heatmap", "events": "#log"}
        self.query_one(focus.get(pane, f"#{pane}")).focus()
        self.draw()

    def action_step(self, by: int) -> None:
        """Choose the next plot, or in a heatmap the next snapshot."""
        assert self._tail is not None
        if self.focused is not None and self.focused.id == "heatmap":
            num = len(self._snapshots().get(self.map, []))
            at = num - 1 if self.snapshot < 0 else self.snapshot
            self.snapshot = max(0, min(at + by, num - 1))
            if self.snapshot == num - 1:
                self.snapshot = -1  # follow the newest
            self._draw_importance(self._tail)
            return
        there = self.measured_plots()
        now = next((key for key in there if self._plots[key] is self.focused), self.plot)
        self.plot = there[(there.index(now) + by) % len(there)] if now in there else there[0]
        self._draw_plots(self._tail)
        self._plots[self.plot].focus()

    def action_map(self) -> None:
        assert self._tail is not None
        there = [*self._snapshots()]
        if len(there) < 2:
            self.app.bell()
            return
        self.map, self.snapshot = there[(there.index(self.map) + 1) % len(there)], -1
        self._draw_importance(self._tail)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the keys for parts and answers only if there are any."""
        if action == "pane" and parameters == ("answers",):
            return self.has_answers
        return bool(self._tail is not None and self._tail.parts) if action == "parts" else True

    def action_parts(self) -> None:
        assert self._tail is not None
        self.app.push_screen(Reading(f"Parts of the data in {self.run}", metrics.parts_table(self._tail.parts)))

    def action_forecast(self) -> None:
        self.with_forecast = not self.with_forecast
        self.draw()

    def action_zoom(self) -> None:
        if self.maximized is not None:
            self.minimize()
        elif self.focused is not None:
            self.maximize(self.focused)

    def action_compare(self) -> None:
        self.app.compare(list(dict.fromkeys([*self.app.marked, self.run])))

    def action_back(self) -> None:
        if self.maximized is not None:
            self.minimize()
        else:
            self.dismiss()

    def deleted(self, name: str) -> None:
        self.dismiss()

    def on_line_plot_axis_changed(self, event: LinePlot.AxisChanged) -> None:
        """Give all plots the same x axis."""
        for plot in self._plots.values():
            plot.axis = event.axis
        self.draw()  # a forecast's position has changed
