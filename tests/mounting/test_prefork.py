"""Where the servers of a library's mounts come from: one process, while what a mount inherits stays the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import environment
from support.layers import Layer

import cowfs
from cowfs.errors import NotFound
from cowfs.mounting import prefork


@pytest.fixture
def stack(space: Path, can_mount: None) -> Path:
    Layer(space / "layers/base").file("hello", b"hello")
    for name in ("one", "two"):
        (space / name).mkdir()
    return space


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nurseries that wait long for their next request, however slow the machine is."""
    prefork.close()
    monkeypatch.setattr(prefork, "IDLE", 600.0)
    yield
    prefork.close()


def test_a_nursery_without_a_request_ends_and_its_servers_go_on(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefork.close()
    monkeypatch.setattr(prefork, "IDLE", 0.01)
    with cowfs.mount(stack / "layers", stack / "one", readonly=True) as one:
        assert isinstance(one, cowfs.MountHandle)
        end = time.monotonic() + 20
        while _parent(one.pid) != 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert (stack / "one" / "hello").read_bytes() == b"hello"
        with cowfs.mount(stack / "layers", stack / "two", readonly=True) as two:
            assert isinstance(two, cowfs.MountHandle)
            assert two.pid != one.pid


def test_two_mounts_have_servers_of_one_nursery(stack: Path, patient: None) -> None:
    """Which ends when it is let go, while the servers go on."""
    with cowfs.mount(stack / "layers", stack / "one", readonly=True) as one:
        assert isinstance(one, cowfs.MountHandle)
        with cowfs.mount(stack / "layers", stack / "two", readonly=True) as two:
            assert isinstance(two, cowfs.MountHandle)
            mother = _parent(one.pid)
            assert mother == _parent(two.pid)
            assert str(stack / "one").encode() in Path(f"/proc/{one.pid}/cmdline").read_bytes()
        prefork.close()
        end = time.monotonic() + 20
        while os.path.exists(f"/proc/{mother}") and time.monotonic() < end:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{mother}")
        assert (stack / "one" / "hello").read_bytes() == b"hello"


def test_a_killed_nursery_is_replaced(stack: Path, patient: None) -> None:
    with cowfs.mount(stack / "layers", stack / "one", readonly=True) as one:
        assert isinstance(one, cowfs.MountHandle)
        mother = _parent(one.pid)
    os.kill(mother, signal.SIGKILL)
    with cowfs.mount(stack / "layers", stack / "one", readonly=True) as one:
        assert isinstance(one, cowfs.MountHandle)
        assert _parent(one.pid) != mother


def test_an_error_of_the_server_is_the_callers(stack: Path) -> None:
    """And the next mount is none the worse."""
    with pytest.raises(NotFound, match="mount point does not exist"):
        cowfs.mount(stack / "layers", stack / "three", readonly=True)
    with cowfs.mount(stack / "layers", stack / "one", readonly=True):
        assert (stack / "one" / "hello").read_bytes() == b"hello"


CHANGED = """
import os, sys
import cowfs
from cowfs.mounting import prefork
from cowfs.sys import namespaces, mounts
prefork.IDLE = 600
layers, one, two = sys.argv[1:]
def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
with cowfs.mount(layers, one, readonly=True) as first:
    if os.fork() == 0:
        status = 1
        try:
            with cowfs.mount(layers, two, readonly=True) as second:
                status = 0 if parent(second.pid) != parent(first.pid) else 2  # a forked child has a nursery of its own
        finally:
            os._exit(status)
    assert os.wait()[1] == 0
    namespaces.unshare(namespaces.CLONE_NEWNS)
    mounts.make_private()
    with cowfs.mount(layers, two, readonly=True) as second:
        assert open(two + "/hello").read() == "hello", "the mount is in the namespace that its maker is in now"
    os.environ["COWFS_TEST"] = "1"
    with cowfs.mount(layers, two, readonly=True) as third:
        assert b"COWFS_TEST=1" in open(f"/proc/{parent(third.pid)}/environ", "rb").read()
"""


def test_what_a_mount_inherits_is_what_its_maker_has_now(stack: Path) -> None:
    """A process that was forked, or moved to another namespace, or changed its environment, gets another nursery."""
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, stack / "layers", stack / "one", stack / "two"],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
