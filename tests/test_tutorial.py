"""The tutorial and the how-tos, typed line by line: what the page shows is what comes.

In a ``console`` block a line after ``$`` is typed into one shell, with those after ``>`` that follow; the lines up to the next one are what it prints, where
``...`` at the end of a line stands for any rest of it, within a line for anything there, and alone for any number of lines.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import environment, run_module
from support.dockerhost import OldHost, tar

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(
    r"^[^\n]*: (?:[^\n]+, )?\d+ s\n", re.MULTILINE
)  # a step of over a second tells it, on a busy machine any step
PAGES = [ROOT / "docs/tutorial.md", *sorted((ROOT / "docs/howto").glob("*.md"))]


@pytest.fixture
def place(space: Path, can_mount: None) -> Iterator[Path]:
    """An empty directory, the commands in PATH, and /mnt of our own."""
    programs = space / "programs"
    programs.mkdir()
    for name, module in (("cowfs", "cowfs"), ("cowfs-overlayfs", "cowfs.cli.overlayfs")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python3").chmod(0o755)
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


def typed(page: Path) -> list[tuple[str, list[str]]]:
    """(line, what is shown after it) of all console blocks."""
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line[2:], []))
            elif line.startswith(">") and not steps[-1][1]:
                steps[-1] = (f"{steps[-1][0]}\n{line[2:]}", [])
            else:
                steps[-1][1].append(line)
    return steps


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
    steps = typed(page)
    if not steps:
        pytest.skip("nothing on this page is typed")
    if any("busybox" in line for line, _ in steps) and not shutil.which("busybox"):
        pytest.skip("busybox is not installed (busybox-static)")
    if page.stem == "migrate":
        old_docker_host(place / "old")
    environ = {**environment(), "HOME": str(place), "LC_ALL": "C", "COWFS_FSYNC": "0"}
    environ["PATH"] = f"{place.parent / 'programs'}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash"],
        cwd=place,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        for number, (line, shown) in enumerate(steps):
            end = f"--- {number} ---"
            shell.stdin.write(f'{line}\nstatus=$?; echo; echo "{end} $status"\n')
            shell.stdin.flush()
            came, status = "", ""
            for part in iter(shell.stdout.readline, ""):
                if part.startswith(end):
                    status = part.removeprefix(end).strip()
                    break
                came += part
            came = PROGRESS.sub("", came.removesuffix("\n"))
            as_shown = f"$ {line}\nis to print:\n{chr(10).join(shown)}\nbut prints:\n{came}"
            assert re.fullmatch(pattern(shown), came), as_shown
            assert status == "0" or "error" in shown[0], f"$ {line}\nends with {status}:\n{came}"
        shell.stdin.close()
        assert shell.wait() == 0
