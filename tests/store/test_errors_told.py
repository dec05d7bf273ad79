"""Errors of the host on paths that write are told, and never taken for "is not there"."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cowfs.errors import CowfsError
from cowfs.mounting.volatile import check_volatile
from cowfs.row.view import View
from cowfs.store import Store
from cowfs.store.staging import SQUASH, spared
from cowfs.store.switching import read_switch
from cowfs.sys import files, xattr
from cowfs.union import Options, absorb
from cowfs.union.node import Dir
from cowfs.union.paths import Paths

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="the trusted form needs root")


def refusing(real: Any, part: str, code: int) -> Any:
    """``real``, but an error for every path with ``part`` in it."""

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str) and part in path:
            raise OSError(code, os.strerror(code), path)
        return real(path, *args, **kwargs)

    return call


@root_only
@pytest.mark.parametrize("which", ["metacopy", "redirect"])
def test_no_mark_is_left_behind_without_a_word(space: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with two names has both marks; the host refuses to remove one of them."""
    for name in ("lower", "upper", "work"):
        (space / name).mkdir()
    (space / "lower" / "f").write_bytes(b"old data")
    os.link(space / "lower" / "f", space / "lower" / "g")
    view = View([str(space / "lower")], str(space / "upper"), str(space / "work"))
    node = view.lookup(view.root, b"f")
    view.setattr(node, mode=0o600)
    real, refused = xattr.remove, getattr(view.form, which)

    def remove(dirfd: int, name: bytes | None, attribute: bytes | str) -> None:
        if attribute == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(dirfd, name, attribute)

    monkeypatch.setattr(xattr, "remove", remove)
    with pytest.raises(OSError) as caught:
        view.write(node, 0, b"new")
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    view.close()
    again = View([str(space / "lower")], str(space / "upper"), str(space / "work"))
    assert Paths(again).read_bytes("f") == Paths(again).read_bytes("g") == b"old data"
    again.close()


@root_only
def test_a_layer_is_not_given_up_while_a_part_of_the_upper_one_cannot_be_read(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metacopies in a directory that the host does not open would lose their data with the layer beneath."""
    for name in ("bottom", "middle", "upper", "work"):
        (space / name).mkdir()
    (space / "middle" / "dir").mkdir()
    (space / "middle" / "dir" / "f").write_bytes(b"data of the middle")
    view = View([str(space / "bottom"), str(space / "middle")], str(space / "upper"), str(space / "work"))
    directory = view.lookup(view.root, b"dir")
    assert isinstance(directory, Dir)
    node = view.lookup(directory, b"f")
    view.setattr(node, mode=0o600)
    real = files.open_beneath
    upper = view.layers[-1].root.open()

    def open_beneath(dirfd: int, path: bytes, *args: Any, **kwargs: Any) -> int:
        if dirfd == upper and path == b"dir":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(dirfd, path, *args, **kwargs)

    monkeypatch.setattr(files, "open_beneath", open_beneath)
    with pytest.raises(OSError) as caught:
        absorb.absorb(view)
    assert caught.value.errno == errno.EIO
    view.close()


def test_a_note_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch or a squash that was half done is neither taken back nor are its layers garbage because of an I/O error."""
    note = tmp_path / f"{SQUASH}1.json"
    note.write_text('{"old": ["7"]}')
    monkeypatch.setattr(os, "open", refusing(os.open, SQUASH, errno.EIO))
    for read in (lambda: read_switch(str(note)), lambda: spared(str(tmp_path))):
        with pytest.raises(OSError) as caught:
            read()
        assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    assert spared(str(tmp_path)) == {"7"}
    note.write_text('{"ol')  # its writer was killed
    assert spared(str(tmp_path)) == set() and read_switch(str(note)) is None
    note.unlink()
    assert spared(str(tmp_path)) == set() and read_switch(str(note)) is None


@root_only
def test_gc_keeps_layers_while_a_note_cannot_be_read(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running mounts may still read what a squash replaced: without its note nobody knows what that is."""
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        kept = space / "store" / "layers" / "77"
        kept.mkdir()
        (kept / "data").write_text("a mount reads this")
        note = space / "store" / f"{SQUASH}9.json"
        note.write_text('{"old": ["77"], "child": 0}')
        monkeypatch.setattr(os, "open", refusing(os.open, SQUASH, errno.EIO))
        with pytest.raises((OSError, CowfsError)):
            store.gc()
        assert (kept / "data").exists() and note.exists()
        monkeypatch.undo()


def test_a_mark_of_a_volatile_mount_that_cannot_be_read_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upper that may be incomplete is not used because its mark cannot be listed."""
    work = tmp_path / "work"
    (work / "work" / "incompat" / "volatile").mkdir(parents=True)
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, "incompat", errno.EIO))
    with pytest.raises(OSError) as caught:
        check_volatile(str(work), volatile=True, upper=str(tmp_path))
    assert caught.value.errno == errno.EIO


@root_only
@pytest.mark.parametrize("which", ["metacopy", "redirect"])
def test_a_row_file_made_of_a_metacopy_keeps_its_data(space: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses to remove a mark while a metacopy becomes a redirect file: the write says so, the data is still the old."""
    for name in ("lower", "upper", "work"):
        (space / name).mkdir()
    body = os.urandom(20000)
    (space / "lower" / "f").write_bytes(body)
    os.link(space / "lower" / "f", space / "lower" / "g")
    plain = View([str(space / "lower")], str(space / "upper"), str(space / "work"))
    plain.setattr(plain.lookup(plain.root, b"f"), mode=0o600)
    plain.close()

    def opened() -> View:
        return View([str(space / "lower")], str(space / "upper"), str(space / "work"), options=Options(row=4096))

    view = opened()
    node = view.lookup(view.root, b"f")
    real, refused = xattr.remove, getattr(view.form, which)

    def remove(dirfd: int, name: bytes | None, attribute: bytes | str) -> None:
        if attribute == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(dirfd, name, attribute)

    monkeypatch.setattr(xattr, "remove", remove)
    with pytest.raises(OSError) as caught:
        view.write(node, 4096, b"new")
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    assert Paths(view).read_bytes("f") == body
    view.close()
    again = opened()
    assert Paths(again).read_bytes("f") == Paths(again).read_bytes("g") == body
    again.write(again.lookup(again.root, b"g"), 4096, b"new")
    assert Paths(again).read_bytes("f") == body[:4096] + b"new" + body[4099:]
    again.close()
