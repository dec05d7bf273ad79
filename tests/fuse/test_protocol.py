"""The session with the test as its kernel: what it refuses, and the order of what it answers.

The kernel itself holds an inode's lock over most requests; what it lets through at once, and what it would never send,
is tested by hand.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.memory_view import MemoryView

from cowfs.fuse import Session, abi, codec
from cowfs.union.bound import Awaited


class Pair:
    """A session on one end of a packet socket: the test plays the kernel, and may send anything."""

    def __init__(self, view: MemoryView) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(5)
        self.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.view = view
        self.session = Session(device.detach(), view)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.session.run()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.failure = error

    def send(
        self, opcode: int, body: bytes = b"", *, unique: int = 2, nodeid: int = 1, length: int | None = None
    ) -> None:
        length = 40 + len(body) if length is None else length
        self.kernel.send(abi.IN_HEADER.pack(length, opcode, unique, nodeid, 0, 0, 0, 0, 0) + body)

    def ask(self, opcode: int, body: bytes = b"", *, nodeid: int = 1) -> tuple[int, bytes]:
        """(errno, body) of the answer."""
        self.send(opcode, body, nodeid=nodeid)
        reply = self.kernel.recv(1 << 21)
        length, code, unique = abi.OUT_HEADER.unpack_from(reply)
        assert (length, unique) == (len(reply), 2)
        return -code, reply[16:]

    def answer(self) -> tuple[int, int, bytes]:
        """(unique, errno, body) of the next answer."""
        reply = self.kernel.recv(1 << 21)
        length, code, unique = abi.OUT_HEADER.unpack_from(reply)
        assert length == len(reply)
        return unique, -code, reply[16:]

    def init(self) -> None:
        flags = (1 << 43) - 1
        code, _ = self.ask(abi.INIT, abi.INIT_IN.pack(7, 45, 131072, flags & 0xFFFFFFFF, flags >> 32))
        assert code == 0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Nothing is answered meanwhile, so all that is sent waits in the device together."""
        inside, go = threading.Event(), threading.Event()

        def wait() -> None:
            inside.set()
            go.wait(5)

        self.session.post(wait)
        inside.wait(5)
        try:
            yield
        finally:
            go.set()


@pytest.fixture
def pair() -> Any:
    view = MemoryView()
    made = Pair(view)
    yield made
    made.session.stop()
    made.thread.join(10)
    made.kernel.close()
    view.close()


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "body", "code"),
    [
        (abi.LOOKUP, b"\0", errno.EINVAL),
        (abi.LOOKUP, b"name", errno.EINVAL),
        (abi.LOOKUP, b"a/b\0", errno.EINVAL),
        (abi.LOOKUP, b"a\0b\0", errno.EINVAL),
        (abi.LOOKUP, b"n" * 5000 + b"\0", errno.EINVAL),
        (abi.GETATTR, bytes(15), errno.EINVAL),
        (abi.GETATTR, bytes(17), errno.EINVAL),
        (abi.SETATTR, bytes(8), errno.EINVAL),
        (abi.WRITE, abi.WRITE_IN.pack(0, 0, 10, 0, 0, 0, 0) + b"short", errno.EINVAL),
        (abi.READ, abi.READ_IN.pack(0, 0, 1 << 30, 0, 0, 0, 0), errno.EINVAL),
        (abi.RENAME, abi.RENAME_IN.pack(1) + b"only\0", errno.EINVAL),
        (abi.SETXATTR, abi.SETXATTR_IN.pack(100, 0, 0, 0) + b"user.a\0value", errno.EINVAL),
        (abi.LSEEK, abi.LSEEK_IN.pack(0, 0, 0, 0), errno.EINVAL),
        (abi.MKDIR, abi.MKDIR_IN.pack(0o755, 0) + b"no end", errno.EINVAL),
        (abi.STATFS, b"junk", errno.EINVAL),
        (abi.GETATTR, bytes(16), 0),
        (abi.OPEN, abi.OPEN_IN.pack(0, 0), errno.ENOSYS),
        (abi.FLUSH, abi.FLUSH_IN.pack(0, 0, 0, 0), errno.ENOSYS),
        (abi.INIT, bytes(64), errno.ENOSYS),
        (7, b"", errno.ENOSYS),
        (53 + 1, b"", errno.ENOSYS),
        (0xFFFFFFFF, b"whatever", errno.ENOSYS),
    ],
    ids=lambda value: abi.NAMES[value] if isinstance(value, int) and value < 54 else "",
)  # fmt: skip
def test_a_body_that_is_wrong_has_its_errno_and_the_session_goes_on(
    pair: Pair, opcode: int, body: bytes, code: int
) -> None:
    pair.init()
    assert pair.ask(opcode, body)[0] == code
    assert pair.ask(abi.GETATTR, bytes(16))[0] == 0


