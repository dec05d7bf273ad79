"""Store.run, cowfs.run and Store.temporary: `cowfs run` as a function."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
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
    assert store.run("box", ["/bin/cat", "/proc/net/dev"]).stdout.count(b":") == 1
    assert store.run("box", ["/bin/cat", "/proc/net/dev"], network="host").stdout.count(b":") >= 1


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


def test_a_killed_program_takes_its_mount_along_and_its_snapshot_is_pruned(store: Store) -> None:
    """kill -9 of a program inside of ``temporary``: the mount ends with it and prune takes the snapshot."""
    code = (
        "import time; from cowfs.store import Store\n"
        f"with Store.open({store.root!r}, fsync=False) as s, s.temporary('box') as m:\n"
        "    print(m.mountpoint, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        at = program.stdout.readline().strip()
        assert os.path.ismount(at)
        program.kill()
    pruned(store)
    assert not os.path.ismount(at)
    os.rmdir(at)


def pruned(store: Store) -> None:
    """Wait until the one snapshot that a killed program left is gone."""
    end = time.monotonic() + 60
    while not (done := store.prune()).names and time.monotonic() < end:
        time.sleep(0.05)
    assert len(done.names) == 1


def test_a_killed_caller_takes_its_command_along(store: Store) -> None:
    """kill -9 of a program inside of ``run``: the command ends, and nothing of it stays."""
    mark = f"34{os.getpid()}"
    code = (
        "from cowfs.store import Store\n"
        f"with Store.open({store.root!r}, fsync=False) as s:\n"
        f"    s.run('box', ['/bin/sh', '-c', 'echo up; sleep {mark}; true'], capture=False)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "up\n"
        program.kill()
        assert program.stdout.read() == ""  # until the last of them has ended
    end = time.monotonic() + 60
    while len(list(store.walk())) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert [info.name for info in store.walk()] == ["box"]


def test_binds_user_terminal_and_cost(store: Store, space: Path) -> None:
    (space / "given").mkdir()
    (space / "given/a:b").write_text("colon")
    done = store.run(
        "box", ["/bin/sh", "-c", "cat /x; echo 1 > /g/new; id -u; :> /x"],
        binds=[(space / "given/a:b", "/x", "ro"), f"{space}/given:/g"],
    )  # fmt: skip
    assert (done.stdout, b"Read-only" in done.stderr) == (b"colon0\n", True)
    assert (space / "given/new").read_text() == "1\n"
    assert store.run("box", ["/bin/id", "-u"], user=77).stdout == b"77\n"
    seen = store.run("box", ["/bin/sh", "-c", "test -t 0 -a -t 1 && echo terminal"], tty=True)
    assert seen.stdout == b"terminal\r\n"
    busy = store.run("box", ["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=1M", "count=2000"])
    assert busy.cpu_seconds > 0
    assert busy.peak_memory > 1 << 20
    for wrong in (
        {"binds": ["/x"]},
        {"user": "nobody-there"},
        {"network": "bridge"},
        {"timeout": float("nan")},
        {"mount_type": "nfs"},
    ):
        with pytest.raises(InvalidArgument):
            store.run("box", ["/bin/true"], **wrong)
    assert [info.name for info in store.walk()] == ["box"]


def test_nothing_of_a_request_shows_in_ps(store: Store) -> None:
    secret = f"secret-{os.getpid()}"
    done = store.run("box", ["/bin/sh", "-c", "echo $KEY; cat /proc/*/cmdline"], env={"KEY": secret})
    assert done.stdout.startswith(secret.encode())
    assert done.stdout.count(secret.encode()) == 1


def test_asyncio(store: Store) -> None:
    """Many at once, more than the loop has threads; a cancelled one ends its command before it goes on."""

    async def many() -> None:
        results = await asyncio.gather(
            *[store.run_async("box", ["/bin/sh", "-c", f"echo {number}"]) for number in range(8)]
        )
        assert [done.stdout for done in results] == [b"%d\n" % number for number in range(8)]
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.run_async("box", ["/bin/sleep", "1000"]), 3)
        assert time.monotonic() - begun < 500
        assert [info.name for info in store.walk()] == ["box"]
        with pytest.raises(NotFound):
            await store.run_async("nothing", ["/bin/true"])
        if os.path.exists("/dev/fuse"):
            async with store.temporary_async("box") as mount:
                assert os.path.exists(f"{mount.mountpoint}/bin/busybox")
            assert not os.path.exists(mount.mountpoint)

    asyncio.run(many())
    assert [info.name for info in store.walk()] == ["box"]


def test_kernel_mounts_on_request(store: Store) -> None:
    done = store.run("box", ["/bin/sh", "-c", "cat /proc/self/mountinfo; echo x > /tmp/f"], mount_type="kernel")
    assert b" - overlay " in done.stdout.splitlines()[0]
    assert b"tmp/f" in [change.path for change in done.changes]
    assert [info.name for info in store.walk()] == ["box"]
