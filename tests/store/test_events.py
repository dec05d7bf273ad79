"""Events: each change of a store is told once, whoever made it, and a reader that is too slow is told so."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cowfs import Event, Store
from cowfs.index import events as log


def told(store: Store, **options: Any) -> list[tuple[str, str, str]]:
    return [(event.type, event.action, event.actor) for event in store.events(**options)]


def test_each_change_is_one_event_in_order(space: Path) -> None:
    with Store.open(space / "store", fsync=False) as store:
        store.prepare("work")
        store.commit("work", "base")
        store.tag("app:1", "base", config='{"architecture": "amd64"}')
        store.view("look", "base")
        store.remove("look")
        store.untag("app:1")
        store.remove("base")
        store.gc()
        assert told(store) == [
            ("snapshot", "prepare", "work"),
            ("snapshot", "commit", "base"),
            ("image", "tag", "app:1"),
            ("snapshot", "view", "look"),
            ("snapshot", "remove", "look"),
            ("image", "untag", "app:1"),
            ("snapshot", "remove", "base"),
            ("store", "gc", ""),
        ]
        seqs = [event.seq for event in store.events()]
        assert seqs == list(range(1, 9))


def test_a_change_that_fails_is_no_event(space: Path) -> None:
    with Store.open(space / "store", fsync=False) as store:
        store.prepare("work")
        with pytest.raises(RuntimeError), store.index.write() as change:
            change.drop_tag("x")
            raise RuntimeError
        assert told(store) == [("snapshot", "prepare", "work")]


def test_since_and_until_bound_the_answer(space: Path) -> None:
    with Store.open(space / "store", fsync=False) as store:
        for at in (10, 20, 30, 40):
            store.record_event("store", "note", str(at), at=at)
        assert [actor for _, _, actor in told(store, since=20, until=30)] == ["20", "30"]
        assert [actor for _, _, actor in told(store, after=3)] == ["40"]
        assert told(store, since=41) == []


def test_a_follower_hears_of_other_processes(space: Path) -> None:
    """An action of the command in its own process reaches a follower here, without any daemon."""
    root = space / "store"
    heard: list[Event] = []
    done = threading.Event()
    with Store.open(root, fsync=False) as store:
        store.prepare("before")

        def callback(event: Event) -> None:
            heard.append(event)
            if event.actor == "last":
                done.set()

        end = store.watch(callback)
        for key in ("one", "last"):
            subprocess.run([sys.executable, "-m", "cowfs", "prepare", key, "--root", str(root)], check=True)
        assert done.wait(60)
        end()
        assert [(event.action, event.actor) for event in heard] == [("prepare", "one"), ("prepare", "last")]


def test_a_follower_ends_at_until(space: Path) -> None:
    with Store.open(space / "store", fsync=False) as store:
        store.record_event("store", "note", "now")
        assert len(list(store.events(since=0, until=time.time_ns() + 50_000_000, follow=True))) == 1


def test_a_reader_that_was_too_slow_is_told_how_many_it_missed(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "KEPT", 10)
    monkeypatch.setattr(log, "TRIM", 5)
    with Store.open(space / "store", fsync=False) as store:
        store.record_event("store", "note", "first")
        slow = store.events(since=0)
        for number in range(29):
            store.record_event("store", "note", str(number))
        found = list(slow)
        lost = [event for event in found if event.type == "log"]
        assert [event.attributes for event in lost] == [{"count": "20"}]
        assert len(found) == 1 + 10
        assert store.index.event_range() == (21, 30)


def test_four_writers_lose_no_event(space: Path) -> None:
    """10,000 events by four writers at once: a follower gets each of them once, in order."""
    root = space / "store"
    got: list[int] = []
    with Store.open(root, fsync=False) as store:
        stop = threading.Event()

        def follow() -> None:
            with Store.open(root, fsync=False) as mine:
                got.extend(event.seq for event in mine.events(after=0, follow=True, stop=stop.is_set))

        reader = threading.Thread(target=follow)
        reader.start()

        def write(name: str) -> None:
            for number in range(25):
                with store.index.write() as change:
                    for part in range(100):
                        change.record_event("store", "note", f"{name} {number} {part}")

        writers = [threading.Thread(target=write, args=(str(number),)) for number in range(4)]
        for each in writers:
            each.start()
        for each in writers:
            each.join()
        stop.set()
        reader.join()
    assert got == list(range(1, 10_001))


def test_a_store_of_an_older_format_has_no_events_yet(space: Path) -> None:
    """A store of format 3 opens, and its log begins."""
    import sqlite3

    root = space / "store"
    with Store.open(root, fsync=False) as store:
        store.prepare("work")
    with sqlite3.connect(root / "index.db") as connection:
        connection.execute("DROP TABLE events")
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with Store.open(root, fsync=False) as store:
        assert told(store) == []
        store.remove("work")
        assert told(store) == [("snapshot", "remove", "work")]