@pytest.mark.parametrize("opcode", [abi.FSYNC, abi.LSEEK, abi.GETXATTR])
def test_an_enosys_from_below_does_not_make_the_kernel_stop_asking(pair: Pair, file: Any, opcode: int) -> None:
    def none() -> None:
        raise OSError(errno.ENOSYS, "the host has no such call")

    bodies = {
        abi.FSYNC: bytes(16),
        abi.LSEEK: abi.LSEEK_IN.pack(0, 0, os.SEEK_HOLE, 0),
        abi.GETXATTR: abi.GETXATTR_IN.pack(0, 0) + b"user.a\0",
    }
    pair.view.hooks = dict.fromkeys(("fsync_fd", "lseek", "getxattr"), none)
    assert pair.ask(opcode, bodies[opcode], nodeid=file.id)[0] == errno.EOPNOTSUPP


def test_an_unknown_node_is_stale(pair: Pair) -> None:
    pair.init()
    assert pair.ask(abi.GETATTR, bytes(16), nodeid=4711)[0] == errno.ESTALE
    assert pair.ask(abi.LOOKUP, b"x\0", nodeid=4711)[0] == errno.ESTALE
    assert pair.ask(abi.LOOKUP, b".\0", nodeid=4711)[0] == errno.ESTALE


def test_bad_forgets_are_not_answered(pair: Pair) -> None:
    pair.init()
    pair.send(abi.BATCH_FORGET, abi.BATCH_FORGET_IN.pack(1000, 0), unique=99)
    pair.send(abi.FORGET, b"", unique=99)
    assert pair.ask(abi.GETATTR, bytes(16))[0] == 0


@pytest.mark.parametrize("length", [0, 39, 41, 1 << 31])
def test_a_frame_that_contradicts_its_length_ends_the_session(pair: Pair, length: int) -> None:
    pair.init()
    pair.send(abi.GETATTR, length=length)
    pair.thread.join(10)
    assert isinstance(pair.failure, codec.ProtocolError)


def test_bytes_that_are_no_request_end_the_session(pair: Pair) -> None:
    pair.init()
    pair.kernel.send(b"junk")
    pair.thread.join(10)
    assert isinstance(pair.failure, codec.ProtocolError)


def test_the_first_request_must_be_init(pair: Pair) -> None:
    pair.send(abi.GETATTR, bytes(16))
    pair.thread.join(10)
    assert isinstance(pair.failure, codec.ProtocolError)


def test_a_kernel_too_old_is_told_and_named(pair: Pair) -> None:
    code, _ = pair.ask(abi.INIT, abi.INIT_COMPAT_IN.pack(7, 12, 0, 0))
    assert code == errno.EPROTO
    pair.thread.join(10)
    assert "7.12" in str(pair.failure)


# -- order for each node ----------------------------------------------------------------------


@pytest.fixture
def file(pair: Pair) -> Any:
    """A file of 128 KiB in a session whose kernel the test plays."""
    pair.init()
    node = pair.view.mknod(pair.view.root, b"f", stat.S_IFREG | 0o644, 0, 0, 0, 0)
    os.pwrite(node.fd, b"x" * (128 << 10), 0)
    return node


