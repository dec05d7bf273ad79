"""The counts of a mount's server, and the events that it records in its store."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowfs
from cowfs.fuse import abi
from cowfs.fuse.handlers.names import Handler
from cowfs.fuse.timing import Timing
from cowfs.model import Event, Limit
from cowfs.store import Store


@pytest.fixture(params=["overlay", "row"])
def store(request: pytest.FixtureRequest, space: Path) -> Iterator[Store]:
    """A store with the snapshot ``base``: a file of 1 MiB, a small one, a directory of twenty."""
    with Store.open(space / "store", driver=request.param, fsync=False) as made:
        made.prepare("making")
        with made.paths("making") as tree:
            tree.write_bytes("big", os.urandom(1 << 20))
            tree.write_bytes("small", b"x")
            tree.mkdir("many")
            for number in range(20):
                tree.write_bytes(f"many/{number}", b"x")
        made.commit("making", "base")
        yield made


@pytest.fixture
def target(space: Path) -> Path:
    made = space / "target"
    made.mkdir()
    return made


def told(store: Store, *types: str) -> list[Event]:
    return [event for event in store.events(since=1) if event.type in types]


def test_copies_and_redirects_are_counted(store: Store, target: Path, can_mount: None) -> None:
    """The same change: one driver copies a file of 1 MiB, the other stores two blocks of it."""
    store.prepare("key", "base")
    with store.mount("key", target) as mounted:
        assert isinstance(mounted, cowfs.MountHandle)
        assert mounted.statistics().copied_files == mounted.statistics().redirected_files == 0
        with open(target / "big", "r+b") as file:
            file.seek(4096 * 10 + 100)
            file.write(b"y" * 5000)
        found = mounted.statistics()
        if store.driver.name == "row":
            assert (found.copied_files, found.redirected_files, found.redirected_blocks) == (0, 1, 2)
        else:
            assert (found.copied_files, found.copied_bytes, found.redirected_files) == (1, 1 << 20, 0)
            os.chmod(target / "small", 0o600)
            assert mounted.statistics().copied_attributes == 1


def test_hits_and_times_are_taken_only_while_somebody_looks(store: Store, target: Path, can_mount: None) -> None:
    store.prepare("key", "base")
    with store.mount("key", target) as mounted:
        assert isinstance(mounted, cowfs.MountHandle)
        os.stat(target / "small")
        assert mounted.statistics().timed == {}
        os.stat(target / "many")
        first = mounted.statistics(timed=True)
        assert first.timed == {} and first.timed_seconds == 0.0
        assert first.requests["LOOKUP"] >= 2
        os.stat(target / "many" / "3")  # its directory is read: a miss
        assert not (target / "many" / "nothing").exists()  # its directory is known: a hit
        found = mounted.statistics(timed=True)
        assert (found.hits, found.misses) == (1, 1)
        lookups = found.timed["LOOKUP"]
        assert lookups.count == 2 and 0 < lookups.longest <= lookups.seconds
        assert found.timed_seconds > 0
        assert found.directories_read >= 1


def test_the_plain_handlers_come_back() -> None:
    """After a while without a question no request is timed any more; figures are kept, and go on when somebody asks again."""
    handlers: list[Handler] = [lambda buf, n, unique, nodeid: b"reply"] * abi.OPCODE_END
    plain = list(handlers)
    looked = iter([1, 1, 1, 2])
    timing = Timing(handlers, lambda: next(looked))
    timing.watch()
    assert handlers != plain
    for _ in range(2):
        assert handlers[abi.LOOKUP](memoryview(b""), 0, 1, 1) == b"reply"
    timing._until = 0
    assert handlers[abi.GETATTR](memoryview(b""), 0, 1, 1) == b"reply"
    assert handlers == plain
    found = timing.watch()
    assert found["requests"]["LOOKUP"][0] == 2 and "GETATTR" not in found["requests"]
    assert (found["hits"], found["misses"]) == (1, 1)
    assert handlers != plain


def test_a_handler_that_raises_is_timed() -> None:
    def fails(buf: memoryview, n: int, unique: int, nodeid: int) -> bytes:
        raise OSError(errno.ENOENT, "no")

    handlers: list[Handler] = [fails] * abi.OPCODE_END
    timing = Timing(handlers, lambda: 0)
    timing.watch()
    with pytest.raises(OSError):
        handlers[abi.GETATTR](memoryview(b""), 0, 1, 1)
    assert timing.watch()["requests"]["GETATTR"][0] == 1


# -- events -------------------------------------------------------------------------------------------------------------


def by_store(store: Store, target: Path) -> None:
    store.mount("key", target)
    store.unmount("key")


def by_command(store: Store, target: Path) -> None:
    words = [sys.executable, "-m", "cowfs", "mount", "--root", store.root, "--key", "key", str(target)]
    subprocess.run(words, check=True, timeout=60)
    subprocess.run([sys.executable, "-m", "cowfs", "umount", str(target)], check=True, timeout=60)


def by_signal(store: Store, target: Path) -> None:
    store.mount("key", target)
    os.kill(cowfs.attach(target).pid, signal.SIGTERM)


@pytest.mark.parametrize("way", [by_store, by_command, by_signal])
def test_mount_and_unmount_are_told_whoever_does_it(
    store: Store, target: Path, can_mount: None, way: Callable[[Store, Path], None]
) -> None:
    store.prepare("key", "base")
    way(store, target)
    events: list[Event] = []
    for event in store.events(since=1, follow=True):
        events += [event] if event.type == "mount" else []
        if len(events) == 2:
            break
    assert [(event.action, event.actor, event.attributes["mountpoint"]) for event in events] == [
        ("mount", "key", str(target)),
        ("unmount", "key", str(target)),
    ]


def test_mounts_of_the_kernel_are_told(space: Path, target: Path, can_mount: None) -> None:
    """They have no server; the verb that mounts records it."""
    if os.geteuid():
        pytest.skip("a mount by the kernel needs root here")
    with Store.open(space / "plain", driver="overlay", fsync=False) as store:
        store.prepare("key")
        store.mount("key", target, mount_type="kernel")
        store.unmount("key")
        assert [(event.action, event.attributes["type"]) for event in told(store, "mount")] == [
            ("mount", "kernel"),
            ("unmount", "kernel"),
        ]


def test_the_end_is_told_before_the_layer_is_free(store: Store, target: Path, can_mount: None) -> None:
    """A caller that waited for the unmount finds the event, and may remove the store."""
    for number in range(10):
        store.prepare(f"key{number}", "base")
        store.mount(f"key{number}", target)
        store.unmount(f"key{number}")
        assert told(store, "mount")[-1].action == "unmount"
        assert len(told(store, "mount")) == 2 * (number + 1)


def test_a_limit_that_is_reached_or_changed_is_told(store: Store, target: Path, can_mount: None) -> None:
    store.prepare("key", "base", size="2M")
    with store.mount("key", target) as mounted:
        assert isinstance(mounted, cowfs.MountHandle)
        for _ in range(3):
            with pytest.raises(OSError) as caught, open(target / "new", "wb", buffering=0) as file:
                for _ in range(40):
                    file.write(b"x" * (100 << 10))
            assert caught.value.errno == errno.ENOSPC
        mounted.limit(size="4M")
        store.limit("key", inodes=100)
        store.limit("key", inodes=100)  # no change, no event
    store.limit("key", size=None)
    store.limit("key", size=None)
    found = [
        (event.action, event.actor, event.attributes.get("size"), event.attributes.get("inodes"))
        for event in told(store, "limit")
    ]
    assert sorted(found, key=str) == sorted(
        [
            ("reached", "key", None, None),
            ("changed", "key", str(4 << 20), "none"),
            ("changed", "key", str(4 << 20), "100"),
            ("changed", "key", "none", "100"),
        ],
        key=str,
    )  # fmt: skip
    assert store.limit("key") == Limit(inodes=100)


# -- the command --------------------------------------------------------------------------------------------------------


def stats(store: Store, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cowfs", "stats", "--root", store.root, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_stats_of_a_mount(store: Store, target: Path, can_mount: None) -> None:
    store.prepare("key", "base", size="8M", inodes=50)
    with store.mount("key", target):
        (target / "new").write_bytes(b"x" * 10_000)
        (found,) = json.loads(stats(store, "--no-stream", "--json", "key").stdout)
        assert found["usage"] == {"bytes": 12288, "inodes": 1}
        assert found["left"] == {"bytes": (8 << 20) - 12288, "inodes": 49}
        assert found["requests"]["WRITE"] >= 1 and found["memory"] > 1 << 20 and found["pids"] >= 1
        done = stats(store, "--no-stream", str(target))
        assert done.stdout.splitlines()[0].split()[:2] == ["NAME", "CPU"]
        assert done.stdout.splitlines()[1].startswith("key ")
    done = stats(store, "--no-stream", "key")
    assert done.returncode == 3 and "not mounted" in done.stderr and "Traceback" not in done.stderr
