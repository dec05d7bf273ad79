"""Pages of the documentation, typed into a shell: what a test compares, and what the tutorial's pictures show.

``python -m support.pages`` in ``tests/``, as root, types the tutorial and draws its pictures anew (``docs/pictures/*.svg``; needs rich, the extra ``progress``).
"""

from __future__ import annotations

import html
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import namespace
from .command import environment, run_module

DOCS = Path(__file__).resolve().parents[2] / "docs"
TUTORIAL = DOCS / "tutorial.md"
PICTURES = {
    "mounted": "Mounted, without anything else",
    "store": "A store",
    "sandbox": "A sandbox that stays",
}
"""Picture -> the section of the tutorial that it shows."""

_WIDTH = 100
"""Columns of a picture; longer lines end with an ellipsis."""

PROGRESS = re.compile(
    r"^[^\n]*: (?:[^\n]+, )?\d+ s\n", re.MULTILINE
)  # a step of over a second tells it, on a busy machine any step


class Step:
    """A line that is typed."""

    def __init__(self, section: str, line: str) -> None:
        self.section = section
        self.line = line
        self.shown: list[str] = []  # on the page
        self.came = ""
        self.drawn = ""  # what came, as if the shell had been in /root
        self.status = ""


def steps_of(page: Path) -> list[Step]:
    """All lines of the page's console blocks."""
    steps: list[Step] = []
    section, within = "", False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            within = line == "```console"
        elif not within:
            section = line[3:] if line.startswith("## ") else section
        elif line.startswith("$ "):
            steps.append(Step(section, line[2:]))
        elif line.startswith(">") and not steps[-1].shown:
            steps[-1].line += f"\n{line[2:]}"
        else:
            steps[-1].shown.append(line)
    return steps


def programs(where: Path) -> dict[str, str]:
    """Make the commands in a directory; the environment in which they are found."""
    where.mkdir()
    for name, module in (("cowfs", "cowfs"), ("cowfs-overlayfs", "cowfs.cli.overlayfs")):
        (where / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (where / name).chmod(0o755)
    (where / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (where / "python3").chmod(0o755)
    return {"PATH": f"{where}:{os.environ['PATH']}"}


def type_lines(steps: list[Step], place: Path, environ: Mapping[str, str]) -> Iterator[Step]:
    """Type each line into one shell, and give it back with what came."""
    with subprocess.Popen(
        ["bash"],
        cwd=place,
        env={**environment(), "HOME": str(place), "LC_ALL": "C", "COWFS_FSYNC": "0", **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        for number, step in enumerate(steps):
            end = f"--- {number} ---"
            shell.stdin.write(f'{step.line}\nstatus=$?; echo; echo "{end} $status"\n')
            shell.stdin.flush()
            came = ""
            for part in iter(shell.stdout.readline, ""):
                if part.startswith(end):
                    step.status = part.removeprefix(end).strip()
                    break
                came += part
            step.came = PROGRESS.sub("", came.removesuffix("\n"))
            step.drawn = step.came.replace(str(place), "/root")
            yield step
        shell.stdin.close()
        assert shell.wait() == 0


# -- pictures ----------------------------------------------------------------------------------------------------------


def lines_of(picture: str, steps: list[Step]) -> list[str]:
    """The text of a picture, from the steps of its section."""
    lines: list[str] = []
    for step in steps:
        if step.section == PICTURES[picture]:
            lines += f"$ {step.line}".splitlines()
            lines += step.drawn.expandtabs().splitlines()
    return [line.rstrip() if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…" for line in lines]


def lines_in(svg: str) -> list[str]:
    """The text that a picture shows, line by line."""
    found: dict[int, str] = {}
    for number, text in re.findall(r'<text [^>]*clip-path="url\(#[^)]*-line-(\d+)\)">(.*?)</text>', svg):
        found[int(number)] = found.get(int(number), "") + html.unescape(text).replace("\xa0", " ")
    return [found.get(number, "").rstrip() for number in range(max(found, default=-1) + 1)]


def comparable(lines: list[str]) -> list[str]:
    """Without what differs from time to time: ids, sizes, times, and the spaces of columns."""
    told = []
    for line in lines:
        line = re.sub(r"[^/,:= ]*…$", "…", line)  # a part of an id
        line = re.sub(r"\b[0-9a-f]{12,}\b|(?<=/layers/)[a-z0-9]+", "ID", line)
        line = re.sub(r"\b\d+[smhd]\b", "N", line)
        line = re.sub(r"\d[\d.,]*(?: ?[KMGTkmgt]i?B?(?:/s)?\b)?", "N", line)
        told.append(" ".join(line.split()))
    return [line for line in told if line]


def draw(picture: str, lines: list[str]) -> str:
    """An SVG of a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=max(map(len, lines)) + 1, file=io.StringIO(), color_system="truecolor")
    for line in lines:
        console.print(Text(line, style="bold" if line.startswith("$ ") else ""), soft_wrap=True)
    svg = console.export_svg(title=PICTURES[picture], unique_id=f"cowfs-{picture}")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # nothing is fetched from elsewhere
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> int:
    """Type the tutorial and write its pictures."""
    namespace.enter()
    if namespace.why_not:
        print(f"pictures: {namespace.why_not}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="cowfs-pictures-") as base:
        namespace.mount("tmpfs", base, "tmpfs")
        try:
            place = Path(base) / "tutorial"
            place.mkdir()
            steps = list(type_lines(steps_of(TUTORIAL), place, programs(Path(base) / "programs")))
            run_module("cowfs", "umount", "--all")
        finally:
            namespace.umount(base, namespace.MNT_DETACH)
    (DOCS / "pictures").mkdir(exist_ok=True)
    for picture in PICTURES:
        (DOCS / f"pictures/{picture}.svg").write_text(draw(picture, lines_of(picture, steps)))
        print(f"docs/pictures/{picture}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
