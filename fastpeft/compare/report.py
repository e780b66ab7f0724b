"""`fastpeft evaluate`: metrics.json and figures for each run, and a comparison of all that are done."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fastpeft.compare.aggregate import write_aggregated
from fastpeft.compare.comparison import Comparison, compare, labels_of, score_of, tasks_of
from fastpeft.compare.comparison_figures import Drawn, draw_comparison
from fastpeft.compare.found_runs import Found
from fastpeft.compare.page import markdown, page
from fastpeft.compare.report_text import TITLE, report_blocks
from fastpeft.compare.run_report import RunReport, report_run
from fastpeft.compare.significance import with_tests
from fastpeft.errors import UserError

FOLDER = "comparison"
_OWN_PROCESSES_FROM = 8
"""Runs; fewer are read sooner than processes start."""


@dataclass(frozen=True)
class Report:
    comparison: Comparison
    found: list[Found]
    folder: Path


def report(found: list[Found], results_dir: Path, target: float | None = None, baseline: str | None = None) -> Report:
    """Write RUN/metrics.json, RUN/figures/RUN_{curves,importance,confusion}.{pdf,png}, and under `results_dir`
    comparison/: aggregated_metrics.{json,csv}, comparison_{bar,box,seconds,joules}.{pdf,png}, report.{md,html}.

    Args:
        found: by `find_runs`.
        target: a metric over 0 and at most 1; how long and how many joules each run took to reach it is reported.
        baseline: the method that the others are compared with; plain LoRA when None.

    Raises:
        UserError: a target out of bounds, a baseline that is not there.
    """
    if target is not None and not 0 < target <= 1:
        raise UserError(f"--target {target:g}: give a metric over 0 and at most 1; write 0.6 for 60 %")
    counted = [one for one in found if one.counts]
    results = [one.result for one in counted if one.result is not None]
    by = score_of(results)
    compare(results, baseline=baseline)  # refuses a baseline before the logs are read
    reports = _report_runs(found, by, target)
    own = {id(one): report for one, report in zip(found, reports)}
    comparison = compare(results, [own[id(one)].curve for one in counted], target, baseline)
    comparison = with_tests(comparison, {report.name: report.scores for report in reports})
    found = list(_noted(found, counted))
    folder = results_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("comparison_*"):
        stale.unlink()
    labelled = zip(counted, results, labels_of(results), tasks_of(results))
    drawn = [Drawn(result, label, task, own[id(one)].validations) for one, result, label, task in labelled]
    figures = draw_comparison(comparison, drawn, folder) if drawn else {}
    write_aggregated(comparison, found, reports, folder)
    blocks = list(report_blocks(comparison, found, reports, figures, folder))
    for name, text in (("report.md", markdown(TITLE, blocks)), ("report.html", page(TITLE, blocks))):
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return Report(comparison, found, folder)


def _noted(found: Sequence[Found], counted: Sequence[Found]) -> Iterator[Found]:
    """With what sets a run that counts apart from the others of its dataset."""
    results = [one.result for one in counted if one.result is not None]
    other = {id(one): ", data " in task for one, task in zip(counted, tasks_of(results))}
    for one in found:
        note = "other data than runs of this name: compared only with those on the same" if other.get(id(one)) else ""
        yield replace(one, remark=note) if note else one


def _report_runs(found: Sequence[Found], by: str, target: float | None) -> list[RunReport]:
    with _processes(len(found)) as many:
        return list(many(_report_run, found, [by] * len(found), [target] * len(found)))


def _report_run(found: Found, by: str, target: float | None) -> RunReport:
    """Where nothing is collected on the way, what a run's figures leave is collected behind each run."""
    report = report_run(found, by, target)
    if not gc.isenabled():
        gc.collect()
    return report


@contextmanager
def _processes(count: int) -> Iterator[Callable[..., Iterator]]:
    """A `map` over processes where there is enough to do."""
    workers = min(os.cpu_count() or 1, count)
    if count < _OWN_PROCESSES_FROM or workers == 1:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=gc.disable) as pool:  # a fifth of the time of a figure
        yield pool.map
