"""A mark that says "the data is beneath" goes with the data's arrival, or the write fails: never a write that vanishes at the next mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cowfs.model import Limit
from cowfs.sys import xattr
from cowfs.union import Options, View
from cowfs.union.paths import Paths

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="metacopy is of the trusted form: needs root")


@pytest.fixture
def view(space: Path) -> View:
    for name in ("lower", "upper", "work"):
        (space / name).mkdir()
    (space / "lower" / "f").write_bytes(b"old data")
    return View([str(space / "lower")], str(space / "upper"), str(space / "work"))


@pytest.mark.parametrize("code", [errno.EIO, errno.EPERM, errno.EROFS, errno.ENOSPC])
def test_a_mark_that_stays_fails_the_write(view: View, space: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses to remove the metacopy mark: the write says so, and the old data is what a new mount shows."""
    node = view.lookup(view.root, b"f")
    view.setattr(node, mode=0o600)  # a metacopy now
    assert "trusted.overlay.metacopy" in os.listxattr(space / "upper" / "f")
    real = xattr.remove

    def refuse(dirfd: int, name: bytes | None, attribute: bytes | str) -> None:
        if attribute == view.form.metacopy:
            raise OSError(code, os.strerror(code))
        real(dirfd, name, attribute)

    monkeypatch.setattr(xattr, "remove", refuse)
    with pytest.raises(OSError) as caught:
        view.write(node, 0, b"new")
    assert caught.value.errno == code
    monkeypatch.undo()
    view.close()
    again = View([str(space / "lower")], str(space / "upper"), str(space / "work"))
    assert Paths(again).read_bytes("f") == b"old data"
    again.close()


def test_a_lower_file_without_xattrs_is_asked_once_and_its_copy_is_counted(space: Path) -> None:
    """Programs that compare trees ask every file for its capability and all names. One system call answers both; the marks of its copy count."""
    for name in ("lower", "upper", "work"):
        (space / name).mkdir()
    for name in ("bare", "marked"):
        (space / "lower" / name).write_bytes(b"data")
    os.setxattr(space / "lower" / "marked", "user.x", b"1")
    view = View(
        [str(space / "lower")], str(space / "upper"), str(space / "work"), options=Options(limit=Limit(bytes=1 << 20))
    )
    bare, marked = view.lookup(view.root, b"bare"), view.lookup(view.root, b"marked")
    for node in (bare, marked):
        with pytest.raises(OSError) as caught:
            view.getxattr(node, b"security.capability")
        assert caught.value.errno == errno.ENODATA
    os.setxattr(
        space / "lower" / "bare", "user.late", b"1"
    )  # no layer is changed beneath a mount: it shows whether the host is asked
    assert view.listxattr(bare) == []
    assert view.listxattr(marked) == [b"user.x"]
    os.removexattr(space / "lower" / "bare", "user.late")
    view.setxattr(bare, b"user.big", b"x" * 3000)
    assert view.getxattr(bare, b"user.big") == b"x" * 3000
    assert view.listxattr(bare) == [b"user.big"]
    view.write(bare, 0, b"new")
    before = view.usage().bytes
    view.unlink(view.root, b"bare")
    view.forget(bare.id, bare.nlookup)
    assert view.usage().bytes < before
    kept = view.usage()
    view.close()
    again = View(
        [str(space / "lower")], str(space / "upper"), str(space / "work"), options=Options(limit=Limit(bytes=1 << 20))
    )
    assert again.usage() == kept
    again.close()
