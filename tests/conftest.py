"""Fixtures for tests of real mounts.

The whole pytest process moves to a mount namespace of its own before the first test
(``support.namespace``), so no mount can leak to the machine. Server processes and loop devices could still leak; they
are checked at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, os.path.dirname(__file__))

from support import hostfs, mounts, namespace, users, zpool

from cowfs.mounting import prefork

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # its handlers of fork(2) wait for its threads, some of which wait for us
os.environ["COWFS_PROGRESS"] = (
    "none"  # a verb that takes a second on a busy machine says nothing more than on an idle one
)
namespace.enter()
settings.register_profile("cowfs", deadline=None)  # no test depends on how fast the machine is
settings.load_profile("cowfs")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cowfs")
    group.addoption("--steps", type=int, default=20_000, help="random operations of each equality test (default 20000)")
    group.addoption(
        "--history", type=int, default=20_000, help="operations of the histories of stores, all drivers (default 20000)"
    )
    group.addoption("--kills", type=int, default=50, help="SIGKILLs of the fault test (default 50)")
    group.addoption("--rounds", type=int, default=6, help="rounds of the growth test of live snapshots (default 6)")
    group.addoption("--thorough", action="store_true", help="every case where a test takes a sample of them")
    group.addoption("--seed", type=int, default=20_261_124, help="seed of every random test")
    group.addoption(
        "--impl", default="kernel,fusepy", help="what the POSIX tests run against: plain,overlay,kernel,fusepy"
    )
    group.addoption("--debian-root", default=os.environ.get("COWFS_DEBIAN_ROOT", ""), help="tar of a Debian root")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "slow: takes more than half a minute",
        "tree(build): a function that fills the test's directory, run in a lower layer and again through the mount",
        "only(*impls, reason): the implementations that can do what the test asks, and why others cannot",
    ):
        config.addinivalue_line("markers", line)


@pytest.fixture(scope="session")
def can_mount() -> None:
    """Skip where this host does not let us mount."""
    if namespace.why_not:
        pytest.skip(namespace.why_not)


@pytest.fixture(scope="session")
def public_directory(can_mount: None) -> Iterator[Path]:
    """A directory that every user can reach (pytest's own is closed by each session that starts)."""
    path = Path(tempfile.mkdtemp(prefix="cowfs-tests-"))
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False)


@pytest.fixture(scope="session")
def scratch(public_directory: Path) -> Iterator[Path]:
    """A tmpfs of 2 GiB for the session: where tests put layers unless they ask for another host."""
    target = hostfs.make_tmpfs(public_directory)
    yield target
    mounts.umount_busy(str(target), 2.0)


@pytest.fixture
def space(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on the session's tmpfs, removed afterwards."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    path = scratch / f"{name}-{time.monotonic_ns():x}"
    path.mkdir()
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False)


_opened: dict[str, hostfs.HostFs] = {}


@pytest.fixture
def host(public_directory: Path) -> Iterator[Callable[[str], hostfs.HostFs]]:
    """A host filesystem by its name, mounted once a session; a test's directories go with the test."""
    used: set[str] = set()

    def get(name: str) -> hostfs.HostFs:
        if name not in _opened:
            base = public_directory / f"host-{name}"
            base.mkdir(mode=0o755)
            _opened[name] = hostfs.open_fs(name, base)
        used.add(name)
        return _opened[name]

    yield get
    for name in used:
        _opened[name].clear()


@pytest.fixture(scope="session")
def session_pool(tmp_path_factory: pytest.TempPathFactory, can_mount: None) -> Iterator[Path]:
    """A pool of zfs, served for the session by a daemon of its own."""
    base = tmp_path_factory.mktemp("zfs")
    base.chmod(0o755)
    with zpool.pool(base) as place:
        yield place


@pytest.fixture
def pool(session_pool: Path) -> Iterator[Path]:
    """The session's pool; datasets and directories of the test go with it."""
    yield session_pool
    zpool.clear(session_pool)
    for path in session_pool.iterdir():
        shutil.rmtree(path)


@pytest.fixture(params=hostfs.NAMES)
def fs(request: pytest.FixtureRequest, host: Callable[[str], hostfs.HostFs]) -> hostfs.HostFs:
    """Each host filesystem in turn."""
    return host(request.param)


@pytest.fixture(scope="session")
def ordinary_user(tmp_path_factory: pytest.TempPathFactory, can_mount: None) -> int:
    """The id of a user who may use /dev/fuse here; skips where that cannot be arranged."""
    reason = users.open_fuse_device(tmp_path_factory.mktemp("fuse-device"))
    if reason:
        pytest.skip(reason)
    return users.UID


def _children() -> dict[int, str]:
    """Processes in our mount namespace but us and our parents: pid -> command line."""
    ours = os.readlink("/proc/self/ns/mnt")
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            if os.readlink(f"/proc/{name}/ns/mnt") != ours:
                continue
            with open(f"/proc/{name}/cmdline", "rb") as file:
                line = file.read().replace(b"\0", b" ").decode(errors="replace")
            with open(f"/proc/{name}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[0] == b"Z":
                    continue
        except OSError:
            continue
        found[int(name)] = line
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """No process that a test started outlives the session."""
    if namespace.why_not or os.environ.get("COWFS_TEST_NAMESPACE") == "host":
        yield
        return
    before = set(_children())
    yield
    prefork.close()
    end = time.monotonic() + 10
    while left := {pid: line for pid, line in _children().items() if pid not in before}:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"left running: {left}")
        time.sleep(0.05)