WRITE = abi.WRITE_IN.pack(0, 0, 3, 0, 0, 0, 0) + b"new"
READ = abi.READ_IN.pack(0, 0, 128 << 10, 0, 0, 0, 0)
CHMOD = abi.SETATTR_IN.pack(abi.FATTR_MODE, *[0] * 10, 0o600, 0, 0, 0, 0)


def test_requests_for_a_node_wait_in_order_behind_its_copy_up(pair: Pair, file: Any) -> None:
    stage = pair.view.delay(file)
    for unique, (opcode, body) in enumerate(
        (
            (abi.WRITE, WRITE),
            (abi.READ, READ),
            (abi.FSYNC, bytes(16)),
            (abi.SETATTR, CHMOD),
            (abi.LSEEK, abi.LSEEK_IN.pack(0, 0, 4, 0)),
        ),
        10,
    ):
        pair.send(opcode, body, unique=unique, nodeid=file.id)
    assert pair.ask(abi.GETATTR, bytes(16), nodeid=file.id)[0] == 0  # attributes do not wait
    assert pair.ask(abi.READDIR, READ)[0] == 0  # neither do other nodes
    stage.gate.set()
    answers = [pair.answer() for _ in range(5)]
    assert sorted(unique for unique, _, _ in answers) == [10, 11, 12, 13, 14]
    in_loop = [unique for unique, _, _ in answers if unique != 12]  # fsync runs aside
    assert in_loop == [10, 11, 13, 14]
    assert all(code == 0 for _, code, _ in answers)
    assert answers[1][2][:3] == b"new"
    assert pair.session.call(lambda: dict(pair.session._errands.gates.nodes)) == {}


def test_a_request_that_was_interrupted_while_it_waits_is_let_go_when_its_process_is_gone(
    pair: Pair, file: Any
) -> None:
    stage = pair.view.delay(file)
    pair.send(abi.WRITE, WRITE, unique=10, nodeid=file.id)
    pair.send(abi.READ, READ, unique=12, nodeid=file.id)  # pid 0 does not exist
    pair.send(abi.INTERRUPT, abi.INTERRUPT_IN.pack(12), unique=13)
    assert pair.answer()[:2] == (12, errno.EINTR)
    stage.gate.set()
    assert pair.answer()[:2] == (10, 0)


def test_a_copy_waits_for_the_copy_up_of_its_target(pair: Pair, file: Any) -> None:
    other = pair.view.mknod(pair.view.root, b"g", stat.S_IFREG | 0o644, 0, 0, 0, 0)
    stage = pair.view.delay(other)
    pair.send(abi.WRITE, WRITE, unique=10, nodeid=other.id)
    assert stage.started.wait(10)
    body = abi.COPY_FILE_RANGE_IN.pack(0, 0, other.id, 0, 3, 5, 0)
    pair.send(abi.COPY_FILE_RANGE, body, unique=11, nodeid=file.id)
    assert pair.ask(abi.READ, READ, nodeid=file.id)[0] == 0
    stage.gate.set()
    assert [pair.answer()[:2] for _ in range(2)] == [(10, 0), (11, 0)]
    assert os.pread(other.fd, 100, 0) == b"newxxxxx"


