"""The tutorial and the how-tos, typed line by line: what the page shows is what comes.

In a ``console`` block a line after ``$`` is typed into one shell, with those after ``>`` that follow; the lines up to the next one are what it prints, where
``...`` at the end of a line stands for any rest of it, within a line for anything there, and alone for any number of lines.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace, pages
from support.command import run_module
from support.dockerhost import OldHost, tar

PAGES = [pages.TUTORIAL, *sorted((pages.DOCS / "howto").glob("*.md"))]


@pytest.fixture
def place(space: Path, can_mount: None) -> Iterator[Path]:
    """An empty directory, the commands in PATH, and /mnt of our own."""
    empty = space / "empty"
    empty.mkdir()
    namespace.mount("tmpfs", "/mnt", "tmpfs")
    yield empty
    run_module("cowfs", "umount", "--all")
    namespace.umount("/mnt", namespace.MNT_DETACH)


def old_docker_host(where: Path) -> None:
    """Docker's data directory that the page on migration begins with: two images that share a layer, one of which deletes a file."""
    base = tar(("etc/", "dir", None), ("etc/passwd", "file", b"root\n"), ("gone", "file", b"gone"))
    host = OldHost(where, "overlay2")
    host.image("base:2", base)
    host.image("app:1", base, tar((".wh.gone", "file", b""), ("etc/", "dir", None), ("etc/motd", "file", b"hello\n")))


def pattern(lines: list[str]) -> str:
    """A regular expression for what is shown."""
    parts = []
    for line in lines:
        if line == "...":
            parts.append(r"(?:.*\n)*?")
            continue
        words = [re.sub(r"(\\ )+", r"\\s+", re.escape(part)) for part in line.split("...")]
        parts.append(".*".join(words) + r"\s*?\n")
    return "".join(parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_what_comes(page: Path, place: Path) -> None:
    steps = pages.steps_of(page)
    if not steps:
        pytest.skip("nothing on this page is typed")
    if any("busybox" in step.line for step in steps) and not shutil.which("busybox"):
        pytest.skip("busybox is not installed (busybox-static)")
    if page.stem == "migrate":
        old_docker_host(place / "old")
    for step in pages.type_lines(steps, place, pages.programs(place.parent / "programs")):
        as_shown = f"$ {step.line}\nis to print:\n{chr(10).join(step.shown)}\nbut prints:\n{step.came}"
        assert re.fullmatch(pattern(step.shown), step.came), as_shown
        assert step.status == "0" or "error" in step.shown[0], f"$ {step.line}\nends with {step.status}:\n{step.came}"
    for picture in pages.PICTURES if page == pages.TUTORIAL else ():
        drawn = pages.lines_in((pages.DOCS / f"pictures/{picture}.svg").read_text())
        assert pages.comparable(drawn) == pages.comparable(pages.lines_of(picture, steps)), (
            "draw it anew: cd tests && python -m support.pages"
        )


def test_the_page_has_its_pictures_and_no_others() -> None:
    """Each one shows the commands of the section that it stands in, and fetches nothing from elsewhere."""
    text = pages.TUTORIAL.read_text()
    assert sorted(re.findall(r"\(pictures/(.*?)\.svg\)", text)) == sorted(pages.PICTURES)
    assert sorted(path.stem for path in (pages.DOCS / "pictures").iterdir()) == sorted(pages.PICTURES)
    steps = pages.steps_of(pages.TUTORIAL)
    for picture, section in pages.PICTURES.items():
        assert f"(pictures/{picture}.svg)" in text.partition(f"## {section}\n")[2].partition("\n## ")[0]
        svg = (pages.DOCS / f"pictures/{picture}.svg").read_text()
        assert not re.search(r"url\(['\"]?http|href=", svg)
        typed = [line[2:] for line in pages.lines_in(svg) if line.startswith("$ ")]
        assert typed == [step.line for step in steps if step.section == section]
