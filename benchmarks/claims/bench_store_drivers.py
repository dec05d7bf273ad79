"""Claim: a layer's life under every driver of cowfs, and under podman's and containerd's own, in one run.

A base of some hundred small files and one big file. Each round prepares a writable layer over it, writes 4 KiB into the big
file (the first write: copied whole, or redirected), changes ten small files, commits, lists the changes, and removes the layer.

Three ways to call, which are not to be mixed: cowfs's drivers are called as a library; containerd's snapshotters through its
socket (its diff through ctr, which makes the layer's archive); podman is a command for each verb, whose start counts,
and so "overlay, commands" is cowfs by its command line. podman commits an image: the layer's archive, made and unpacked.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from ..lab.claim import Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, run, timed
from ..lab.peers import cowfs_env
from ..lab.stores import AUFS, BTRFS, COW, COW_BTRFS, ROW, THIN, VFS, ZFS, Opened, opened
from .bench_store_index import tree

COMMANDS, BY_KERNEL = "overlay, commands", "overlay, kernel"
PODMAN, CONTAINERD = ("podman overlay", "podman btrfs"), ("containerd overlayfs", "containerd btrfs")
STORES = (COW, BY_KERNEL, ROW, VFS, AUFS, THIN, BTRFS, COW_BTRFS, ZFS)
SUBJECTS = (*STORES, COMMANDS, *CONTAINERD, *PODMAN)
KERNEL = (BY_KERNEL, THIN, BTRFS, ZFS)  # mounted by the kernel, the others by cowfs's own server
VERBS = ("prepare", "first write", "commit", "diff", "remove")


class Layers(ABC):
    """The five verbs of one subject. ``at`` has a prepared layer's root, mounted."""

    @abstractmethod
    def prepare(self, key: str) -> None: ...

    @abstractmethod
    def at(self, key: str) -> contextlib.AbstractContextManager[Path]: ...

    @abstractmethod
    def commit(self, key: str, name: str) -> None: ...

    @abstractmethod
    def diff(self, name: str) -> None: ...

    @abstractmethod
    def remove(self, name: str) -> None: ...


class _Library(Layers):
    def __init__(self, lab: Lab, opened_: Opened, by_kernel: bool, fill: Callable[[Path], None]) -> None:
        self._place, self._type = lab.folder("mnt"), "kernel" if by_kernel else "fuse"
        self._opened, self._store = opened_, opened_.store
        opened_.base("base", fill)

    def prepare(self, key: str) -> None:
        self._store.prepare(key, "base")

    def at(self, key: str) -> contextlib.AbstractContextManager[Path]:
        return contextlib.contextmanager(self._at)(key)

    def _at(self, key: str) -> Iterator[Path]:
        handle = self._store.mount(key, str(self._place), mount_type=self._type)
        try:
            yield self._place
        finally:
            handle.unmount()

    def commit(self, key: str, name: str) -> None:
        self._store.commit(key, name)

    def diff(self, name: str) -> None:
        assert len(list(self._store.diff(name))) >= 11

    def remove(self, name: str) -> None:
        self._store.remove(name)


class _Commands(_Library):
    def _do(self, *words: str) -> None:
        command = [sys.executable, "-m", "cowfs", *words, "--root", str(self._opened.root)]
        subprocess.run(command, check=True, env=cowfs_env(), stdout=subprocess.DEVNULL)

    def prepare(self, key: str) -> None:
        self._do("prepare", key, "base")

    def commit(self, key: str, name: str) -> None:
        self._do("commit", key, name)

    def diff(self, name: str) -> None:
        self._do("diff", name)

    def remove(self, name: str) -> None:
        self._do("rm", name)


