"""Copy-ups of large files, on the real view: on a worker, whatever the operation that caused them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cowfs.fuse.handlers import data
from cowfs.sys import files
from cowfs.union import Options, View

SIZE = 8 << 20


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Copies of data wait for ``leave``; ``entered`` tells that one began; ``threads`` who made them."""

    class Slow:
        entered, leave = threading.Event(), threading.Event()
        threads: list[str] = []  # noqa: RUF012 - one fixture, one class

    real = files.copy_data

    def copy(*arguments: Any, **options: Any) -> Any:
        Slow.threads.append(threading.current_thread().name)
        if arguments[2] > 1 << 20:
            Slow.entered.set()
            assert Slow.leave.wait(30)
        return real(*arguments, **options)

    monkeypatch.setattr(files, "copy_data", copy)
    yield Slow
    Slow.leave.set()


@pytest.fixture
def mounted(serve: Any, layers: Path) -> Any:
    """``mounted(form, **SessionOptions)``: a mount whose only layer has "big" (8 MiB), "d" and "small"."""
    (layers / "lower/big").write_bytes(b"b" * SIZE)
    (layers / "lower/small").write_bytes(b"s")
    (layers / "lower/d").mkdir()
    for path in ("lower", "upper"):
        (layers / path).chmod(0o755)

    def start(form: str, **session: Any) -> Any:
        view = View(
            [bytes(layers / "lower")], bytes(layers / "upper"), bytes(layers / "work"), options=Options(form=form)
        )
        mnt = serve(view, **session)
        os.listdir(mnt.path)
        for name in ("big", "small", "d"):
            os.stat(mnt / name)
        return mnt

    return start


def append(mnt: Any) -> None:
    with open(mnt / "big", "ab") as file:
        file.write(b"!")


def exchange(one: str, other: str) -> None:
    files.rename2(-100, os.fsencode(one), -100, os.fsencode(other), files.RENAME_EXCHANGE)


CHANGES: dict[str, Callable[[Any], object]] = {
    "write": append,
    "truncate": lambda mnt: os.truncate(mnt / "big", SIZE - 1),
    "chmod": lambda mnt: os.chmod(mnt / "big", 0o600),
    "utime": lambda mnt: os.utime(mnt / "big", (1, 1)),
    "setxattr": lambda mnt: os.setxattr(mnt / "big", "user.a", b"1"),
    "link": lambda mnt: os.link(mnt / "big", mnt / "d/two"),
    "rename": lambda mnt: os.rename(mnt / "big", mnt / "d/moved"),
    "exchange": lambda mnt: exchange(mnt / "small", mnt / "big"),
}
METADATA = ("chmod", "utime", "setxattr", "link", "rename", "exchange")


