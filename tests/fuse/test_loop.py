"""The session on a real mount: operations, order, work elsewhere, and what must not end the server."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from support.memory_view import MemoryView

from cowfs.fuse import Session, abi, codec
from cowfs.sys import mounts

# -- operations -------------------------------------------------------------------------------


def test_a_file_can_be_written_read_renamed_linked_and_removed(mnt: Any) -> None:
    with open(mnt / "a", "wb") as file:
        file.write(b"hello")
    os.link(mnt / "a", mnt / "b")
    os.rename(mnt / "a", mnt / "c")
    with open(mnt / "b", "rb") as file:
        assert file.read() == b"hello"
    assert os.stat(mnt / "c").st_nlink == 2
    os.unlink(mnt / "b")
    assert os.listdir(mnt.path) == ["c"]
    assert os.stat(mnt / "c").st_nlink == 1


def test_an_unlinked_file_stays_usable_while_it_is_open(mnt: Any) -> None:
    fd = os.open(mnt / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"one")
    os.unlink(mnt / "f")
    os.pwrite(fd, b"two", 3)
    assert os.pread(fd, 10, 0) == b"onetwo"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_an_unlinked_file_is_forgotten_once_closed(mnt: Any) -> None:
    fd = os.open(mnt / "f", os.O_RDWR | os.O_CREAT)
    node = mnt.node("f")
    os.unlink(mnt / "f")
    assert mnt.session.call(lambda: node.id in mnt.view.nodes)
    os.close(fd)
    assert mnt.eventually(lambda: node.id not in mnt.view.nodes)


def test_special_files_keep_type_and_device(mnt: Any) -> None:
    os.mkfifo(mnt / "fifo", 0o640)
    os.mknod(mnt / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(mnt / "big", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    with socket.socket(socket.AF_UNIX) as sock:
        previous = os.getcwd()
        os.chdir(mnt.path)
        sock.bind("sock")
        os.chdir(previous)
    found = {name: os.lstat(mnt / name) for name in ("fifo", "null", "big", "sock")}
    assert stat.S_ISFIFO(found["fifo"].st_mode)
    assert stat.S_ISSOCK(found["sock"].st_mode)
    assert found["null"].st_rdev == os.makedev(1, 3)
    assert found["big"].st_rdev == os.makedev(259, 70000)


def test_the_umask_is_left_to_the_view(mnt: Any) -> None:
    previous = os.umask(0o027)
    try:
        os.close(os.open(mnt / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(mnt / "d", 0o777)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(mnt / "f").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(mnt / "d").st_mode) == 0o750


def test_truncation_at_open_empties_the_file(mnt: Any) -> None:
    with open(mnt / "f", "wb") as file:
        file.write(b"content")
    os.close(os.open(mnt / "f", os.O_WRONLY | os.O_TRUNC))
    assert os.stat(mnt / "f").st_size == 0


def test_times_are_kept_to_the_nanosecond_and_before_1970(mnt: Any) -> None:
    os.close(os.open(mnt / "f", os.O_CREAT | os.O_WRONLY))
    for atime, mtime in ((1_000_000_001, 2_000_000_003), (-5, -(10**18) + 7), (2**33 * 10**9 + 1, 0)):
        os.utime(mnt / "f", ns=(atime, mtime))
        found = os.stat(mnt / "f")
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime, mtime)


def test_a_setuid_bit_does_not_survive_a_write_by_another_user(mnt: Any) -> None:
    with open(mnt / "f", "wb") as file:
        file.write(b"x")
    os.chmod(mnt / "f", 0o4777)
    mnt.python("import os; os.setuid(1); open('f', 'r+b').write(b'y')")
    assert stat.S_IMODE(os.stat(mnt / "f").st_mode) == 0o777


@pytest.mark.parametrize("how", ["os.truncate('f', 0)", "os.chown('f', 1, 1)"])
def test_a_setuid_bit_does_not_survive_truncate_and_chown(mnt: Any, how: str) -> None:
    with open(mnt / "f", "wb") as file:
        file.write(b"x")
    os.chmod(mnt / "f", 0o4777)
    user = "" if "chown" in how else "os.setuid(1); "
    mnt.python(f"import os; {user}{how}")
    assert stat.S_IMODE(os.stat(mnt / "f").st_mode) == 0o777


def test_permissions_are_checked_by_the_kernel(mnt: Any) -> None:
    with open(mnt / "f", "wb") as file:
        file.write(b"secret")
    os.chmod(mnt / "f", 0o600)
    out = mnt.python("import os; os.setuid(1)\ntry: open('f')\nexcept PermissionError: print('no')")
    assert out == "no\n"


def test_extended_attributes(mnt: Any) -> None:
    os.mkdir(mnt / "d")
    os.setxattr(mnt / "d", "user.a", b"1" * 5000)
    os.setxattr(mnt / "d", "user.b", b"")
    assert sorted(os.listxattr(mnt / "d")) == ["user.a", "user.b"]
    assert os.getxattr(mnt / "d", "user.a") == b"1" * 5000
    assert os.getxattr(mnt / "d", "user.b") == b""
    with pytest.raises(FileExistsError):
        os.setxattr(mnt / "d", "user.a", b"", os.XATTR_CREATE)
    os.removexattr(mnt / "d", "user.a")
    with pytest.raises(OSError) as caught:
        os.getxattr(mnt / "d", "user.a")
    assert caught.value.errno == errno.ENODATA


def test_a_large_file_comes_back_as_it_was_written(mnt: Any) -> None:
    data = os.urandom(3 << 20) + b"tail"
    with open(mnt / "f", "wb") as file:
        file.write(data)
    mnt.session.notifier.inval_inode(mnt.node("f").id)
    assert mnt.session.notifier.flush(10)
    with open(mnt / "f", "rb") as file:
        assert file.read() == data


def test_holes_allocation_and_copies(mnt: Any) -> None:
    fd = os.open(mnt / "f", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x", 1 << 20)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
    assert (
        os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096 or os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 1
    )
    os.posix_fallocate(fd, 0, 2 << 20)
    assert os.fstat(fd).st_size == 2 << 20
    out = os.open(mnt / "g", os.O_RDWR | os.O_CREAT)
    assert os.copy_file_range(fd, out, 100, 1 << 20, 5) == 100
    assert os.pread(out, 10, 0) == bytes(5) + b"x" + bytes(4)
    os.close(fd)
    os.close(out)


def test_a_nameless_file_can_be_given_a_name(mnt: Any) -> None:
    fd = os.open(mnt.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"late")
    os.link(f"/proc/self/fd/{fd}", mnt / "named", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    with open(mnt / "named", "rb") as file:
        assert file.read() == b"late"


def test_statfs_is_the_view_s(mnt: Any) -> None:
    found = os.statvfs(mnt.path)
    assert (found.f_blocks, found.f_bavail, found.f_files, found.f_namemax) == (1000, 500, 100, 255)


def test_a_name_of_255_bytes_works_and_one_more_does_not(mnt: Any) -> None:
    os.mkdir(mnt / ("n" * 255))
    assert os.listdir(mnt.path) == ["n" * 255]
    for call in (os.stat, os.mkdir):
        with pytest.raises(OSError) as caught:
            call(mnt / ("n" * 256))
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_listing_longer_than_any_buffer_is_whole(mnt: Any) -> None:
    names = {f"{index:05}-{'x' * (index % 200)}" for index in range(3000)}

    def fill() -> None:
        for name in names:
            mnt.view.mknod(mnt.view.root, name.encode(), stat.S_IFREG | 0o644, 0, 0, 0, 0)

    mnt.session.call(fill)
    assert set(os.listdir(mnt.path)) == names
    with os.scandir(mnt.path) as entries:
        assert all(entry.is_file() and entry.inode() == entry.stat().st_ino for entry in entries)


def test_a_shared_map_is_written_back(mnt: Any) -> None:
    with open(mnt / "f", "wb") as file:
        file.write(bytes(8192))
    mnt.python(
        "import mmap, os\n"
        "fd = os.open('f', os.O_RDWR)\n"
        "with mmap.mmap(fd, 8192) as m:\n"
        "    m[5000:5004] = b'here'\n"
        "    m.flush()\n"
    )
    with open(mnt / "f", "rb") as file:
        assert file.read()[5000:5004] == b"here"


def test_a_file_handle_finds_its_node_again_after_it_was_forgotten(mnt: Any) -> None:
    from cowfs.sys import files

    os.mkdir(mnt / "d")
    with open(mnt / "d/f", "wb") as file:
        file.write(b"found")
    dirfd = os.open(mnt / "d", os.O_RDONLY)
    kind, handle = files.file_handle(dirfd, b"f")
    os.close(dirfd)
    node = mnt.node("d/f")
    mnt.session.notifier.inval_entry(mnt.node("d").id, b"f")
    assert mnt.session.notifier.flush(10)
    assert mnt.eventually(lambda: node.id not in mnt.view.nodes)
    root = os.open(mnt.path, os.O_RDONLY)
    fd = files.open_handle(root, kind, handle, os.O_RDONLY)
    assert os.read(fd, 10) == b"found"
    os.close(fd)
    os.close(root)


# -- what the kernel counts -------------------------------------------------------------------


def test_look_ups_and_forgets_cancel_out(mnt: Any) -> None:
    for index in range(50):
        os.mkdir(mnt / f"d{index}")
        with open(mnt / f"d{index}/f", "wb") as file:
            file.write(b"x")
    list(os.walk(mnt.path))
    for index in range(50):
        os.stat(mnt / f"d{index}/f")
        os.unlink(mnt / f"d{index}/f")
        os.rmdir(mnt / f"d{index}")
    assert mnt.eventually(lambda: list(mnt.view.nodes) == [1])


def test_a_reply_that_nobody_takes_is_not_counted() -> None:
    view = MemoryView()
    node = view.mkdir(view.root, b"d", 0o755, 0, 0, 0)
    node.nlookup = 2
    ours, theirs = os.pipe()  # stands for a connection that takes no reply: only _unsent is under test
    session = Session(ours, view)
    session._unsent(abi.LOOKUP, codec.entry(1, node.id, 1, bytes(88)), OSError(errno.ENOENT, ""))
    assert node.nlookup == 1
    session._unsent(abi.LOOKUP, codec.entry(1, node.id, 1, bytes(88)), OSError(errno.ENODEV, ""))
    assert node.nlookup == 1
    os.close(ours)
    os.close(theirs)
    view.close()


# -- work elsewhere ---------------------------------------------------------------------------


def make(mnt: Any, name: str, data: bytes = b"old data") -> Any:
    with open(mnt / name, "wb") as file:
        file.write(data)
    return mnt.node(name)


def in_thread(fn: Any) -> threading.Thread:
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    return thread


def test_a_large_copy_up_runs_on_a_worker_and_others_go_on(mnt: Any) -> None:
    node = make(mnt, "slow")
    stage = mnt.view.delay(node)
    fd = os.open(mnt / "slow", os.O_RDWR)
    writer = in_thread(lambda: os.pwrite(fd, b"new", 0))
    assert stage.started.wait(10)
    make(mnt, "other", b"fast")
    assert sorted(os.listdir(mnt.path)) == ["other", "slow"]
    assert os.stat(mnt / "slow").st_size == 8
    assert writer.is_alive()
    stage.gate.set()
    writer.join(10)
    assert not writer.is_alive()
    assert mnt.view.published == [node]
    assert stage.thread not in (mnt.thread.ident, threading.get_ident())
    assert os.pread(fd, 10, 0) == b"new data"
    os.close(fd)


def test_a_small_copy_up_is_done_at_once(mnt: Any) -> None:
    node = make(mnt, "f")
    stage = mnt.view.delay(node, small=True)
    stage.gate.set()
    with open(mnt / "f", "r+b") as file:
        file.write(b"new")
    assert stage.thread == mnt.thread.ident
    assert mnt.view.published == [node]


def test_a_failed_copy_up_is_the_answer_of_the_request_that_caused_it(mnt: Any) -> None:
    node = make(mnt, "f")
    stage = mnt.view.delay(node, errno.ENOSPC)
    stage.gate.set()
    fd = os.open(mnt / "f", os.O_RDWR)
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"new", 0)
    assert caught.value.errno == errno.ENOSPC
    assert os.pwrite(fd, b"new", 0) == 3  # the next one tries again
    os.close(fd)


def test_a_killed_writer_is_let_go_and_its_copy_up_cancelled(mnt: Any) -> None:
    node = make(mnt, "f")
    stage = mnt.view.delay(node)
    process = subprocess.Popen([sys.executable, "-c", "open('f', 'r+b', buffering=0).write(b'x')"], cwd=mnt.path)
    assert stage.started.wait(10)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert stage.cancelled
    with open(mnt / "f", "rb") as file:
        assert file.read() == b"old data"


def test_a_signal_that_does_not_kill_does_not_interrupt(mnt: Any) -> None:
    node = make(mnt, "f")
    stage = mnt.view.delay(node)
    code = "import signal; signal.signal(signal.SIGUSR1, lambda *a: None); open('f', 'r+b', buffering=0).write(b'x')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=mnt.path)
    assert stage.started.wait(10)
    process.send_signal(signal.SIGUSR1)
    assert mnt.eventually(lambda: mnt.session.counters.get("INTERRUPT", 0) > 0)
    os.statvfs(mnt.path)  # answered behind it
    assert process.poll() is None
    assert not stage.cancelled
    stage.gate.set()
    assert process.wait(10) == 0
    with open(mnt / "f", "rb") as file:
        assert file.read() == b"xld data"


def test_a_killed_process_that_waits_behind_a_copy_up_is_let_go(mnt: Any) -> None:
    node = make(mnt, "f", bytes(1 << 20))
    mnt.session.notifier.inval_inode(node.id)
    assert mnt.session.notifier.flush(10)
    stage = mnt.view.delay(node)
    fd = os.open(mnt / "f", os.O_RDWR)
    writer = in_thread(lambda: os.pwrite(fd, b"new", 0))
    assert stage.started.wait(10)
    process = subprocess.Popen(["tail", "-c", "1", "f"], cwd=mnt.path, stdout=subprocess.DEVNULL)
    assert mnt.eventually(lambda: bool(mnt.session._errands.gates.nodes[node.id].queue))
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert not stage.cancelled
    stage.gate.set()
    writer.join(10)
    assert not writer.is_alive()
    os.close(fd)


def test_a_slow_fsync_holds_nobody_back(mnt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make(mnt, "f")
    entered, leave = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        entered.set()
        leave.wait(20)

    fd = os.open(mnt / "f", os.O_RDWR)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", slow)
    thread = in_thread(lambda: real(fd))
    assert entered.wait(10)
    make(mnt, "g", b"fast")  # (a write to the same file waits in the kernel, for the inode's lock)
    assert os.pread(fd, 8, 0) == b"old data"
    assert thread.is_alive()
    leave.set()
    thread.join(10)
    assert not thread.is_alive()
    os.close(fd)


def test_a_failed_fsync_is_reported(mnt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make(mnt, "f")
    fd = os.open(mnt / "f", os.O_RDWR)
    real = os.fsync

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError) as caught:
        real(fd)
    assert caught.value.errno == errno.EIO
    os.close(fd)


# -- robustness -------------------------------------------------------------------------------


def test_an_unforeseen_exception_is_logged_with_its_traceback_and_answered_eio(
    mnt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def bug() -> None:
        raise ZeroDivisionError("a bug")

    mnt.view.hooks = {"mkdir": bug}
    with caplog.at_level(logging.ERROR, "cowfs.fuse"), pytest.raises(OSError) as caught:
        os.mkdir(mnt / "d")
    assert caught.value.errno == errno.EIO
    assert any(record.exc_info and "MKDIR" in record.message for record in caplog.records)
    mnt.view.hooks = {}
    os.mkdir(mnt / "d")
    assert os.listdir(mnt.path) == ["d"]


def test_an_exception_in_forget_is_logged_and_not_answered(mnt: Any, caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> None:
        mnt.view.hooks = {}
        raise ZeroDivisionError("a bug")

    os.mkdir(mnt / "d")
    with caplog.at_level(logging.ERROR, "cowfs.fuse"):
        mnt.view.hooks = {"forget": bug}
        os.rmdir(mnt / "d")
        os.mkdir(mnt / "e")
        deadline = time.monotonic() + 5
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [record.message.split()[0] for record in caplog.records] in (["FORGET"], ["BATCH_FORGET"])
    assert os.listdir(mnt.path) == ["e"]


def test_errors_keep_their_errno(mnt: Any) -> None:
    for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EXDEV, errno.ESTALE):

        def refuse(code: int = code) -> None:
            raise OSError(code, "as told")

        mnt.view.hooks = {"mkdir": refuse}
        with pytest.raises(OSError) as caught:
            os.mkdir(mnt / "d")
        assert caught.value.errno == code


# -- the life of a session --------------------------------------------------------------------


def test_unmounting_ends_the_session_without_an_error(serve: Any) -> None:
    served = serve()
    mounts.umount(served.path)
    served.thread.join(10)
    assert not served.thread.is_alive()
    assert served.failure is None
    with pytest.raises(OSError) as caught:
        served.session.call(lambda: 1)
    assert caught.value.errno == errno.ENODEV


def test_stop_ends_the_session_and_leaves_the_mount_dead(serve: Any) -> None:
    served = serve()
    served.session.stop()
    served.thread.join(10)
    assert not served.thread.is_alive()
    with pytest.raises(OSError) as caught:
        os.statvfs(served.path)
    assert caught.value.errno == errno.ENOTCONN


def test_call_runs_in_the_loop_thread_and_returns_or_raises(mnt: Any) -> None:
    assert mnt.session.call(threading.get_ident) == mnt.thread.ident
    assert mnt.session.call(lambda: mnt.session.call(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        mnt.session.call(lambda: 1 // 0)


def test_call_is_served_while_requests_never_cease(mnt: Any) -> None:
    stop = threading.Event()

    def hammer() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                os.stat(mnt / f"missing{number}")
            except FileNotFoundError:
                pass

    thread = in_thread(hammer)
    try:
        for _ in range(20):
            assert mnt.session.call(lambda: True)
    finally:
        stop.set()
        thread.join(10)


def test_counters_are_by_name(mnt: Any) -> None:
    mnt.mark()
    for index in range(3):
        os.mkdir(mnt / f"d{index}")
    assert mnt.asked()["MKDIR"] == 3
    assert set(mnt.session.counters) <= set(abi.OPCODES)


def test_the_trace_has_one_line_a_request(serve: Any) -> None:
    trace = io.StringIO()
    served = serve(trace=trace)
    trace.truncate(0)
    trace.seek(0)
    served.mark()
    os.mkdir(served / "d")
    with pytest.raises(FileNotFoundError):
        os.stat(served / "missing")
    with pytest.raises(OSError):
        os.rmdir(served / "missing2")
    asked = served.asked()
    lines = trace.getvalue().splitlines()
    assert len(lines) == sum(asked.values())
    assert any(" MKDIR 1 'd' mode=" in line and " = ok 128 " in line for line in lines)
    assert any(" LOOKUP 1 'missing' = ok 128 " in line for line in lines)
    assert all(line.endswith("us") for line in lines)


def test_a_bug_is_in_the_trace(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    trace = io.StringIO()
    served = serve(trace=trace)

    def bug() -> None:
        raise ZeroDivisionError("a bug")

    served.view.hooks = {"mkdir": bug}
    with pytest.raises(OSError):
        os.mkdir(served / "d")
    assert "MKDIR 1 'd'" in trace.getvalue()
    assert "ZeroDivisionError -> EIO" in trace.getvalue()


def test_a_sequential_reader_asks_for_half_a_mebibyte_at_a_time(mnt: Any) -> None:
    data = os.urandom(8 << 20)
    node = make(mnt, "f", data)
    with open(f"/proc/self/fdinfo/{mnt.session._fd}", encoding="ascii") as file:
        if "fuse_connection" not in file.read():
            pytest.skip("the kernel does not name the connection in fdinfo (Linux 6.17)")
    mnt.session.notifier.inval_inode(node.id)
    assert mnt.session.notifier.flush(10)
    mnt.mark()
    with open(mnt / "f", "rb", buffering=0) as file:
        assert file.read() == data
    assert mnt.asked()["READ"] <= 20  # 64 with the kernel's default


def test_what_the_session_sets_for_its_process_is_put_back(serve: Any) -> None:
    import gc

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    served = serve()
    assert served.session.call(lambda: gc.get_threshold()[2]) > 10**9
    assert served.session.call(sys.getswitchinterval) <= 0.0005 + 1e-9
    mounts.umount(served.path)
    served.thread.join(10)
    assert (sys.getswitchinterval(), gc.get_threshold()) == (interval, thresholds)
