"""File handles (name_to_handle_at(2), NFS) name one file for good: after a remount they are stale, and never another file's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support import posix

import cowfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="open_by_handle_at(2) needs root")

COUNT = 40


def handles(mnt: Path) -> dict[str, tuple[int, bytes]]:
    return {entry.name: posix.file_handle(mnt / entry.name) for entry in os.scandir(mnt)}


def look(mnt: Path, known: dict[str, tuple[int, bytes]]) -> dict[str, str]:
    """The result of opening each handle: the content of a file, or ESTALE."""
    found = {}
    top = os.open(mnt, os.O_RDONLY)
    try:
        for name, handle in known.items():
            try:
                fd = posix.open_handle(top, handle)
            except OSError as error:
                assert error.errno == errno.ESTALE
                found[name] = "ESTALE"
            else:
                found[name] = os.pread(fd, 100, 0).decode()
                os.close(fd)
    finally:
        os.close(top)
    return found


def fill(mnt: Path, prefix: str) -> None:
    for number in range(COUNT):
        (mnt / f"{prefix}{number}").write_text(f"{prefix}{number}")


@pytest.mark.parametrize("between", ["deleted after", "deleted before"])
def test_a_handle_of_before_a_remount_leads_to_no_other_file(tmp_path: Path, can_mount: None, between: str) -> None:
    """The host gives the numbers of deleted files again: in the mount that follows, or in the one that ends."""
    lower, upper, mnt = tmp_path / "lower", tmp_path / "upper", tmp_path / "mnt"
    lower.mkdir()
    mnt.mkdir()
    fill(lower, "lower")
    with cowfs.mount([lower], mnt, upper=upper):
        fill(mnt, "old")
        known = handles(mnt)
        assert look(mnt, known) == {name: name for name in known}
        if between == "deleted before":
            for entry in list(os.scandir(mnt)):
                os.unlink(entry)
            fill(mnt, "new")
            assert set(look(mnt, known).values()) == {"ESTALE"}
    with cowfs.mount([lower], mnt, upper=upper):
        if between == "deleted after":
            for entry in list(os.scandir(mnt)):
                os.unlink(entry)
        fill(mnt, "secret")
        now = handles(mnt)
        assert set(look(mnt, known).values()) == {"ESTALE"}
        assert look(mnt, now) == {name: name for name in now}
