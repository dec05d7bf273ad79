"""Standard streams that are closed or full: one line, a status, nothing written where it does not belong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import environment

WORDS = (
    ["ls"], ["tree"], ["log", "x"], ["mounts"], ["info"], ["df"], ["images"], ["--help"], ["--version"], ["ls", "--help"],
    ["info", "--json"], ["export", "x", "-"], ["completion", "bash"], ["check"],
)  # fmt: skip


def run(space: Path, words: list[str], redirect: str, module: str = "cowfs") -> subprocess.CompletedProcess[str]:
    line = f'exec "$0" -m {module} "$@" {redirect}'
    env = {**environment(), "COWFS_ROOT": str(space / "store"), "XDG_RUNTIME_DIR": str(space)}
    env.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("redirect", [">&-", ">/dev/full", ">&- <&-"])
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_an_output_that_takes_nothing_is_one_line(space: Path, words: list[str], redirect: str) -> None:
    run(space, ["init"], "")
    done = run(space, words, redirect)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if done.returncode else 0), done.stderr
    if words in (["info"], ["--version"], ["df"]):
        assert done.returncode == 1
        assert "standard output" in done.stderr


@pytest.mark.root
def test_who_prints_nothing_does_not_need_an_output(space: Path) -> None:
    for words in (["init"], ["prepare", "key"]):
        run(space, words, "")
    assert run(space, ["label", "key", "a=b"], ">&-").returncode == 0
    assert "a=b" in run(space, ["stat", "key"], "").stdout


@pytest.mark.root
@pytest.mark.parametrize("redirect", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_error_stream_changes_no_status(space: Path, redirect: str) -> None:
    run(space, ["init"], "")
    assert run(space, ["stat", "missing"], redirect).returncode == run(space, ["stat", "missing"], "").returncode
    assert run(space, ["check", "--json"], "").returncode == 0


@pytest.mark.root
def test_an_import_from_a_closed_input(space: Path) -> None:
    done = run(space, ["import", "-", "x"], "<&-")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.root
def test_the_other_command(space: Path) -> None:
    for words in (["--help"], ["--version"]):
        done = run(space, words, ">&-", "cowfs.cli.overlayfs")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not os.path.exists(space / "1")
