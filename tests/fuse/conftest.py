"""A session over a view in memory, mounted for one test, served by a thread of the test's own process.

Rule: the test process may do to its own mount only what lets go of the interpreter while it waits (system calls
do, page faults of a map do not: those tests start a process).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from support.memory_view import MemoryView

from cowfs.fuse import Session, SessionOptions, mount_fuse
from cowfs.sys import mounts
from cowfs.union import View

# vfork(2) would hold this process's interpreter, which must answer, while a child changes into the mount.
subprocess._USE_VFORK = False  # type: ignore[misc]  # typeshed declares it final; there is no other switch


def drops() -> list[str]:
    """How often the kernel's caches were dropped by hand since it was started."""
    with open("/proc/vmstat", encoding="ascii") as file:
        return [line for line in file if line.startswith("drop_")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test of the kernel's caches again, from its fixtures on, when another process had them dropped meanwhile.

    The last outcome counts, whatever it is: a failure stays one.
    """
    if item.path.name not in ("test_requests.py", "test_notify.py"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for last in (False, False, True):
        before = drops()
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        if last or drops() == before or not any(report.failed for report in reports):
            break
        item._initrequest()  # type: ignore[attr-defined]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


class Served:
    """A mounted session: ``path``, ``view``, ``session``, and what was asked since :meth:`mark`."""

    def __init__(self, path: Path, view: Any, **options: Any) -> None:
        self.path = path
        self.view = view
        self.session = Session(mount_fuse(path, allow_other=True), view, options=SessionOptions(**options))
        self.failure: BaseException | None = None
        # A test that hangs in its own mount cannot even be killed: cut the connection then.
        self._watchdog = threading.Timer(40, self._cut)
        self._watchdog.daemon = True
        self._watchdog.start()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.session.ready.wait(10)
        os.statvfs(path)
        self._before: dict[str, int] = {}
        # Have the kernel send the requests that come only once a mount.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.close(fd)

    def _run(self) -> None:
        try:
            self.session.run()
        except BaseException as error:  # noqa: BLE001 - raised again by close()
            self.failure = error

    def __truediv__(self, name: str) -> str:
        return os.fspath(self.path / name)

    def mark(self) -> None:
        """Start counting."""
        self._before = self.session.counters

    def asked(self) -> dict[str, int]:
        """Requests by opcode since :meth:`mark`."""
        now = self.session.call(lambda: self.session.counters)
        grown = {name: count - self._before.get(name, 0) for name, count in now.items()}
        return {name: count for name, count in grown.items() if count}

    def node(self, name: str) -> Any:
        """The node of a path, without asking for it through the mount."""

        def find() -> Any:
            node = self.view.root
            for part in name.encode().split(b"/"):
                node = node.children[part]
            return node

        return self.session.call(find)

    def eventually(self, claim: Callable[[], bool], seconds: float = 10) -> bool:
        """Whether ``claim``, asked in the loop thread, becomes true in time."""
        deadline = time.monotonic() + seconds
        while not (held := self.session.call(claim)) and time.monotonic() < deadline:
            time.sleep(0.005)
        return held

    def python(self, code: str, *args: str, timeout: float = 20) -> str:
        """Run a Python program in a process of its own, in the mount; its output."""
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=self.path, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            mounts.umount(self.path, mounts.MNT_FORCE)

    def close(self) -> None:
        self._watchdog.cancel()
        with contextlib.suppress(OSError):
            mounts.umount(self.path, mounts.MNT_DETACH | mounts.MNT_FORCE)  # force: also with files left open
        self.thread.join(10)
        assert not self.thread.is_alive(), "the session did not end at unmount"
        self.view.close()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def serve(tmp_path: Path, can_mount: None) -> Iterator[Any]:
    """``serve(view=None, **SessionOptions)`` -> :class:`Served`; taken off at the end."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    made: list[Served] = []

    def start(view: Any = None, **options: Any) -> Served:
        path = tmp_path / f"mnt{len(made)}"
        path.mkdir()
        made.append(Served(path, view or MemoryView(), **options))
        return made[-1]

    yield start
    for served in made:
        served.close()


@pytest.fixture
def mnt(serve: Any) -> Served:
    """An empty tree, mounted."""
    served: Served = serve()
    return served


@pytest.fixture
def layers(tmp_path: Path, can_mount: None) -> Iterator[Path]:
    """A directory on a tmpfs of its own, with ``lower``, ``upper`` and ``work`` in it."""
    base = tmp_path / "layers"
    base.mkdir()
    mounts.mount("none", base, "tmpfs", 0, "size=512m")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    yield base
    mounts.umount(base, mounts.MNT_DETACH)


@pytest.fixture
def union(serve: Any, layers: Path) -> Any:
    """``union(readonly=False, **SessionOptions)``: the real view over ``layers``, served."""

    def start(*, readonly: bool = False, **options: Any) -> Served:
        upper = None if readonly else layers / "upper"
        view = View([layers / "lower"], upper, upper and layers / "work")
        served: Served = serve(view, **options)
        return served

    return start