class _Podman(Layers):
    def __init__(self, disk: Path, running: Path, driver: str, fill: Callable[[Path], None]) -> None:
        self._words = ["podman", "--root", str(disk / "root"), "--runroot", str(running), "--storage-driver", driver]
        self._words += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        source = disk / "source"
        source.mkdir()
        fill(source)
        archive = disk / "base.tar"
        run(["tar", "-C", source, "-cf", archive, "."])
        self._do("import", "-q", str(archive), "base")

    def _do(self, *words: str) -> str:
        done = subprocess.run([*self._words, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"podman {words[0]}: {done.stderr.strip()[-300:]}")
        return done.stdout

    def prepare(self, key: str) -> None:
        self._do("create", "--name", key, "--network", "none", "base", "true")

    def at(self, key: str) -> contextlib.AbstractContextManager[Path]:
        return contextlib.contextmanager(self._at)(key)

    def _at(self, key: str) -> Iterator[Path]:
        yield Path(self._do("mount", key).strip())
        self._do("umount", key)

    def commit(self, key: str, name: str) -> None:
        self._do("commit", "-q", key, name)
        self._key = key

    def diff(self, name: str) -> None:
        assert len(self._do("diff", self._key).splitlines()) >= 11

    def remove(self, name: str) -> None:
        self._do("rm", self._key)

    def clear(self, name: str) -> None:
        """Remove the image, too: not timed."""
        self._do("rmi", name)


_CONFIG = """\
version = 2
root = "{disk}/root"
state = "{short}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{short}/c.sock"
"""


class _Containerd(Layers):
    def __init__(self, place: Path, short: Path, snapshotter: str, fill: Callable[[Path], None]) -> None:
        try:
            import grpc
        except ImportError:
            raise SkipSubject("grpcio is not installed (pip install 'cowfs-storage[containerd]')") from None
        self._error = grpc.RpcError
        self._channel = grpc.insecure_channel(f"unix:{short}/c.sock")
        self._place, self._socket, self._name = place, f"{short}/c.sock", snapshotter
        answer = self._call("Prepare", key="base-active", parent="")
        with self._mounted(answer) as at:
            fill(at)
        self._call("Commit", key="base-active", name="base")

    def _call(self, verb: str, **fields: str) -> object:
        from cowfs.service.containerd.messages import METHODS, SERVICE, message

        asked, answered = (message(each) for each in METHODS[verb])
        method = self._channel.unary_unary(
            f"/{SERVICE}/{verb}", request_serializer=asked.SerializeToString, response_deserializer=answered.FromString
        )
        kept = {} if verb == "Remove" else {"labels": {"containerd.io/gc.root": "kept"}}  # else containerd collects it
        request = asked(snapshotter=self._name, **fields, **kept)
        try:
            return method(request, timeout=60, metadata=(("containerd-namespace", "bench"),))
        except self._error as why:
            raise RuntimeError(f"containerd, {verb}: {why.details()}") from None

    @contextlib.contextmanager
    def _mounted(self, answer: object) -> Iterator[Path]:
        (record,) = answer.mounts  # type: ignore[attr-defined]
        options = [each for each in record.options if each != "rbind"]
        words = ["--rbind"] if record.type == "bind" else ["-t", record.type, "-o", ",".join(options)]
        run(["mount", *words, record.source, self._place])
        try:
            yield self._place
        finally:
            run(["umount", self._place])

    def prepare(self, key: str) -> None:
        self._answer = self._call("Prepare", key=key, parent="base")

    def at(self, key: str) -> contextlib.AbstractContextManager[Path]:
        return self._mounted(self._answer)

    def commit(self, key: str, name: str) -> None:
        self._call("Commit", key=key, name=name)

    def diff(self, name: str) -> None:
        words = [
            "ctr",
            "-a",
            self._socket,
            "-n",
            "bench",
            "snapshots",
            "--snapshotter",
            self._name,
            "diff",
            "base",
            name,
        ]
        assert len(subprocess.run(words, check=True, capture_output=True).stdout) > 0

    def remove(self, name: str) -> None:
        self._call("Remove", key=name)


@contextlib.contextmanager
def _containerd(lab: Lab, kind: str, short: Path, fill: Callable[[Path], None]) -> Iterator[Layers]:
    snapshotter = "btrfs" if kind == "btrfs" else "overlayfs"
    with lab.fresh(kind, 4 << 30) as disk:
        short.mkdir()
        (short / "config.toml").write_text(_CONFIG.format(disk=disk, short=short))
        with open(short / "log", "wb") as log:
            server = subprocess.Popen(["containerd", "-c", short / "config.toml"], stdout=log, stderr=log)
        try:
            end = time.monotonic() + 30
            ask = ["ctr", "-a", f"{short}/c.sock", "version"]
            while subprocess.run(ask, capture_output=True, check=False).returncode:
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"containerd does not start: {(short / 'log').read_text()[-300:]}")
                time.sleep(0.05)
            yield _Containerd(lab.folder("mnt"), short, snapshotter, fill)
        finally:
            server.terminate()
            server.wait(30)
            for one in Path("/proc/self/mounts").read_text().splitlines():  # its plugins bind their own folders
                if one.split()[1].startswith(f"{disk}/"):
                    subprocess.run(["umount", "-l", one.split()[1]], check=False, capture_output=True)


