"""Each sentence of the security page names one test, and there is such a test."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.support.doc_pages import ROOT

PAGE = (ROOT / "SECURITY.md").read_text()
ROW = re.compile(r"^\| (?P<sentence>[^|]+) \| (?P<shown_by>[^|]+) \|$", re.MULTILINE)
NODE = re.compile(r"`(?P<path>tests/[\w/]+\.py)::(?P<name>test_\w+)`")
PROMISES = [match for match in ROW.finditer(PAGE) if not match["shown_by"].startswith("shown by")]


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["sentence"][:60])
def test_a_sentence_names_one_test_that_exists(promise: re.Match[str]) -> None:
    assert promise["sentence"].count(". ") == 0, "one sentence a row"
    assert promise["sentence"].endswith(".")
    node = NODE.fullmatch(promise["shown_by"])
    assert node is not None, f"expected one `file::test`, got {promise['shown_by']}"
    assert (ROOT / node["path"]).is_file()
    assert node["name"] in names_in(node["path"])


def test_no_test_stands_for_two_sentences() -> None:
    nodes = [promise["shown_by"] for promise in PROMISES]
    assert len(nodes) > 30
    assert len(set(nodes)) == len(nodes)


OTHERS = (
    "adapter", "model's folder", "run file", "template", "dataset", "run folder", "sweep's journal", "storage",
    "results folder",
)  # fmt: skip


@pytest.mark.parametrize("made_by_others", OTHERS)
def test_whatever_others_can_make_has_its_sentence(made_by_others: str) -> None:
    assert any(made_by_others in promise["sentence"].lower() for promise in PROMISES)
