"""Content of a report: tables of methods, tests and runs, the figures, and a section for each run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from fastpeft._version import __version__
from fastpeft.compare.comparison import Comparison, Contrast, Row
from fastpeft.compare.comparison_figures import p_text
from fastpeft.compare.found_runs import Found
from fastpeft.compare.page import Block, Picture, Section, Table, Text
from fastpeft.compare.run_report import RunReport
from fastpeft.runs.events import number
from fastpeft.runs.parts import figure, table_of
from fastpeft.runs.store import Result
from fastpeft.runs.system import git_commit

_COMPARED = {
    "test": "Compared is the test score, of the best weights.",
    "best": "Compared is the best validation score. It was chosen among evaluations, and flatters runs that had more.",
    "metric": "Compared is the validation score of the last weights.",
}
_CAPTIONS = {
    "bar": "Mean of the seeds, with its 95 % t-interval; behind it the differences from the baseline.",
    "box": "Every seed: median, quartiles, and whiskers to the ends.",
    "seconds": "The validation metric of every run over its budget clock.",
    "joules": "The validation metric of every run over its energy.",
    "curves": "Curves of the run.",
    "importance": "Importance of the adapted matrices, and its drift.",
    "confusion": "Rows of a gold class by what was predicted.",
}
_NO_TEST = "one seed, and no answers to pair"
_ABOUT_TESTS = """\
Tests over seeds ask whether the method would be better if it were trained again; tests over rows whether these trained
models would be better on other rows of the kind. p is two-sided; Holm's is of all tests over seeds, or of all over
rows, in this table. d_z is the mean difference over the differences' standard deviation, g is Hedges', odds are the
rows that only the method gets right over those that only the baseline does. Evaluations of one run are never tested:
they follow from each other."""
TITLE = "Comparison of runs"


def report_blocks(
    comparison: Comparison, found: Sequence[Found], reports: Sequence[RunReport], figures: dict[str, str], folder: Path
) -> Iterator[Block]:
    """The blocks of a report, in order.

    Args:
        figures: topic -> SVG of the comparison.
        folder: folder of the report.
    """
    if any(one.result is not None and one.result.stand_in for one in found):
        yield Text("STAND-IN: some of these runs trained a stand-in. Their numbers are none of a real model.")
    yield Text(_COMPARED[comparison.by])
    yield Section("Methods", [_methods(comparison), *_glue(comparison)])
    yield Section("Differences from the baseline", list(_differences(comparison)))
    yield Section(
        "Figures", [Picture(_CAPTIONS[topic], f"comparison_{topic}.png", svg) for topic, svg in figures.items()]
    )
    yield Section("Runs", [_runs(found, reports)])
    yield Section("Each run", [_run(one, report, folder) for one, report in zip(found, reports) if report.figures])
    yield Text(_made_by())


def _methods(comparison: Comparison) -> Table:
    rows = comparison.rows
    columns: dict[str, list[object]] = {
        "task": [row.task for row in rows],
        "method": [row.label for row in rows],
        "seeds": [row.metric.count for row in rows],
        "measures": [row.measures for row in rows],
        "last": [row.metric for row in rows],
        "best": [row.best for row in rows],
        "test": [row.test for row in rows],
        "majority": [row.majority for row in rows],
        "AUC over s": [row.auc.get("seconds") for row in rows],
        "AUC over J": [row.auc.get("joules") for row in rows],
        f"to {comparison.target}": [row.target for row in rows],
        "time": [f"{row.seconds.value:,.0f} s" for row in rows],
        "energy": [f"{row.joules.value / 1000:,.1f} kJ" if row.joules else None for row in rows],
    }
    lines = [["-" if cell is None else str(cell) for cell in cells] for cells in zip(*columns.values())]
    return _table(list(columns), lines)


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table without its empty columns."""
    kept = [i for i in range(len(names)) if not lines or any(line[i] not in ("", "-") for line in lines)]
    return Table([names[i] for i in kept], [[line[i] for i in kept] for line in lines])


def _glue(comparison: Comparison) -> Iterator[Block]:
    if comparison.glue:
        lines = [[label, str(mean.count), str(mean)] for label, mean in comparison.glue.items()]
        yield Table(["method", "seeds", "GLUE average"], lines)


