"""Links lead somewhere, the site's navigation names every page, and each documented object exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import doc_pages
from tests.support.doc_pages import DOCS, ROOT, pages

LINKED = [*pages(), ROOT / "bench" / "LOG.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    made = {(DOCS / name).resolve() for name in doc_pages.generated_pages()}
    for target in doc_pages.links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() or there in made, f"{target}: there is no {there}"
        if anchor and there not in made:
            assert anchor in doc_pages.anchors(there), f"{target}: {there.name} has no such heading"


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    on_disk = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    named = doc_pages.nav_pages()
    assert len(named) == len(set(named))
    assert set(named) == on_disk | doc_pages.generated_pages()


def test_every_documented_object_exists() -> None:
    identifiers = [name for page in pages() for name in doc_pages.IDENTIFIER.findall(page.read_text())]
    assert len(identifiers) > 20
    assert [name for name in identifiers if not doc_pages.exists(name)] == []


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_pictures_and_theme_fetch_nothing() -> None:
    for picture in DOCS.glob("*.svg"):
        assert not re.search(r"(?:src|href|url)\W{1,3}https?:", picture.read_text()), picture.name
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "http" not in settings


def test_every_example_is_listed() -> None:
    there = {path.name for path in (ROOT / "examples").glob("*.py")}
    listed = set(doc_pages.links(ROOT / "examples" / "README.md"))
    assert there == {link for link in listed if not link.startswith("../")}


# ---- measured figures ----------------------------------------------------------------------

THROUGHPUT = (
    ("minilm_mnli", "fastpeft", "MiniLM-L6 on MNLI, r 8"),
    ("minilm_mnli_peers", "hf_compiled", "the peer with torch.compile, in a run"),
    ("minilm_prefix", "fastpeft_prefix", "MiniLM-L6, adapters on the upper three layers"),
    ("qwen3_gsm8k_peers", "fastpeft", "Qwen3 of 384 x 6"),
    ("qwen3_gsm8k_peers", "hf_compiled", "the peer with torch.compile |"),
    ("qwen3_gsm8k_peers", "trl_packed", "TRL with packing"),
    ("gemma_gsm8k", "fastpeft", "Gemma 3 270M on GSM8K"),
)
"""File of bench/results, its row, and how the README's row begins."""

SCORES = {"wnut17": "WNUT-17", "stsb": "STS-B", "amazon": "Amazon", "boolq": "BoolQ"}


def readme_row(begins: str) -> str:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {begins}")]
    assert len(rows) == 1, rows
    return rows[0].replace("**", "")


def stored(file: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text())


@pytest.mark.parametrize(("file", "name", "begins"), THROUGHPUT)
def test_the_readme_has_the_throughput_that_is_stored(file: str, name: str, begins: str) -> None:
    found = stored(f"throughput_{file}_cpu")
    row = next(row for row in found["rows"] if row["name"] == name)
    speed = f"{row['ratio']:.2f}"
    if row["ratio_low"] is not None:
        speed += f" ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    shown = readme_row(begins)
    assert f"| {speed} | {row['memory_ratio']:.2f} | {found['date'][:10]} |" in shown


@pytest.mark.parametrize(
    ("peer", "begins"), [("trl", "Gemma 3 270M on Alpaca"), ("trl_packed", "the same beside SFTTrainer with packing")]
)
def test_the_readme_has_the_throughput_beside_trl(peer: str, begins: str) -> None:
    found = stored("throughput_gemma_alpaca_cpu")
    own, theirs = (next(row for row in found["rows"] if row["name"] == name) for name in ("fastpeft", peer))
    speed, memory = (own[key] / theirs[key] for key in ("tokens_a_s", "peak_mb"))
    assert f"| {speed:.2f} | {memory:.2f} | {found['date'][:10]} |" in readme_row(begins)


@pytest.mark.parametrize("task", SCORES)
def test_the_readme_has_the_scores_that_are_stored(task: str) -> None:
    rows = {row["row"]: row for row in stored(f"against_peft_minilm_{task}")["summary"]}
    ours, theirs = (rows[name]["value"].partition(" ")[0] for name in ("lora", "trainer"))
    assert f"| {ours} | {theirs} | {rows['lora']['value_minus_trainer']} |" in readme_row(SCORES[task])
