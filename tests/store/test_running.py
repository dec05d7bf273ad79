"""Store.run, cowfs.run and Store.temporary: `cowfs run` as a function."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace

import cowfs
from cowfs.errors import AlreadyExists, InvalidArgument, NotFound
from cowfs.model import Kind
from cowfs.store import Store

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(namespace.why_not) or shutil.which("busybox") is None,
    reason="needs root, mounts and busybox-static",
)


@pytest.fixture
def store(space: Path) -> Iterator[Store]:
    with Store.open(space / "store", driver="overlay", fsync=False) as made:
        made.prepare("fill")
        with made.paths("fill") as paths:
            for name in ("bin", "dev", "proc", "tmp"):
                paths.makedirs(name)
            paths.write_bytes("bin/busybox", Path(shutil.which("busybox") or "").read_bytes(), mode=0o755)
            for applet in ("sh", "cat", "echo", "sleep", "dd", "env", "pwd", "id"):
                paths.symlink("busybox", f"bin/{applet}")
        made.commit("fill", "box")
        yield made


def test_a_run_tells_status_output_usage_and_changes(store: Store) -> None:
    done = store.run("box", ["/bin/sh", "-c", "cat; echo err >&2; echo new > /tmp/f; exit 3"], input=b"given")
    assert (done.returncode, done.stdout, done.stderr, done.timed_out) == (3, b"given", b"err\n", False)
    assert [(change.kind, change.path) for change in done.changes if change.type == "file"] == [("added", b"tmp/f")]
    assert done.usage.bytes > 0
    assert [info.name for info in store.walk()] == ["box"]


def test_limits_environment_directory_and_network(store: Store) -> None:
    full = store.run("box", ["/bin/dd", "if=/dev/zero", "of=/tmp/big", "bs=64k", "count=100"], size="1M")
    assert b"No space left" in full.stderr
    assert full.usage.bytes <= 1 << 20
    assert store.run("box", ["/bin/pwd"], workdir="/tmp").stdout == b"/tmp\n"
    assert b"A=b c\n" in store.run("box", ["/bin/env"], env={"A": "b c"}).stdout
    assert store.run("box", ["/bin/cat", "/proc/net/dev"], network="none").stdout.count(b":") == 1


def test_what_is_kept_can_be_committed(store: Store) -> None:
    done = store.run("box", ["/bin/sh", "-c", "echo 1 > /tmp/f"], keep=True, key="job")
    assert done.key == "job"
    store.commit("job", "built")
    with store.open_file("built", "tmp/f") as file:
        assert file.read() == b"1\n"


def test_a_timeout_and_errors_are_told_apart_from_statuses(store: Store) -> None:
    late = store.run("box", ["/bin/sleep", "100"], timeout=1)
    assert (late.returncode, late.timed_out) == (124, True)
    own = store.run("box", ["/bin/sh", "-c", "exit 124"], timeout=100)
    assert (own.returncode, own.timed_out) == (124, False)
    assert store.run("box", ["/bin/nothing"]).returncode == 127
    with pytest.raises(NotFound):
        store.run("nothing", ["/bin/true"])
    with pytest.raises(InvalidArgument):
        store.run("box", ["/bin/true"], size="much")
    with pytest.raises(InvalidArgument):
        store.run("box", ["/bin/true"], env={"A=B": "c", "": "x"})
    store.prepare("mine", "box")
    with store.paths("mine") as paths:
        paths.write_bytes("keep", b"me")
    with pytest.raises(AlreadyExists):
        store.run("box", ["/bin/true"], key="mine")
    with store.open_file("mine", "keep") as file:
        assert file.read() == b"me"
    assert [info.name for info in store.walk()] == ["box", "mine"]


def test_runs_in_threads_do_not_meet(store: Store) -> None:
    found: list[bytes] = []

    def one(number: int) -> None:
        found.append(store.run("box", ["/bin/sh", "-c", f"echo {number} > /tmp/f; cat /tmp/f"]).stdout)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [b"0\n", b"1\n", b"2\n", b"3\n"]
    assert [info.name for info in store.walk()] == ["box"]


def test_run_opens_a_store_by_its_place(store: Store) -> None:
    assert cowfs.run("box", ["/bin/echo", "hello"], root=store.root).stdout == b"hello\n"
    with pytest.raises(NotFound):
        cowfs.run("box", ["/bin/echo"], root=f"{store.root}-none")


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")
def test_a_temporary_snapshot_is_gone_after_the_block(store: Store, space: Path) -> None:
    with store.temporary("box", size="1M") as mount:
        at = Path(mount.mountpoint)
        assert (at / "bin/busybox").exists()
        (at / "f").write_text("x")
        with pytest.raises(OSError, match="No space"):
            (at / "big").write_bytes(bytes(range(256)) * 20_000)
        assert [info.kind for info in store.walk()][-1] is Kind.ACTIVE
    assert not at.exists()
    (space / "here").mkdir()
    with pytest.raises(RuntimeError), store.temporary(target=space / "here") as mount:
        assert mount.mountpoint == str(space / "here")
        raise RuntimeError
    assert [info.name for info in store.walk()] == ["box"]
    assert list((space / "here").iterdir()) == []


def test_what_a_killed_program_leaves_is_pruned(store: Store, space: Path) -> None:
    """kill -9 of a program inside of ``temporary``: the mount is cleared and prune takes the snapshot."""
    import sys

    code = (
        "import sys, time; from cowfs.store import Store\n"
        f"with Store.open({store.root!r}, fsync=False) as s, s.temporary('box') as m:\n"
        "    print(m.mountpoint, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        at = program.stdout.readline().strip()
        program.kill()
    assert store.prune().names == ()  # its server goes on: it is in use
    cowfs.umount(at)
    os.rmdir(at)
    end = time.monotonic() + 30
    while not (done := store.prune()).names and time.monotonic() < end:
        time.sleep(0.05)
    assert len(done.names) == 1
