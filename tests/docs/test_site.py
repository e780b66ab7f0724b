"""The site is built without a warning, and reading it fetches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.doc_pages import ROOT, nav_pages, setting_keys

pytestmark = pytest.mark.soak  # 10 s of a processor


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the extra docs is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    assert [page for page in nav_pages() if not (site / page).with_suffix(".html").is_file()] == []


def test_reading_it_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:[^\s\">]+)", page.read_text())
        fetched += re.findall(r"<link[^>]*\shref=\"?(https?:[^\s\">]+)", page.read_text())
        assert fetched == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*(?:url\()?['\"]?(?:https?:)?//", style.read_text()), style.name


def test_the_configuration_reference_has_every_key(site: Path) -> None:
    text = (site / "reference" / "configuration.html").read_text()
    assert [key for key in setting_keys()[0] if f"<code>{key}</code>" not in text] == []