@contextlib.contextmanager
def _podman(lab: Lab, kind: str, short: Path, fill: Callable[[Path], None]) -> Iterator[Layers]:
    driver = "btrfs" if kind == "btrfs" else "overlay"
    with lab.fresh(kind, 4 << 30) as disk:
        try:
            yield _Podman(disk, short, driver, fill)
        finally:
            for one in Path("/proc/self/mounts").read_text().splitlines():
                if one.split()[1].startswith(f"{disk}/"):
                    subprocess.run(["umount", "-l", one.split()[1]], check=False, capture_output=True)


def _needs(program: str) -> None:
    import shutil

    if shutil.which(program) is None:
        raise SkipSubject(f"{program} is not installed")


@contextlib.contextmanager
def _layers(lab: Lab, subject: str, short: Path, fill: Callable[[Path], None]) -> Iterator[Layers]:
    kind = "btrfs" if subject.endswith("btrfs") else "ext4"
    if subject in CONTAINERD:
        _needs("containerd")
        with _containerd(lab, kind, short, fill) as layers:
            yield layers
    elif subject in PODMAN:
        _needs("podman")
        with _podman(lab, kind, short, fill) as layers:
            yield layers
    else:
        with opened(lab, COW if subject in (COMMANDS, BY_KERNEL) else subject, 4 << 30) as store:
            yield (_Commands if subject == COMMANDS else _Library)(lab, store, subject in KERNEL, fill)


def measure(lab: Lab) -> None:
    files, big = max(100, lab.profile.store_tree // 10), lab.profile.big

    def fill(at: Path) -> None:
        tree(at, files)
        with open(at / "big", "wb") as file:
            for _ in range(big >> 20):
                file.write(b"\x5a" * (1 << 20))

    with (
        tempfile.TemporaryDirectory(prefix="cb", dir="/run", ignore_cleanup_errors=True) as short,
        contextlib.ExitStack() as held,
    ):
        ready: dict[str, Layers] = {}
        for subject in lab.wanted(SUBJECTS):
            with lab.trying(subject):
                ready[subject] = held.enter_context(
                    _layers(lab, subject, Path(short, f"{SUBJECTS.index(subject)}"), fill)
                )
        os.sync()
        for number, subject in lab.rounds(list(ready), 2 * lab.profile.rounds):
            with lab.trying(subject):
                _life(lab, subject, ready[subject], number)
    lab.note(f"base: {files:,} small files and one of {big >> 20} MiB; load {os.getloadavg()[0]:.1f} at the end")


def _life(lab: Lab, subject: str, layers: Layers, number: int) -> None:
    key, name = f"key-{number}", f"name-{number}"
    lab.record("prepare", subject, timed(lambda: layers.prepare(key)))
    with layers.at(key) as at:
        lab.record("first write", subject, timed(lambda: _write(at / "big", number)))
        for one in range(10):
            (at / f"new-{one}").write_text(f"{number} {one}")
    lab.record("commit", subject, timed(lambda: layers.commit(key, name)))
    lab.record("diff", subject, timed(lambda: layers.diff(name)))
    lab.record("remove", subject, timed(lambda: layers.remove(name)))
    if isinstance(layers, _Podman):
        layers.clear(name)


def _write(path: Path, number: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"\xa5" * 4096, (number + 1) * (1 << 20))
    os.close(fd)


CLAIM = Claim(
    name="store_drivers",
    title="a layer's life under every driver, and under podman's and containerd's own",
    why="Copy-on-write or redirect-on-write, files or blocks, ours or theirs: one workload for all.",
    metrics=tuple(Metric(name=name) for name in VERBS),
    subjects=SUBJECTS,
    measure=measure,
    bars=(),
    topic="store",
    picture=False,
)  # fmt: skip


def test_store_drivers(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