def run(mnt: Any, change: Callable[[Any], object]) -> threading.Thread:
    thread = threading.Thread(target=change, args=(mnt,), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("what", CHANGES)
def test_in_the_user_form_every_change_of_a_large_file_copies_on_a_worker(mounted: Any, slow: Any, what: str) -> None:
    mnt = mounted("user")
    thread = run(mnt, CHANGES[what])
    assert slow.entered.wait(10)
    assert os.stat(mnt / "small").st_size == 1
    assert (mnt.path / "small").read_bytes() == b"s"
    if what not in ("link", "rename", "exchange"):  # (the kernel keeps others out of the directories of these)
        (mnt.path / "d/new").write_bytes(b"x")
        assert os.listdir(mnt / "d") == ["new"]
    assert thread.is_alive()
    slow.leave.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(slow.threads) == (2 if what == "exchange" else 1)
    assert all(name.startswith("cowfs-worker") for name in slow.threads)
    name = {"rename": "d/moved", "link": "d/two", "exchange": "small"}.get(what, "big")
    expected = {"write": b"b" * SIZE + b"!", "truncate": b"b" * (SIZE - 1)}.get(what, b"b" * SIZE)
    assert (mnt.path / name).read_bytes() == expected


@pytest.mark.parametrize("what", METADATA)
def test_in_the_trusted_form_no_data_is_copied_for_metadata(mounted: Any, slow: Any, what: str) -> None:
    mnt = mounted("trusted")
    CHANGES[what](mnt)
    assert slow.threads == []
    name = {"rename": "d/moved", "link": "d/two", "exchange": "small"}.get(what, "big")
    assert (mnt.path / name).read_bytes() == b"b" * SIZE


# A WRITE holds the inode's lock in the client's kernel, so that nobody else changes the file. An OPEN does not, which
# is why these use passthrough: there the open for writing copies up.


@pytest.fixture
def opening(mounted: Any, slow: Any) -> Any:
    """A passthrough mount in which somebody opens "big" for writing, and its copy-up has begun."""
    mnt = mounted("trusted", io="passthrough")
    if mnt.session.agreement.mode != "passthrough":
        pytest.skip("the kernel has no FUSE_PASSTHROUGH (Linux 6.9)")
    mnt.descriptors = []
    mnt.opener = run(mnt, lambda mnt: mnt.descriptors.append(os.open(mnt / "big", os.O_RDWR)))
    assert slow.entered.wait(10)
    return mnt


def finish(mnt: Any, slow: Any) -> int:
    slow.leave.set()
    mnt.opener.join(10)
    assert not mnt.opener.is_alive()
    (fd,) = mnt.descriptors
    os.pwrite(fd, b"new", 0)
    return int(fd)


def test_a_rename_during_a_copy_up_ends_with_the_new_data_under_the_new_name(opening: Any, slow: Any) -> None:
    os.rename(opening / "big", opening / "d/moved")
    os.close(finish(opening, slow))
    assert (opening.path / "d/moved").read_bytes() == b"new" + b"b" * (SIZE - 3)
    assert not (opening.path / "big").exists()


def test_a_file_removed_during_its_copy_up_is_gone_and_its_opener_content(opening: Any, slow: Any) -> None:
    os.unlink(opening / "big")
    assert set(os.listdir(opening.path)) == {"small", "d"}
    fd = finish(opening, slow)
    assert os.pread(fd, 5, 0) == b"newbb"
    assert os.fstat(fd).st_size == SIZE
    os.close(fd)


def test_a_chmod_during_a_copy_up_is_kept(opening: Any, slow: Any) -> None:
    thread = run(opening, lambda mnt: os.chmod(mnt / "big", 0o600))
    os.close(finish(opening, slow))
    thread.join(10)
    found = os.stat(opening / "big")
    assert found.st_mode & 0o777 == 0o600
    assert (opening.path / "big").read_bytes()[:5] == b"newbb"


def test_a_copy_that_fails_unforeseen_publishes_nothing(
    mounted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mnt = mounted("trusted")

    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(files, "copy_data", bug)
    fd = os.open(mnt / "big", os.O_RDWR)
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"new", 0)
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    assert os.pread(fd, 5, 0) == b"bbbbb"
    assert os.pwrite(fd, b"new", 0) == 3
    os.close(fd)
    assert (mnt.path / "big").read_bytes() == b"new" + b"b" * (SIZE - 3)


def test_two_writers_of_one_file_copy_it_once(mounted: Any, slow: Any) -> None:
    mnt = mounted("trusted")
    fds = [os.open(mnt / "big", os.O_RDWR) for _ in range(2)]
    writers = [run(mnt, partial(lambda fd, at, _: os.pwrite(fd, b"new", at), fd, at)) for at, fd in enumerate(fds)]
    assert slow.entered.wait(10)
    slow.leave.set()
    for writer in writers:
        writer.join(10)
        assert not writer.is_alive()
    assert len(slow.threads) == 1
    for fd in fds:
        os.close(fd)


def test_a_file_read_in_sequence_is_copied_by_workers(mounted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mnt = mounted("trusted")
    threads = []
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        threads.append(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    assert (mnt.path / "big").read_bytes() == b"b" * SIZE
    assert [name for name in threads if name.startswith("cowfs-worker")]


def test_reads_that_workers_answered_hold_nothing_back(mounted: Any) -> None:
    mnt = mounted("trusted")
    (mnt.path / "big").read_bytes()
    append(mnt)
    assert (mnt.path / "big").read_bytes() == b"b" * SIZE + b"!"
    assert mnt.eventually(lambda: not mnt.session.call(mnt.session.has_held_requests))


@pytest.mark.parametrize("volatile", [False, True], ids=["kept", "volatile"])
def test_the_host_begins_to_write_a_long_file_before_its_fsync(
    serve: Any, layers: Path, monkeypatch: pytest.MonkeyPatch, volatile: bool
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(files, "begin_writing", lambda fd, offset, length: begun.append((offset, length)))
    monkeypatch.setattr(data, "EARLY", 2 << 20)
    view = View(
        [bytes(layers / "lower")], bytes(layers / "upper"), bytes(layers / "work"), options=Options(volatile=volatile)
    )
    mnt = serve(view)
    (mnt.path / "long").write_bytes(b"x" * SIZE)
    (mnt.path / "short").write_bytes(b"x" * (1 << 20))
    if volatile:
        assert begun == []
    else:
        assert mnt.eventually(lambda: sum(length for _, length in begun) == SIZE), begun


def test_beginning_to_write_a_range_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    with path.open("r+b") as file:
        files.begin_writing(file.fileno(), 0, 200_000)
    files.begin_writing(-1, 0, 1)  # not even an error
    assert path.read_bytes() == b"x" * 100_000
