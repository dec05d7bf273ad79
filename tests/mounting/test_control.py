"""The control protocol: typed arguments, its version, answers that stream; and servers of before there were versions."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import cowfs
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.mounting import protocol
from cowfs.mounting.verbs import arguments, basic, finding
from cowfs.mounting.verbs.table import VERBS


@pytest.fixture
def mounted(space: Path, can_mount: None) -> Iterator[cowfs.MountHandle]:
    """A mount of one layer."""
    for name in ("layer", "target"):
        (space / name).mkdir()
    (space / "layer" / "file").write_bytes(b"x")
    with cowfs.mount([space / "layer"], space / "target", upper=space / "upper") as made:
        assert isinstance(made, cowfs.MountHandle)
        yield made


def exchange(path: str, line: bytes) -> list[dict[str, Any]]:
    """The answers of a server to a line within a second."""
    found = []
    with protocol.connect(path) as sock:
        sock.sendall(line)
        sock.settimeout(1.0)
        with sock.makefile("rb") as lines:
            try:
                for answer in lines:
                    found.append(json.loads(answer))
                    if "more" not in found[-1]:
                        break
            except TimeoutError:
                pass
    return found


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"verb": "limit", "bytes": "many"}, "bytes cannot be 'many'"),
        ({"verb": "limit", "bytes": True}, "bytes cannot be True"),
        ({"verb": "limit", "octets": 5}, "no argument 'octets'"),
        ({"verb": "usage", "lazy": True}, "no argument 'lazy'"),
        ({"verb": "umount", "lazy": "yes"}, "lazy cannot be 'yes'"),
        ({"verb": "freeze"}, "needs the argument 'upper'"),
        ({"verb": "freeze", "upper": 5}, "upper cannot be 5"),
        ({"verb": "absorb", "lowers": ["a", 5]}, "lowers cannot be"),
        ({"verb": "restack", "freed": {"bytes": "x"}}, "freed cannot be"),
        ({"verb": "statistics", "stream": True, "interval": 0}, "not an interval"),
        ({"verb": "compact", "share": 2}, "not a share"),
        ({"verb": "fly"}, "no such verb"),
    ],
)
def test_a_wrong_message_is_one_clear_error(mounted: cowfs.MountHandle, message: dict[str, Any], said: str) -> None:
    """By class, with the name of what is wrong; nothing was done."""
    (answer,) = exchange(mounted.socket, protocol.encode(message))
    assert (answer["error"]["type"], said in answer["error"]["message"]) == ("InvalidArgument", True), answer
    assert mounted.status().alive


def test_a_message_without_a_version_is_understood(mounted: cowfs.MountHandle) -> None:
    """As a client of before there were versions sends it."""
    (answer,) = exchange(mounted.socket, b'{"verb": "counters"}\n')
    assert answer["ok"]["nodes"] >= 1


@pytest.mark.parametrize("version", [protocol.VERSION + 1, "1", None])
def test_a_later_version_is_refused_with_what_to_do(mounted: cowfs.MountHandle, version: object) -> None:
    """And no verb of it is run."""
    (answer,) = exchange(mounted.socket, protocol.encode({"verb": "umount", "version": version}))
    error = protocol.error_from(answer["error"])
    assert isinstance(error, Unsupported)
    assert "mount it again" in error.remedy
    assert mounted.status().alive


def test_statistics_stream_until_nobody_listens(mounted: cowfs.MountHandle) -> None:
    """Each is newer than the one before; a watcher that goes leaves the server as it was."""
    watch = mounted.watch(interval=0.01)
    found = [next(watch).nodes for _ in range(5)]
    assert all(nodes >= 1 for nodes in found)
    del watch
    assert mounted.status().alive


def test_the_end_of_the_mount_ends_a_stream(space: Path, can_mount: None) -> None:
    """The watcher hears of it at once, however long its interval, and the server does not wait for the watcher."""
    for name in ("layer", "target"):
        (space / name).mkdir()
    mount = cowfs.mount([space / "layer"], space / "target", upper=space / "upper")
    assert isinstance(mount, cowfs.MountHandle)
    heard: list[object] = []

    def watch() -> None:
        try:
            for each in mount.watch(interval=0.01):
                heard.append(each)
        except CowfsError as error:
            heard.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    while not heard:
        time.sleep(0.01)
    mount.unmount()
    thread.join(60)
    assert not thread.is_alive()


def test_more_streams_than_threads_are_refused_not_served_by_the_listener(mounted: cowfs.MountHandle) -> None:
    """The listener goes on to answer everybody."""
    watches, refused = [], 0
    for _ in range(20):
        watch = mounted.watch(interval=30.0)
        try:
            next(watch)
        except FailedPrecondition as error:
            assert "too many" in error.message
            refused += 1
        else:
            watches.append(watch)
    assert refused
    assert watches
    assert mounted.status().alive


@contextmanager
def server(path: Path, answer: Callable[[dict[str, Any]], list[bytes]]) -> Iterator[str]:
    """A server that says what it is told to, to one client."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as lines:
            for part in answer(json.loads(next(lines))):
                sock.sendall(part)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield str(path)
    finally:
        thread.join(60)
        listener.close()


def whole(told: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
    """All news, and the answer."""
    news = []
    while True:
        try:
            news.append(next(told))
        except StopIteration as end:
            return news, end.value


def test_a_server_of_before_streams_gives_its_answer_alone(tmp_path: Path) -> None:
    """It knows neither word and answers once."""
    with server(tmp_path / "sock", lambda message: [protocol.encode({"ok": {"finished": True}})]) as path:
        assert whole(protocol.stream(path, "compact")) == ([], {"finished": True})


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5), st.integers(1, 40))
def test_a_stream_in_any_pieces_is_the_same_stream(count: int, size: int) -> None:
    """Lines come together, or byte by byte."""
    import tempfile

    said = b"".join(protocol.encode({"more": {"n": n}}) for n in range(count)) + protocol.encode({"ok": {"end": True}})
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    with tempfile.TemporaryDirectory() as place, server(Path(place, "sock"), lambda message: pieces) as path:
        assert whole(protocol.stream(path, "any")) == ([{"n": n} for n in range(count)], {"end": True})


@pytest.mark.parametrize("said", [b"", b"{}", b"x\n", b'{"more": {}}\n', b'{"error": 5}\n', b"[]\n"])
def test_a_server_that_breaks_off_is_an_error(tmp_path: Path, said: bytes) -> None:
    """One that says why; never an endless wait or a traceback."""
    with server(tmp_path / "sock", lambda message: [said]) as path, pytest.raises(CowfsError):
        whole(protocol.stream(path, "any"))


def test_every_verb_has_a_record_of_what_it_takes() -> None:
    """Explained, and no name that the message itself uses."""
    for name in finding.names():
        finding.find_verb(name)
    for name in finding.names():
        takes = VERBS[name].takes
        assert is_dataclass(takes)
        assert takes.__doc__
        assert not {each.name for each in fields(takes)} & {"verb", "version", "stream"}


def test_a_record_says_what_it_would_take() -> None:
    """The remedy of a wrong argument is its type."""
    with pytest.raises(InvalidArgument) as caught:
        arguments.read(basic.Limits, {"verb": "limit", "bytes": "x"})
    assert caught.value.remedy == "int or null"
