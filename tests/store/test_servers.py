"""Finding the server of a layer, and waiting for one that is about to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import environment

import cowfs
from cowfs.errors import FailedPrecondition
from cowfs.mounting import notice, protocol
from cowfs.store import Store
from cowfs.sys import mounts as sys_mounts

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")


@pytest.fixture
def store(space: Path) -> Iterator[Store]:
    for name in ("mnt", "other", "layers/base", "third"):
        (space / name).mkdir(parents=True)
    with Store.open(space / "store", driver="overlay", fsync=False) as made:
        made.prepare("k")
        yield made


@pytest.fixture
def stuck(space: Path, store: Store) -> Iterator[int]:
    """An unrelated mount whose server is stopped."""
    mount = cowfs.mount([space / "layers/base"], space / "other", ephemeral=True)
    assert isinstance(mount, cowfs.MountHandle)
    os.kill(mount.pid, signal.SIGSTOP)
    yield mount.pid
    os.kill(mount.pid, signal.SIGCONT)
    mount.unmount()


def test_no_other_server_is_asked(store: Store, space: Path, stuck: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb that concerns one key talks to the socket of that key's server, and to no other."""
    asked: set[str] = set()
    connect = protocol.connect
    monkeypatch.setattr(protocol, "connect", lambda path, *more: (asked.add(path), connect(path, *more))[1])
    monkeypatch.setattr(protocol, "ask_all", lambda *_, **__: pytest.fail("all servers were asked"))
    handle = store.mount("k", space / "mnt")
    assert isinstance(handle, cowfs.MountHandle)
    (space / "mnt" / "f").write_text("f")
    assert store.usage("k").inodes >= 1
    assert store.mounted_at("k") == str(space / "mnt")
    assert store.handle("k").pid == handle.pid
    store.snapshot("k", "s1")
    (space / "mnt" / "g").write_text("g")
    store.snapshot("k", "s2")
    assert store.mounted_at("k") == str(space / "mnt")
    store.squash("s1")
    store.rollback("k", "s2")
    with pytest.raises(FailedPrecondition):
        store.commit("k", "done")
    store.unmount("k")
    store.commit("k", "done")
    assert asked == {handle.socket}


def test_listing_shows_a_server_that_does_not_answer(store: Store, space: Path, stuck: int) -> None:
    with store.mount("k", space / "mnt"):
        found = {status.mountpoint: status for status in cowfs.mounts()}
    assert found[str(space / "mnt")].answers
    hanging = found[str(space / "other")]
    assert (hanging.alive, hanging.answers, hanging.pid) == (True, False, None)


def test_a_key_whose_own_server_hangs_is_named(store: Store, space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "TIMEOUT", 0.2)
    ask = protocol.ask
    monkeypatch.setattr(protocol, "ask", lambda path, verb, **more: ask(path, verb, **{"timeout": 0.2, **more}))
    handle = store.mount("k", space / "mnt")
    assert isinstance(handle, cowfs.MountHandle)
    os.kill(handle.pid, signal.SIGSTOP)
    try:
        assert store.mounted_at("k") == str(space / "mnt")
        with pytest.raises(FailedPrecondition, match=f"process {handle.pid}.*does not answer.*--force"):
            store.snapshot("k", "s")
    finally:
        os.kill(handle.pid, signal.SIGCONT)
    handle.unmount()


def test_a_mount_by_a_record_is_known_to_the_store(store: Store, space: Path) -> None:
    """As container engines mount: by cowfs-overlayfs, with the options of the record."""
    (record,) = store.mounts("k", mount_type="fuse")
    command = [
        sys.executable,
        "-m",
        "cowfs.cli.overlayfs",
        record.source,
        str(space / "mnt"),
        "-o",
        ",".join(record.options),
    ]
    subprocess.run(command, check=True, env=environment())
    (space / "mnt" / "f").write_bytes(bytes(40_000))
    assert store.mounted_at("k") == str(space / "mnt")
    assert store.usage("k").bytes >= 40_000
    with pytest.raises(FailedPrecondition, match=f"in use by process .*{space / 'mnt'}"):
        store.commit("k", "done")
    store.unmount("k")
    assert store.mounted_at("k") is None
    store.commit("k", "done")


def test_a_mount_without_a_notice_is_found(store: Store, space: Path) -> None:
    """One that an older cowfs made, or that found no room for its notice."""
    with store.mount("k", space / "mnt"):
        notice.drop(store.driver.directory(store.index.get("k").id))
        assert store.mounted_at("k") == str(space / "mnt")
        store.snapshot("k", "s1")


def _end_slowly(pid: int) -> threading.Thread:
    """Stop a server; it goes on in a second thread, a while after the main one has begun to wait."""
    os.kill(pid, signal.SIGSTOP)

    def go_on() -> None:
        time.sleep(1.5)  # longer than anybody who does not know that it ends would wait
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=go_on)
    thread.start()
    return thread


@pytest.mark.parametrize("verb", ["commit", "remove", "mount", "snapshot"])
def test_a_server_that_is_about_to_end_is_waited_for(store: Store, space: Path, verb: str) -> None:
    """The mount is off the tree by somebody's umount(2), and its server has not heard of it yet."""
    handle = store.mount("k", space / "mnt")
    assert isinstance(handle, cowfs.MountHandle)
    (space / "mnt" / "f").write_text("f")
    waiting = _end_slowly(handle.pid)
    sys_mounts.umount(space / "mnt")
    try:
        if verb == "mount":
            store.mount("k", space / "third").unmount()
        else:
            {
                "commit": lambda: store.commit("k", "done"),
                "remove": lambda: store.remove("k"),
                "snapshot": lambda: store.snapshot("k", "done"),
            }[verb]()
    finally:
        waiting.join()
    assert verb not in ("commit", "snapshot") or [change.path for change in store.diff("done")] == [b"f"]


def test_a_server_that_ends_is_told_from_the_next_with_its_device_number(store: Store, space: Path) -> None:
    """The kernel gives the number of a mount away as soon as it is unmounted: another key's server listens there then."""
    store.prepare("other")
    handle = store.mount("k", space / "mnt")
    assert isinstance(handle, cowfs.MountHandle)
    waiting = _end_slowly(handle.pid)
    sys_mounts.umount(space / "mnt")
    try:
        second = store.mount("other", space / "mnt")
        assert isinstance(second, cowfs.MountHandle)
        same = second.socket == handle.socket
        store.commit("k", "done")
    finally:
        waiting.join()
    if same:
        assert store.handle("other").status().label == "other"  # the first one took no socket away but its own
    second.unmount()


def test_a_mount_that_lives_on_is_not_waited_for(store: Store, space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    handle = store.mount("k", space / "mnt")
    assert isinstance(handle, cowfs.MountHandle)
    with pytest.raises(FailedPrecondition) as caught:
        store.commit("k", "done")
    assert f"in use by process {handle.pid}" in caught.value.message
    assert str(space / "mnt") in caught.value.message
    assert f"cowfs umount {space / 'mnt'}" in caught.value.remedy
    monkeypatch.undo()
    handle.unmount()


def test_a_mount_taken_off_the_tree_but_still_in_use_is_not_waited_for(store: Store, space: Path) -> None:
    handle = store.mount("k", space / "mnt")
    assert isinstance(handle, cowfs.MountHandle)
    with (space / "mnt" / "f").open("w") as file:
        handle.unmount(lazy=True)
        with pytest.raises(FailedPrecondition, match="in use"):
            store.commit("k", "done")
        file.write("still")
    store.commit("k", "done")
