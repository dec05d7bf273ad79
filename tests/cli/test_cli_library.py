"""cowfs.mount() and MountHandle: what the command does, from Python, also from a process with threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import users
from support.command import environment, run_module, user_python

import cowfs
from cowfs.mounting import client, protocol


@pytest.fixture
def layers(stack: Path) -> list[str]:
    return [str(stack / name) for name in ("1-base", "2-python", "10-app")]


def test_block_mounts_and_unmounts(run_directory: Path, layers: list[str], mnt: Path, space: Path) -> None:
    """Usage, limit, diff and counters of a live mount; gone at the end of the block, with everything of it."""
    others = set(run_directory.iterdir())  # a daemon of another test may have its directories here
    with cowfs.mount(layers, mnt, upper=space / "up", size="1M", inodes="1k") as m:
        assert isinstance(m, cowfs.MountHandle)
        assert os.path.ismount(mnt)
        assert set(run_directory.iterdir()) > others
        before = m.usage()
        (mnt / "new").write_bytes(b"x" * 8192)
        after = m.usage()
        assert (after.bytes - before.bytes, after.inodes - before.inodes) == (8192, 1)
        assert m.limit() == cowfs.Limit(bytes=1 << 20, inodes=1000)
        assert m.limit(size="2M", inodes=None) == cowfs.Limit(bytes=2 << 20)
        assert m.limit(inodes=5) == cowfs.Limit(bytes=2 << 20, inodes=5)
        assert [c.path for c in m.diff() if c.kind == "added"] == [b"new"]
        assert m.counters()["WRITE"] >= 1
        status = m.status()
        assert (status.layers, status.upper, status.pid) == (tuple(layers), str(space / "up"), m.pid)
        assert [s.mountpoint for s in cowfs.mounts()] == [str(mnt)]
    assert not os.path.ismount(mnt)
    assert set(run_directory.iterdir()) <= others


def test_block_unmounts_after_an_error(run_directory: Path, layers: list[str], mnt: Path) -> None:
    with pytest.raises(RuntimeError), cowfs.mount(layers, mnt, readonly=True):
        raise RuntimeError
    assert not os.path.ismount(mnt)


def test_one_path_is_a_stack(run_directory: Path, stack: Path, mnt: Path) -> None:
    with cowfs.mount(stack, mnt, ephemeral=True) as m:
        assert len(m.status().layers) == 3


def test_errors_keep_their_class(run_directory: Path, layers: list[str], mnt: Path, space: Path) -> None:
    """An error in the server is raised here, in its own class, with its remedy."""
    with pytest.raises(cowfs.NotFound, match="nowhere"):
        cowfs.mount([space / "nowhere"], mnt, readonly=True)
    with pytest.raises(cowfs.InvalidArgument, match="twice"):
        cowfs.mount([*layers, layers[0]], mnt, readonly=True)
    with cowfs.mount(layers, mnt, upper=space / "up"):
        (space / "mnt2").mkdir()
        with pytest.raises(cowfs.FailedPrecondition, match="in use by process") as caught:
            cowfs.mount(layers, space / "mnt2", upper=space / "up")
        assert "--ephemeral" in caught.value.remedy
    with cowfs.mount(layers, mnt, readonly=True) as m:
        assert isinstance(m, cowfs.MountHandle)
        with pytest.raises(cowfs.FailedPrecondition):
            m.diff()
        with pytest.raises(cowfs.FailedPrecondition):
            m.limit(size="1G")


def test_mount_from_a_threaded_process(run_directory: Path, layers: list[str], mnt: Path, space: Path) -> None:
    """Four threads mount at once: nothing is forked from a process with threads."""
    targets = [space / f"m{number}" for number in range(4)]
    errors: list[BaseException] = []

    def work(target: Path) -> None:
        try:
            target.mkdir()
            with cowfs.mount(layers, target, readonly=True):
                assert (target / "app/main").read_text() == "main\n"
        except BaseException as error:  # noqa: BLE001  (shown in the main thread)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_mount_outlives_its_maker(run_directory: Path, stack: Path, mnt: Path) -> None:
    code = f"import cowfs; print(cowfs.mount({str(stack)!r}, {str(mnt)!r}, readonly=True).pid)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    handle = cowfs.attach(mnt)
    assert handle.pid == int(done.stdout)
    assert (mnt / "app/main").exists()
    handle.unmount()


def test_attach(run_directory: Path, layers: list[str], mnt: Path) -> None:
    with pytest.raises(cowfs.NotFound):
        cowfs.attach(mnt)
    with cowfs.mount(layers, mnt, readonly=True) as m:
        assert isinstance(m, cowfs.MountHandle)
        again = cowfs.attach(str(mnt))
        assert (again.pid, again.socket, again.mountpoint) == (m.pid, m.socket, m.mountpoint)
        os.kill(m.pid, signal.SIGKILL)
        with pytest.raises(cowfs.FailedPrecondition, match="gone"):
            cowfs.attach(mnt)
        with pytest.raises(cowfs.FailedPrecondition):
            m.usage()
        m.unmount()
        m2 = client.mounts()
        assert [s for s in m2 if s.mountpoint == str(mnt)] == []
        with pytest.raises(cowfs.NotFound):
            m.unmount()


def test_busy_mount_stays(run_directory: Path, layers: list[str], mnt: Path) -> None:
    m = cowfs.mount(layers, mnt, readonly=True)
    assert isinstance(m, cowfs.MountHandle)
    with open(mnt / "app/main") as inside:
        with subprocess.Popen(["sleep", "60"], cwd=mnt) as sleeper:
            with pytest.raises(cowfs.FailedPrecondition, match="busy"):
                m.unmount()
            sleeper.kill()
        assert inside.read() == "main\n"
    m.unmount()


def test_server_knows_its_verbs(run_directory: Path, layers: list[str], mnt: Path) -> None:
    """The socket is its owner's alone; nonsense on it is answered with an error and harms nothing."""
    with cowfs.mount(layers, mnt, readonly=True) as m:
        assert isinstance(m, cowfs.MountHandle)
        assert os.stat(m.socket).st_mode & 0o777 == 0o600
        with pytest.raises(cowfs.InvalidArgument, match="no such verb"):
            m.ask("frobnicate")
        for line in (b"nonsense\n", b"[]\n", b"{}\n", b"\xff\n"):
            with protocol.connect(m.socket) as sock:
                sock.sendall(line)
                assert "error" in protocol.decode(protocol.read_line(sock))
        with protocol.connect(m.socket) as sock:
            sock.sendall(b'{"verb": ')  # and gone
        wrong: tuple[Any, ...] = (0, -1, "x", 1.5, [])
        for value in wrong:
            with pytest.raises((cowfs.InvalidArgument, cowfs.FailedPrecondition)):
                m.ask("limit", bytes=value)
        assert m.status().alive


