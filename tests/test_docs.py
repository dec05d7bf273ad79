"""The statements of the documents about the code are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowfs.sys import faults

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_every_fault_point_is_explained() -> None:
    page = (ROOT / "docs/internals/crash-safety.md").read_text()
    told = dict(re.findall(r"^\| `([a-z]+\.[a-z]+)` \| (.*?) \| (?:before|after) \|$", page, re.MULTILINE))
    assert told == faults.POINTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_list_of_pages_is_whole() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in PAGES:
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"({name})" in index, name


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name == "internals"], ids=lambda page: page.name
)
def test_modules_that_are_named_exist(page: Path) -> None:
    """`union/copyup.py` and `cowfs/sys/atomic.py` are paths of the tree."""
    for path in set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|sql))`", page.read_text())):
        assert (ROOT / path).exists() or (ROOT / "cowfs" / path).exists(), path