def _differences(comparison: Comparison) -> Iterator[Block]:
    base = comparison.baseline
    if base is None:
        yield Text("No run is plain lora: name a baseline with --baseline, and the others are tested against it.")
        return
    lines = [line for row in comparison.rows if row.label != base for line in _contrast_lines(row)]
    if not lines:
        yield Text(f"Nothing else than {base} was run on one of its tasks.")
        return
    names = ["task", "method", f"minus {base}", "relative", "95 % interval", "test", "n", "effect", "p", "p (Holm)"]
    yield _table([*names, "note"], lines)
    yield Text(_ABOUT_TESTS)


def _contrast_lines(row: Row) -> Iterator[list[str]]:
    relative = "-" if row.relative is None else f"{row.relative:+.2%}"
    tests = [one for one in (row.seeds_test, row.rows_test) if one is not None]
    for one in tests:
        own = relative if one is tests[0] else "-"
        yield [row.task, row.label, f"{one.difference:+.4f}", own, *_contrast_cells(one)]
    if not tests:
        apart = "-" if row.minus_baseline is None else f"{row.minus_baseline.value:+.4f}"
        yield [
            row.task,
            row.label,
            apart,
            relative,
            "-",
            "none",
            "-",
            "-",
            "-",
            "-",
            _NO_TEST,
        ]


def _contrast_cells(contrast: Contrast) -> list[str]:
    ours, others = contrast.count
    has_interval = contrast.low == contrast.low
    return [
        f"{contrast.low:+.4f} to {contrast.high:+.4f}" if has_interval else "-",
        contrast.test,
        f"{ours:,}" if ours == others else f"{ours:,}, {others:,}",
        "-" if contrast.effect is None else f"{contrast.effect_name} {contrast.effect:.2f}",
        "-" if contrast.p is None else p_text(contrast.p),
        "-" if contrast.p_holm is None else p_text(contrast.p_holm),
        contrast.note,
    ]


def _runs(found: Sequence[Found], reports: Sequence[RunReport]) -> Table:
    names = ["run", "status", "seed", "last", "best", "test", "by PEFT alone", "counts", "note"]
    lines = []
    for one, report in zip(found, reports):
        result = one.result
        scores = (
            ["-"] * 4 if result is None else [str(result.seed), *map(_value, (result.metric, result.best, result.test))]
        )
        why = "; ".join(part for part in (one.note, one.remark, *_facts(result)) if part)
        lines.append([one.name, one.status, *scores, _rescored(report), "yes" if one.counts else "no", why])
    return _table(names, lines)


def _facts(result: Result | None) -> Iterator[str]:
    if result is not None and result.stand_in:
        yield f"stand-in: {result.model} on {result.dataset}"


def _rescored(report: RunReport) -> str:
    return f"{number(report.rescored['value']):.4f} ({report.rescored['weights']})" if report.rescored else "-"


def _run(found: Found, report: RunReport, folder: Path) -> Section:
    assert found.result is not None
    assert found.folder is not None
    blocks: list[Block] = [Text(note) for note in report.notes]
    for topic, svg in report.figures.items():
        png = found.folder.path / "figures" / f"{found.name}_{topic}.png"
        blocks.append(Picture(_CAPTIONS[topic], _relative(png, folder), svg))
    for split, score in (("validation", found.result.metric), ("test", found.result.test)):
        if score.get("groups"):
            names, lines = table_of(score["groups"])
            blocks.append(Table([split, *names], lines))
        if score.get("more"):
            more = ", ".join(f"{name} {figure(value)}" for name, value in score["more"].items())
            blocks.append(Text(f"{split}: {more}"))
    if report.wrong:
        blocks.append(Text(f"{report.num_wrong:,} answers are not right. Some of them:"))
        blocks.append(Table(["given", "gold", "predicted"], [[w.given, w.gold, w.predicted] for w in report.wrong]))
    return Section(f"{found.name}: {found.status}, {report.num_steps:,} steps", blocks, folded=True)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _value(score: dict) -> str:
    return f"{number(score['value']):.4f}" if "value" in score else "-"


def _made_by() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("scipy", "statsmodels", "matplotlib"))
    commit = git_commit()
    at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Made by fastpeft {__version__}{f' ({commit})' if commit else ''} on {at}, with {versions}."
