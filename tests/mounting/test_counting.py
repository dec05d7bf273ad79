"""A look at the use of a mount without a limit delays no operation: its upper layer is counted beside the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import layers, limits, mounts

from cowfs import Usage, View
from cowfs.mounting import counting


class Loop:
    """A server as far as a counter knows it: one thread owns the view."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.calls: list[str] = []
        self.inside = threading.local()

    def call(self, function: Callable[[], Any]) -> Any:
        self.calls.append(getattr(function, "__name__", "?"))
        self.inside.loop = True
        try:
            return function()
        finally:
            self.inside.loop = False


@pytest.fixture
def loop(tmp_path: Path) -> Any:
    for name in ("lower", "upper/d", "work"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "upper/d/file").write_bytes(bytes(5000))
    view = View([tmp_path / "lower"], tmp_path / "upper", tmp_path / "work")
    yield Loop(view)
    view.close()


class Walk:
    """A walk that goes on until it is told to end."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.begun, self.end = threading.Semaphore(0), threading.Semaphore(0)
        self.count = 0

    def __call__(self, layer: Any, form: Any, pause: Any) -> Usage:
        assert not getattr(self.loop.inside, "loop", False), "the walk is made in the loop"
        self.count += 1
        self.begun.release()
        assert self.end.acquire(timeout=60)
        return Usage(bytes=self.count, inodes=self.count)


def ask(counter: counting.Counter, answers: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(counter.usage()))
    thread.start()
    return thread


def test_a_walk_is_not_made_in_the_loop(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(loop)
    monkeypatch.setattr(counting, "measure", walk)
    counter, answers = counting.Counter(loop), []  # type: ignore[arg-type, var-annotated]
    asking = ask(counter, answers)
    assert walk.begun.acquire(timeout=60)
    assert loop.call(lambda: 1) == 1, "the loop goes on"
    assert counter.usage(patience=0.01) is None, "nothing is known yet"
    walk.end.release()
    asking.join(60)
    assert answers == [Usage(bytes=1, inodes=1)]


def test_who_asks_during_a_walk_gets_one_that_began_later(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(loop)
    monkeypatch.setattr(counting, "measure", walk)
    counter = counting.Counter(loop)  # type: ignore[arg-type]
    first: list[Any] = []
    later: list[Any] = []
    threads = [ask(counter, first)]
    assert walk.begun.acquire(timeout=60)
    threads += [ask(counter, later) for _ in range(3)]
    while sum(name == "_kept" for name in loop.calls) < 4:
        pass
    for _ in range(5):  # one for all that wait already, one more for each that comes later
        walk.end.release()
    for thread in threads:
        thread.join(60)
    assert len(first) == 1
    assert len(later) == 3
    assert all(usage.bytes >= 2 for usage in later), (
        "a walk that began before the question was asked does not answer it"
    )
    assert counter.usage(patience=0.0) is not None, "what is known is told at once"
    for _ in range(5):
        walk.end.release()


def test_a_failure_is_told_and_not_kept(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Usage:
        raise OSError(5, "Input/output error")

    counter = counting.Counter(loop)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(counting, "measure", fails)
        with pytest.raises(OSError, match="Input/output"):
            counter.usage()
    assert counter.usage() == Usage(bytes=3 * 4096, inodes=2)


def test_a_mount_without_a_limit_is_counted_as_one_with(space: Path) -> None:
    with mounts.mounted("kernel", [layers.Layer(space / "lower")], space) as m:
        for number in range(250):
            (m.path / f"{number}").write_bytes(bytes(100))
        usage = m.handle.usage()
        assert (usage.bytes, usage.inodes) == limits.measure(space / "upper")
        assert m.handle.status().usage == usage
