"""A mark that says "the data is beneath" goes with the data's arrival, or the write fails: never a write that vanishes at the next mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cowfs.sys import xattr
from cowfs.union import View
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
