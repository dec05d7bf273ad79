"""The configuration file: what it may say, which one holds, and what is told where it is wrong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.command import environment, one_line, run_module


def cowfs(space: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {
        key: value for key, value in environment().items() if not key.startswith("COWFS_") and key != "XDG_CONFIG_HOME"
    }
    return run_module("cowfs", *arguments, env={**kept, "HOME": str(space), **more}, cwd=space)


def test_an_option_the_environment_the_users_file_and_the_default(space: Path) -> None:
    (space / ".config").mkdir()
    (space / ".config/cowfs.toml").write_text('root = "~/mine"\nfsync = false\n')
    (space / "one.toml").write_text(f'root = "{space}/named"\n')
    for options, more, where in (
        ((), {}, "mine"),
        ((), {"COWFS_CONFIG": str(space / "one.toml")}, "named"),
        ((), {"COWFS_ROOT": str(space / "env")}, "env"),
        (("--root", space / "option"), {"COWFS_ROOT": str(space / "env")}, "option"),
        ((), {"XDG_CONFIG_HOME": str(space / ".config"), "HOME": str(space)}, "mine"),
    ):
        done = cowfs(space, "info", *options, **more)
        assert done.returncode == 3
        assert f"no store at {space}/{where} " in one_line(done)
    assert cowfs(space, "init").returncode == 0
    assert (space / "mine/index.db").exists()
    assert cowfs(space, "ls").returncode == 0
    assert cowfs(space, "init", "there").returncode == 0
    assert (space / "there/index.db").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root = \n", ("key = value",)),
        ("rot = 'x'\n", ("no setting 'rot'", "root, fsync")),
        ("root = 5\n", ("root is 5",)),
        ("root = 'relative'\n", ("'relative'", "absolute")),
        ("fsync = 'no'\n", ("fsync is 'no'", "true or false")),
        (b"\xff".decode("latin1"), ("one.toml",)),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(space: Path, text: str, words: tuple[str, ...]) -> None:
    (space / "one.toml").write_bytes(text.encode("latin1"))
    done = cowfs(space, "init", COWFS_CONFIG=str(space / "one.toml"))
    assert done.returncode == 2
    line = one_line(done)
    for word in ("one.toml", *words):
        assert word in line
    assert sorted(os.listdir(space)) == ["one.toml"]


def test_a_named_file_must_be_there(space: Path) -> None:
    done = cowfs(space, "ls", COWFS_CONFIG=str(space / "none.toml"))
    assert done.returncode == 3
    assert "COWFS_CONFIG" in one_line(done)
