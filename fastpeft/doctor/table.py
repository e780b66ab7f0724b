"""Prints the findings: as a table in a terminal, as plain lines in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpeft.doctor import can_train
from fastpeft.doctor.check import Finding

_STYLES = {"ok": "green", "warning": "yellow", "missing": "red"}


def print_report(findings: list[Finding], console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        for finding in findings:
            words = Text(finding.message)
            if finding.fix:
                words.append(f"\n{finding.fix}", style="bold")
            table.add_row(Text(finding.status, style=_STYLES[finding.status]), Text(finding.name), words)
        console.print(table)
        console.print(Text(f"\n{_verdict(findings)}"))
        return
    for finding in findings:
        fix = f" -> {finding.fix}" if finding.fix else ""
        print(f"{finding.status:<8} {finding.name}: {finding.message}{fix}")
    print(_verdict(findings))


def _verdict(findings: list[Finding]) -> str:
    if not can_train(findings):
        return f"nothing can be trained here until this is mended: {', '.join(f.name for f in findings if f.fatal)}"
    return "fastpeft can train here"
