"""The front end through libfuse 2: what is special to it. (tests/e2e runs everything else against it.)"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.memory_view import MemoryView

from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.fuse import abi
from cowfs.fuse.portable import Operations, PortableSession
from cowfs.sys import mounts

pytest.importorskip("fuse", reason="needs fusepy and libfuse 2", exc_type=(ImportError, OSError))  # type: ignore[arg-type]


@pytest.fixture
def mnt(tmp_path: Path, can_mount: None) -> Iterator[Path]:
    """A view in memory, served by libfuse in a process of its own."""
    path = tmp_path / "mnt"
    path.mkdir()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            session = PortableSession(path, MemoryView())
            threading.Thread(target=lambda: (session.ready.wait(), os.write(writing, b"!")), daemon=True).start()
            session.run()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    os.statvfs(path)
    yield path
    mounts.umount(path, mounts.MNT_DETACH | mounts.MNT_FORCE)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)


def test_an_unlinked_open_file_has_no_name_and_no_links_and_works(mnt: Path) -> None:
    with open(mnt / "f", "w+b", buffering=0) as file:
        file.write(b"one")
        os.unlink(mnt / "f")
        assert os.listdir(mnt) == []
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"two")
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 5)
        assert os.pread(file.fileno(), 10, 0) == b"onetw"
    assert os.listdir(mnt) == []


def test_the_directory_of_an_unlinked_open_file_can_be_removed(mnt: Path) -> None:
    os.mkdir(mnt / "d")
    with open(mnt / "d/f", "w+b", buffering=0) as file:
        os.unlink(mnt / "d/f")
        os.rmdir(mnt / "d")
        file.write(b"still")
        assert os.pread(file.fileno(), 10, 0) == b"still"
    assert os.listdir(mnt) == []


def test_a_file_that_is_replaced_while_open_keeps_its_content_for_who_has_it(mnt: Path) -> None:
    (mnt / "new").write_bytes(b"new")
    (mnt / "old").write_bytes(b"old")
    with open(mnt / "old", "rb", buffering=0) as file:
        os.rename(mnt / "new", mnt / "old")
        assert file.read() == b"old"
    assert (mnt / "old").read_bytes() == b"new"
    assert os.listdir(mnt) == ["old"]


def test_names_may_hold_any_bytes(mnt: Path) -> None:
    names = [b"\xff\xfe", "é".encode(), b"new\nline", b"back\\slash", bytes(range(1, 47)) + bytes(range(48, 256))]
    for name in names:
        os.symlink(name, bytes(mnt) + b"/" + name)
    assert sorted(os.listdir(bytes(mnt))) == sorted(names)
    for name in names:
        assert os.readlink(bytes(mnt) + b"/" + name) == name


def test_now_and_omit_are_told_from_times_that_look_like_them(mnt: Path) -> None:
    (mnt / "f").touch()
    almost = (1 << 30) - 1  # UTIME_NOW, as nanoseconds
    os.utime(mnt / "f", ns=(almost, almost - 1))
    found = os.stat(mnt / "f")
    assert (found.st_atime_ns, found.st_mtime_ns) == (almost, almost - 1)
    os.utime(mnt / "f", ns=(-1, -(10**18)))
    found = os.stat(mnt / "f")
    assert (found.st_atime_ns, found.st_mtime_ns) == (-1, -(10**18))


def test_allocating_works_although_fusepy_has_no_slot_for_it(mnt: Path) -> None:
    with open(mnt / "f", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 10000)
    assert os.stat(mnt / "f").st_size == 10000


def test_both_names_of_a_file_show_its_size(mnt: Path) -> None:
    (mnt / "a").write_bytes(b"1")
    os.link(mnt / "a", mnt / "b")
    with open(mnt / "a", "ab") as file:
        file.write(b"23")
    assert os.stat(mnt / "b").st_size == 3
    assert os.stat(mnt / "a").st_ino == os.stat(mnt / "b").st_ino
    assert os.stat(mnt / "b").st_nlink == 2
    assert (mnt / "b").read_bytes() == b"123"


def test_the_mount_is_what_was_asked_for(tmp_path: Path, can_mount: None) -> None:
    session = PortableSession(tmp_path, MemoryView(), ["noatime", "nodev", "ro"], True, "a,b\\c", "cowfs")
    options = session._mount_options
    assert options["fsname"] == "a\\,b\\\\c"
    assert {"noatime", "nodev", "ro", "suid"} <= options.keys()
    assert "dev" not in options
    assert options["allow_other"] is True


# -- without a mount --------------------------------------------------------------------------


def test_a_mount_point_or_option_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        PortableSession(tmp_path / "missing", MemoryView())
    with pytest.raises(InvalidArgument, match="'fast'"):
        PortableSession(tmp_path, MemoryView(), ["fast"])


def test_a_bug_is_logged_and_answered_eio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view = MemoryView()
    operations = Operations(PortableSession(tmp_path, view))

    def bug() -> None:
        raise ZeroDivisionError("a bug")

    view.hooks = {"rmdir": bug}
    view.mkdir(view.root, b"d", 0o755, 0, 0, 0)
    with caplog.at_level(logging.ERROR, "cowfs.fuse"), pytest.raises(OSError) as caught:
        operations("rmdir", "/d")
    assert caught.value.errno == errno.EIO
    assert caplog.records[0].exc_info


def test_operations_are_counted_and_traced(tmp_path: Path) -> None:
    import io

    trace = io.StringIO()
    session = PortableSession(tmp_path, MemoryView(), trace=trace)
    operations = Operations(session)
    operations("getattr", "/", None)
    with pytest.raises(OSError):
        operations("getattr", "/missing", None)
    assert session.counters == {"GETATTR": 2}
    lines = trace.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("GETATTR /missing = ENOENT ")


def test_call_excludes_operations_and_ends_with_the_session(tmp_path: Path) -> None:
    session = PortableSession(tmp_path, MemoryView())
    assert session.call(lambda: session.call(lambda: 5)) == 5
    session._ended = True
    with pytest.raises(OSError) as caught:
        session.call(lambda: 5)
    assert caught.value.errno == errno.ENODEV


def test_nodes_that_nobody_holds_are_dropped_once_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowfs.fuse import portable

    monkeypatch.setattr(portable, "_KEEP_NODES", 10)
    view = MemoryView()
    operations = Operations(PortableSession(tmp_path, view))
    for index in range(30):
        view.mkdir(view.root, b"%d" % index, 0o755, 0, 0, 0)
    held = operations("opendir", "/7")
    operations("getattr", "/", None)
    assert view.root.children is not None
    assert set(view.nodes) == {1, view.root.children[b"7"].id}
    operations("releasedir", "/7", held)


def test_every_notification_is_refused(tmp_path: Path) -> None:
    notifier = PortableSession(tmp_path, MemoryView()).notifier
    assert abi.NOTIFY_INC_EPOCH in notifier.unsupported
    for refuse in (notifier.inc_epoch, lambda: notifier.inval_entry(1, b"x"), lambda: notifier.send(b"")):
        with pytest.raises(OSError) as caught:
            refuse()
        assert caught.value.errno == errno.EOPNOTSUPP


def test_a_mount_that_libfuse_cannot_make_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = PortableSession(tmp_path, MemoryView())

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError(1)

    monkeypatch.setattr(session, "_fuse", refused)
    with pytest.raises(FailedPrecondition, match="libfuse could not mount"):
        session.run()
