"""`fastpeft evaluate`: metrics.json and figures for each run, and a comparison of all completed runs."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastpeft.compare.aggregate import write_aggregated
from fastpeft.compare.comparison import DATA_MARK, Comparison, compare, labels_of, score_of, tasks_of
from fastpeft.compare.comparison_figures import Drawn, draw_comparison, topics_of
from fastpeft.compare.found_runs import Found
from fastpeft.compare.page import markdown, page
from fastpeft.compare.plain_font import plain_font, use_font
from fastpeft.compare.report_text import TITLE, report_blocks
from fastpeft.compare.run_report import RunReport, report_run
from fastpeft.compare.significance import with_tests
from fastpeft.errors import UserError
from fastpeft.runs.store import Result

FOLDER = "comparison"
_OTHER_DATA = "other data than runs of this name: compared only with those on the same"
_OWN_PROCESSES_FROM = 8
"""Number of runs from which processes are used. Fewer runs are read in less time than processes take to start."""


@dataclass(frozen=True)
class Report:
    comparison: Comparison
    found: list[Found]
    folder: Path


def report(found: list[Found], results_dir: Path, target: float | None = None, baseline: str | None = None) -> Report:
    """Write RUN/metrics.json, RUN/figures/RUN_{curves,importance,confusion}.{pdf,png}, and under `results_dir`
    comparison/: aggregated_metrics.{json,csv}, comparison_{bar,box,seconds,joules}.{pdf,png}, report.{md,html}.

    Args:
        found: runs from `find_runs`.
        target: a metric over 0 and at most 1. The time and energy of each run to reach it are reported.
        baseline: the method that the others are compared with; plain LoRA when None.

    Raises:
        UserError: a target out of bounds, an unknown baseline.
    """
    if target is not None and not 0 < target <= 1:
        raise UserError(f"--target {target:g}: give a metric over 0 and at most 1; write 0.6 for 60 %")
    results = [result for _, result in _counted(found)]
    compare(results, baseline=baseline)  # refuses an unknown baseline before the logs are read
    with plain_font() as font, _processes(len(found), font) as many:
        count = len(found)
        reports = list(many(_report_run, found, [score_of(results)] * count, [target] * count))
        return _write_report(found, reports, results_dir / FOLDER, target, baseline, many)


def _write_report(
    found: list[Found],
    reports: list[RunReport],
    folder: Path,
    target: float | None,
    baseline: str | None,
    many: Callable[..., Iterator],
) -> Report:
    of_run = {id(one): report for one, report in zip(found, reports)}
    results = [result for _, result in _counted(found)]
    own = [of_run[id(one)] for one, _ in _counted(found)]
    comparison = compare(results, [report.curve for report in own], target, baseline)
    comparison = with_tests(comparison, {result.name: report.scores for result, report in zip(results, own)})
    found = list(_noted(found))
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("comparison_*"):
        stale.unlink()
    curves = [report.validations for report in own]
    drawn = list(map(Drawn, results, labels_of(results), tasks_of(results), curves))
    topics = topics_of(drawn)
    draw = partial(draw_comparison, comparison=comparison, runs=drawn, folder=folder)
    figures = dict(zip(topics, many(draw, topics)))
    write_aggregated(comparison, found, reports, folder)
    blocks = list(report_blocks(comparison, found, reports, figures, folder))
    for name, text in (("report.md", markdown(TITLE, blocks)), ("report.html", page(TITLE, blocks))):
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return Report(comparison, found, folder)


def _counted(found: Sequence[Found]) -> list[tuple[Found, Result]]:
    return [(one, one.result) for one in found if one.counts and one.result is not None]


def _noted(found: Sequence[Found]) -> Iterator[Found]:
    """The runs, with a remark on those that were trained on other data of the same name."""
    counted = _counted(found)
    tasks = tasks_of([result for _, result in counted])
    apart = {id(one) for (one, _), task in zip(counted, tasks) if DATA_MARK in task}
    for one in found:
        yield replace(one, remark=_OTHER_DATA) if id(one) in apart else one


def _report_run(found: Found, by: str, target: float | None) -> RunReport:
    """Report one run. With automatic garbage collection off, its figures are collected once it is done.

    What remains is exempt from the next collection, which else takes most of its time for imported modules.
    """
    report = report_run(found, by, target)
    if not gc.isenabled():
        gc.collect()
        gc.freeze()
    return report


@contextmanager
def _processes(count: int, font: Path) -> Iterator[Callable[..., Iterator]]:
    """A `map` over processes if there are enough runs and cores, else the builtin."""
    workers = min(len(os.sched_getaffinity(0)), count)
    if count < _OWN_PROCESSES_FROM or workers == 1:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_begin_process, initargs=(font,)) as pool:
        yield pool.map


def _begin_process(font: Path) -> None:
    use_font(font)
    gc.disable()  # garbage collection takes a fifth of the time of a figure