@pytest.fixture
def cold(pair: Pair, file: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads that find nothing in the page cache; ``entered`` and ``leave`` are their worker's events."""
    entered, leave = threading.Event(), threading.Event()
    warm, real = pair.view.pread, os.preadv

    def would_block(node: Any, offset: int, buf: memoryview, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, "cold")
        return int(warm(node, offset, buf, flags))

    def slow(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if threading.current_thread().name.startswith("cowfs-worker"):
            entered.set()
            leave.wait(20)
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(pair.view, "pread", would_block)
    monkeypatch.setattr(os, "preadv", slow)
    yield entered, leave
    leave.set()


def test_a_large_read_that_would_block_runs_on_a_worker(pair: Pair, file: Any, cold: Any) -> None:
    entered, leave = cold
    pair.send(abi.READ, READ, unique=10, nodeid=file.id)
    assert entered.wait(10)
    assert pair.ask(abi.GETATTR, bytes(16))[0] == 0
    leave.set()
    assert pair.answer() == (10, 0, b"x" * (128 << 10))


def test_a_change_waits_for_cold_reads_and_later_reads_wait_for_the_change(pair: Pair, file: Any, cold: Any) -> None:
    entered, leave = cold
    pair.send(abi.READ, READ, unique=10, nodeid=file.id)
    assert entered.wait(10)
    small = abi.READ_IN.pack(0, 0, 3, 0, 0, 0, 0)
    assert pair.ask(abi.READ, small, nodeid=file.id) == (0, b"xxx")  # beside it
    pair.send(abi.WRITE, WRITE, unique=11, nodeid=file.id)
    pair.send(abi.READ, small, unique=12, nodeid=file.id)
    assert pair.ask(abi.GETATTR, bytes(16))[0] == 0
    leave.set()
    answers = [pair.answer() for _ in range(3)]
    assert [unique for unique, _, _ in answers] == [10, 11, 12]
    assert answers[0][2] == b"x" * (128 << 10)
    assert answers[2][2] == b"new"


def test_small_reads_never_leave_the_loop(pair: Pair, file: Any, cold: Any) -> None:
    entered, _ = cold
    assert pair.ask(abi.READ, abi.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0), nodeid=file.id)[0] == 0
    assert not entered.is_set()


# -- what does not fit ------------------------------------------------------------------------


@pytest.fixture
def full(pair: Pair, file: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A second node, which takes up the space: no write fits before it is forgotten. Returns (its id, attempts)."""
    gone = pair.view.mknod(pair.view.root, b"gone", stat.S_IFREG | 0o644, 0, 0, 0, 0)
    gone.nlookup += 1
    real = pair.view.write
    attempts: list[bool] = []

    def write(*args: Any) -> int:
        attempts.append(pair.view.patient)
        if gone.id not in pair.view.nodes:
            return int(real(*args))
        raise Awaited() if pair.view.patient else OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(pair.view, "write", write)
    return gone.id, attempts


def write_4k(unique: int, node: Any) -> dict[str, Any]:
    return {"body": abi.WRITE_IN.pack(0, 0, 4096, 0, 0, 0, 0) + bytes(4096), "unique": unique, "nodeid": node.id}


def test_a_write_gets_the_space_of_a_file_that_is_forgotten_right_behind_it(pair: Pair, file: Any, full: Any) -> None:
    gone, _ = full
    with pair.stopped():
        pair.send(abi.WRITE, **write_4k(7, file))
        pair.send(abi.FORGET, abi.FORGET_IN.pack(1), unique=0, nodeid=gone)
    assert pair.answer()[:2] == (7, 0)


def test_a_write_that_nothing_makes_room_for_fails_once_the_device_is_empty(pair: Pair, file: Any, full: Any) -> None:
    _, attempts = full
    pair.send(abi.WRITE, **write_4k(7, file))
    assert pair.answer()[:2] == (7, errno.ENOSPC)
    assert attempts == [True, False]


def test_a_write_that_waits_for_room_is_answered_though_requests_never_cease(pair: Pair, file: Any, full: Any) -> None:
    with pair.stopped():
        pair.send(abi.WRITE, **write_4k(7, file))
        for unique in range(100, 200):
            pair.send(abi.STATFS, unique=unique)
    answers = [pair.answer()[:2] for _ in range(101)]
    assert answers.index((7, errno.ENOSPC)) < 90


def test_a_call_that_must_know_what_is_forgotten_is_made_once_the_device_is_empty(
    pair: Pair, file: Any, full: Any
) -> None:
    gone, _ = full
    seen: list[tuple[bool, bool]] = []

    def look() -> str:
        seen.append((pair.view.patient, gone in pair.view.nodes))
        if pair.view.patient:
            raise Awaited
        return "settled"

    with pair.stopped():
        answer: list[str] = []
        caller = threading.Thread(target=lambda: answer.append(pair.session.call(look)))
        caller.start()
        pair.send(abi.FORGET, abi.FORGET_IN.pack(1), unique=0, nodeid=gone)
    caller.join(5)
    assert (answer, seen[-1]) == (["settled"], (False, False))
