"""The compared file systems: one record each, mounted over the same layers by its own command.

Strategy: a `Peer` knows its command line and nothing else; `mounted` starts it in the foreground as our child (so
that its memory can be read and its end is certain), waits until the mount shows in mountinfo and answers, and
afterwards unmounts, ends the server and collects it. A peer that cannot run here has a reason, found by `absent`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .measure import Lab, SkipSubject, end_process, is_mounted, run, unmount

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The directories of a mount: lowers bottom first; upper and work on one file system, or None for a read-only mount."""

    lowers: tuple[Path, ...]
    upper: Path | None = None
    work: Path | None = None


@dataclass(slots=True)
class Mounted:
    """A mount that answers. ``server`` is its process, None for the kernel's own file systems."""

    path: Path
    server: subprocess.Popen[bytes] | None = None
    stack: Stack = field(default_factory=lambda: Stack(lowers=()))

    @property
    def pid(self) -> int | None:
        return self.server.pid if self.server else None


Command = Callable[[Stack, Path], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One file system under test. ``command`` gives its foreground command line, or its mount command if ``kernel``."""

    name: str
    command: Command
    absent: Callable[[], str]  # "" when it can run, else the reason
    kernel: bool = False
    readonly: bool = True  # whether it can be mounted without an upper
    max_lowers: int = 500
    env: dict[str, str] = field(default_factory=dict)


def _join(paths: Sequence[Path]) -> str:
    return ":".join(str(path).replace("\\", "\\\\").replace(":", "\\:") for path in reversed(paths))


def _overlay(extra: str) -> Command:
    def command(stack: Stack, at: Path) -> list[str]:
        """Layer names are given relative to their common folder: mount(2) takes one page of options."""
        lowers = ":".join(os.path.relpath(path, _base(stack)) for path in reversed(stack.lowers))
        if stack.upper is None and len(stack.lowers) == 1:  # the kernel wants two without an upper
            empty = at.with_name(at.name + ".empty")
            empty.mkdir(exist_ok=True)
            lowers = f"{empty}:{lowers}"
        options = f"lowerdir={lowers}" + (f",upperdir={stack.upper},workdir={stack.work}" if stack.upper else "")
        return ["mount", "-t", "overlay", "overlay", "-o", options + extra, str(at)]

    return command


def _base(stack: Stack) -> Path:
    return Path(os.path.commonpath([path.parent for path in stack.lowers]))


def _fuse_overlayfs(program: Callable[[], str | None]) -> Command:
    def command(stack: Stack, at: Path) -> list[str]:
        options = f"lowerdir={_join(stack.lowers)}"
        if stack.upper:
            options += f",upperdir={stack.upper},workdir={stack.work}"
        return [program() or "fuse-overlayfs", "-f", "-o", options, str(at)]

    return command


def _unionfs(stack: Stack, at: Path) -> list[str]:
    branches = [f"{stack.upper}=RW"] if stack.upper else []
    branches += [f"{path}=RO" for path in reversed(stack.lowers)]
    return ["unionfs", "-f", "-o", "cow,allow_other,default_permissions,use_ino,suid,dev", ":".join(branches), str(at)]


def _cowfs(*extra: str) -> Command:
    def command(stack: Stack, at: Path) -> list[str]:
        argv = [sys.executable, "-m", "cowfs", "mount", "--foreground", *extra]
        argv += ["--upper", str(stack.upper)] if stack.upper else ["--read-only"]
        for path in stack.lowers:
            argv += ["--layer", str(path)]
        return [*argv, str(at)]

    return command


def needs(*programs: str) -> Callable[[], str]:
    def absent() -> str:
        missing = [program for program in programs if not shutil.which(program)]
        return f"{missing[0]} is not installed" if missing else ""

    return absent


@functools.cache
def fuse_overlayfs(major: int) -> str | None:
    """The fuse-overlayfs of that major version: on PATH, in ~/.cargo/bin, in /opt/fo2/bin, or $COWFS_BENCH_FO2."""
    folders = [*os.environ.get("PATH", "").split(":"), os.path.expanduser("~/.cargo/bin"), "/opt/fo2/bin"]
    candidates = [
        os.environ.get("COWFS_BENCH_FO2", ""),
        *(os.path.join(folder, "fuse-overlayfs") for folder in folders),
    ]
    for program in dict.fromkeys(candidates):
        if program and os.access(program, os.X_OK):
            told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=10)
            found = re.search(r"fuse-overlayfs: version (\d+)\.", told.stdout + told.stderr)
            if found and int(found.group(1)) == major:
                return program
    return None


def _fuse_overlayfs_absent(major: int, remedy: str) -> Callable[[], str]:
    return lambda: "" if fuse_overlayfs(major) else f"no fuse-overlayfs {major}.x ({remedy})"


def _kernel_overlay_absent() -> str:
    return (
        ""
        if "\toverlay" in Path("/proc/filesystems").read_text() or not run_quiet(["modprobe", "overlay"])
        else "this kernel has no overlayfs"
    )


def run_quiet(argv: Sequence[str]) -> int:
    try:
        return subprocess.run(argv, capture_output=True, check=False).returncode
    except FileNotFoundError:
        return 127


@functools.cache
def _cowfs_absent() -> str:
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    told = subprocess.run(
        [sys.executable, "-m", "cowfs", "--version"], capture_output=True, text=True, check=False, env=cowfs_env()
    )
    return "" if told.returncode == 0 else f"cowfs does not start: {(told.stderr.strip().splitlines() or ['?'])[-1]}"


def _fusepy_absent() -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import fuse"], capture_output=True, text=True, check=False, env=cowfs_env()
    )
    return _cowfs_absent() or (
        "" if done.returncode == 0 else f"fusepy: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    )


def cowfs_env() -> dict[str, str]:
    """The environment of a cowfs process: this tree first, where the suite lies in a source tree."""
    env = dict(os.environ)
    if (REPOSITORY / "cowfs").is_dir():
        env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])])
    return env


OVERLAY = "overlayfs"
FO1 = "fuse-overlayfs 1"
FO2 = "fuse-overlayfs 2"
UNIONFS = "unionfs-fuse"
COWFS = "cowfs"
PASSTHROUGH = "cowfs passthrough"
FUSEPY = "cowfs fusepy"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name=OVERLAY, command=_overlay(""), absent=_kernel_overlay_absent, kernel=True),
        Peer(
            name=OVERLAY + " metacopy",
            command=_overlay(",redirect_dir=on,metacopy=on"),
            absent=_kernel_overlay_absent,
            kernel=True,
        ),
        Peer(
            name=FO1,
            command=_fuse_overlayfs(lambda: fuse_overlayfs(1)),
            absent=_fuse_overlayfs_absent(1, "apt-get install fuse-overlayfs"),
        ),
        Peer(
            name=FO2,
            command=_fuse_overlayfs(lambda: fuse_overlayfs(2)),
            absent=_fuse_overlayfs_absent(2, "cargo install fuse-overlayfs"),
        ),
        Peer(name=UNIONFS, command=_unionfs, absent=needs("unionfs"), max_lowers=60),
        Peer(name=COWFS, command=_cowfs(), absent=_cowfs_absent),
        Peer(name=PASSTHROUGH, command=_cowfs("--io", "passthrough"), absent=_cowfs_absent),
        Peer(name=FUSEPY, command=_cowfs("--frontend", "fusepy"), absent=_fusepy_absent),
    )
}
ALL = (OVERLAY, FO1, FO2, UNIONFS, COWFS)
FUSE_OVERLAYFS = (FO1, FO2)


@contextlib.contextmanager
def mounted(lab: Lab, name: str, stack: Stack, *, patience: float = 20.0) -> Iterator[Mounted]:
    """The stack mounted by the peer called ``name``; unmounted, and its server collected, on leaving.

    Raises:
        SkipSubject: the peer cannot run here, or did not mount; the message says why.
    """
    peer = PEERS[name]
    reason = peer.absent()
    if not reason and len(stack.lowers) > peer.max_lowers:
        reason = f"takes at most {peer.max_lowers} layers"
    if not reason and stack.upper is None and not peer.readonly:
        reason = "has no read-only mount"
    if reason:
        raise SkipSubject(reason)
    at = lab.folder("mnt")
    if stack.upper and stack.work:
        stack.upper.mkdir(exist_ok=True)
        stack.work.mkdir(exist_ok=True)
    argv = peer.command(stack, at)
    if peer.kernel:
        run(argv, cwd=_base(stack))
        try:
            yield Mounted(at, None, stack)
        finally:
            unmount(at)
        return
    log = at.with_name(at.name + ".log")
    process = lab.child(argv, env=cowfs_env() | peer.env, log=log)
    try:
        _wait_until_it_answers(process, at, log, patience)
        yield Mounted(at, process, stack)
    finally:
        if is_mounted(at):
            unmount(at)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        end_process(process)


@contextlib.contextmanager
def mounted_fresh(
    lab: Lab, name: str, lowers: tuple[Path, ...], host: str = "ext4", size: int = 8 << 30
) -> Iterator[Mounted]:
    """A writable mount of ``lowers`` whose upper lies on a new, empty file system of the kind ``host``."""
    with (
        lab.fresh(host, size) as fresh,
        mounted(lab, name, Stack(lowers=lowers, upper=fresh / "upper", work=fresh / "work")) as mount,
    ):
        yield mount


def _wait_until_it_answers(process: subprocess.Popen[bytes], at: Path, log: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            told = log.read_text(errors="replace").strip().splitlines()
            raise SkipSubject(f"exit {process.returncode}: {' | '.join(told[-3:]) or 'no message'}")
        if is_mounted(at):
            with contextlib.suppress(OSError):
                os.stat(at)
                return
        time.sleep(0.002)
    raise SkipSubject(f"did not mount within {patience:g} s")


def available(lab: Lab, names: Sequence[str]) -> list[str]:
    """The names that can run here; the others are recorded as skipped, each with its reason."""
    have = []
    for name in lab.wanted(names):
        reason = PEERS[name].absent()
        if reason:
            lab.skip(name, reason)
        else:
            have.append(name)
    return have