def test_a_dead_servers_socket_is_swept(run_directory: Path, layers: list[str], mnt: Path) -> None:
    m = cowfs.mount(layers, mnt, readonly=True)
    assert isinstance(m, cowfs.MountHandle)
    os.kill(m.pid, signal.SIGKILL)
    while True:
        try:
            protocol.connect(m.socket).close()
        except ConnectionRefusedError:
            break
        except OSError:
            pass  # still dying
    cowfs.umount(mnt)
    cowfs.mounts()
    assert not os.path.exists(m.socket)


def test_as_an_ordinary_user(run_directory: Path, ordinary_user: int, stack: Path, mnt: Path, tmp_path: Path) -> None:
    """Mounted through fusermount3, with a limit; the control socket is in the user's own directory."""
    python = user_python()
    if python is None:
        pytest.skip("an ordinary user cannot run this interpreter with this tree")
    runtime = stack.parent / "runtime"
    runtime.mkdir(mode=0o700)
    for path in (runtime, mnt, stack.parent, stack):
        os.chown(path, users.UID, users.GID)
    script = f"""
import os, cowfs
with cowfs.mount({str(stack)!r}, {str(mnt)!r}, size="64k") as m:
    os.mkdir({str(mnt / "mine")!r})
    try:
        with open({str(mnt / "mine/big")!r}, "wb", buffering=0) as file:
            while file.write(b"x" * 4096): pass
    except OSError as error:
        print(error.errno)
    print(m.usage().bytes <= 65536, os.path.dirname(m.socket))
    os.unlink({str(mnt / "app/main")!r}) if os.access({str(mnt / "app")!r}, os.W_OK) else None
    print([c.path for c in m.diff() if c.kind == "added"])
print(os.path.ismount({str(mnt)!r}), os.listdir({str(runtime / "cowfs")!r}))
"""
    done = subprocess.run(
        users.command_as([python, "-c", script]),
        env={**environment(), "XDG_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "28",
        f"True {runtime / 'cowfs'}",
        "[b'mine', b'mine/big']",
        "False []",
    ]


def test_errors_travel_whole() -> None:
    """An error on the socket comes back as its class, message and remedy; an unknown one as the base."""
    for kind in (cowfs.NotFound, cowfs.LimitExceeded, cowfs.Unsupported):
        back = protocol.error_from(protocol.error_to(kind("what", remedy="how")))
        assert (type(back), back.message, back.remedy) == (kind, "what", "how")
    strange: tuple[Any, ...] = ({"type": "os", "message": "m"}, {"type": "CowfsError"}, [], None, {"type": "__doc__"})
    for data in strange:
        assert type(protocol.error_from(data)) is cowfs.CowfsError


def test_package_exports() -> None:
    """Every public name can be had, and is listed."""
    for name in cowfs.__all__:
        assert getattr(cowfs, name) is not None
        assert name in dir(cowfs)
    with pytest.raises(AttributeError, match="frobnicate"):
        cowfs.frobnicate  # noqa: B018


HEAVY = {
    "sqlite3", "asyncio", "subprocess", "tempfile", "multiprocessing", "email", "http", "hashlib", "tarfile", "fuse",
    "xattr", "zstandard", "unittest", "ctypes.util", "cowfs.store", "cowfs.index.database", "cowfs.archive", "cowfs.images",
    "cowfs.mounting.client", "cowfs.diff.changes", "argparse",
}  # fmt: skip


def _modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_costs_nothing() -> None:
    """`import cowfs` loads no other module of ours."""
    assert {name for name in _modules_after("import cowfs") if name.startswith("cowfs")} == {"cowfs"}


def test_the_mount_loads_only_what_it_needs() -> None:
    """Neither parsing nor serving loads what only other verbs need (a mount has 200 ms, Python's start included)."""
    serving = _modules_after(
        "import cowfs.mounting.server\nfrom cowfs.fuse import Session\nfrom cowfs.union import View"
    )
    assert serving & HEAVY - {"subprocess"} == set()
    parsing = _modules_after("from cowfs.cli import parser_of\nparser_of('mount')")
    assert parsing & (HEAVY - {"argparse"}) == set()


def test_module_runs_as_the_command(run_directory: Path) -> None:
    for module in ("cowfs", "cowfs.cli"):
        assert run_module(module, "--version").stdout == f"cowfs {cowfs.__version__}\n"
