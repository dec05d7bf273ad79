"""The place of measuring: the private mount namespace, the work folder, fresh file systems, the interleaving clock.

Ownership: a `Lab` owns every mount, loop device and process made through it and gives all of them back in
``close()``; each is registered before it is made, so an exception half-way leaves nothing. Killed benchmarks leave
nothing either: children carry PDEATHSIG, and mounts and loop devices go with the namespace's last process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cowfs.errors import CowfsError

from .claim import Claim, Result
from .profiles import Profile

SEED = 20261124
CLONE_NEWNS = 0x00020000


class SkipSubject(Exception):
    """A subject cannot be measured here; the message is the reason that the report prints."""


class SkipClaim(Exception):
    """A whole claim cannot be measured here; the message is the reason."""


def enter_private_namespace() -> None:
    """Moves this process to a mount namespace of its own, whose mounts nobody else sees. Root only.

    Raises:
        SkipClaim: without the privilege; the caller prints the remedy.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise SkipClaim(f"a private mount namespace needs root: {os.strerror(ctypes.get_errno())} (run with sudo)")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def run(argv: Sequence[str | os.PathLike[str]], *, cwd: Path | None = None, stdin: Path | None = None) -> float:
    """Runs a program with its output thrown away; returns its wall time in seconds.

    Raises:
        RuntimeError: it failed; the message has its last lines.
    """
    with open(stdin or os.devnull, "rb") as given, tempfile.TemporaryFile() as told:
        begin = time.perf_counter()
        done = subprocess.run(argv, cwd=cwd, stdin=given, stdout=subprocess.DEVNULL, stderr=told, check=False)
        took = time.perf_counter() - begin
        if done.returncode:
            told.seek(0)
            tail = told.read().decode(errors="replace").strip().splitlines()[-4:]
            raise RuntimeError(f"{' '.join(map(str, argv))}: exit {done.returncode}: {' | '.join(tail)}")
    return took


def timed(call: Callable[[], object]) -> float:
    """Wall time of one call, with Python's collector out of the way."""
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    finally:
        gc.enable()


def drop_caches(what: int = 3) -> None:
    """Empties the kernel's caches: 1 pages, 2 dentries and inodes, 3 both. Dirty pages are written first."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text(f"{what}\n")


def cache_drops() -> int:
    """The number of times that the kernel's caches were dropped on this host since its boot, by any process."""
    rows = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(rows.get("drop_pagecache", 0)) + int(rows.get("drop_slab", 0))


def rss(pid: int) -> int:
    """Resident bytes of a process, as VmRSS counts them."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def io_counters(pid: int) -> tuple[int, int]:
    """(rchar, wchar): bytes that a process handed to read and write calls."""
    rows = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(rows["rchar"]), int(rows["wchar"])


def device_written(path: Path) -> int:
    """Bytes written so far to the block device that holds ``path`` (``/sys/dev/block/M:N/stat``, 512-byte units)."""
    device = os.stat(path).st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(stat[6]) * 512


def used(disk: Path) -> int:
    """Bytes in use on the file system mounted at ``disk``, after a sync: shared (reflinked) blocks count once.

    Read until it stands still (at most 5 s), for some hosts free space in the background.
    """
    os.sync()
    last = -1
    for _ in range(25):
        st = os.statvfs(disk)
        now = (st.f_blocks - st.f_bfree) * st.f_frsize
        if now == last:
            break
        last = now
        time.sleep(0.2)
    return last


def allocated(root: Path) -> int:
    """Bytes of storage under a directory, each inode once (st_blocks); mounts below it are not entered."""
    seen: set[tuple[int, int]] = set()
    total = 0
    device = os.lstat(root).st_dev
    for base, dirs, files in os.walk(root):
        for name in [*dirs, *files]:
            try:
                st = os.lstat(os.path.join(base, name))
            except FileNotFoundError:
                continue
            if st.st_dev == device and (st.st_dev, st.st_ino) not in seen:
                seen.add((st.st_dev, st.st_ino))
                total += st.st_blocks * 512
        dirs[:] = [d for d in dirs if os.lstat(os.path.join(base, d)).st_dev == device]
    return total


class Lab:
    """One measuring session over one work folder; `measure` runs a claim in it."""

    def __init__(self, profile: Profile, work: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.profile = profile
        self.work = work
        self.say = say
        work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise SkipClaim(f"{work} is in use by another benchmark (give another --work)") from None
        self.inputs = work / "inputs"
        self.inputs.mkdir(exist_ok=True)
        self.area = work / "area"
        shutil.rmtree(self.area, ignore_errors=True)
        self.area.mkdir()
        self._stack = contextlib.ExitStack()
        self._count = 0
        self.only: set[str] | None = None
        self.result = Result("")
        self._until = float("inf")
        self._claim: Claim | None = None

    # -- running a claim ------------------------------------------------------------------------------------------

    def restrict(self, subjects: Sequence[str] | None) -> None:
        """Measure these subjects only; None or none: all."""
        self.only = set(subjects) if subjects else None

    def measure(self, claim: Claim) -> Result:
        """Runs one claim; a failure of the whole claim becomes a note, never a crash of the run."""
        self.result = Result(claim.name)
        self._claim = claim
        begin = time.monotonic()
        self._until = begin + self.profile.claim_seconds
        self.note(f"load average {os.getloadavg()[0]:.1f} when it began")
        stack, self._stack = self._stack, contextlib.ExitStack()
        try:
            with self._stack:
                claim.measure(self)
        except SkipClaim as why:
            for subject in claim.subjects:
                self.result.skipped.setdefault(subject, str(why))
        except (CowfsError, OSError, RuntimeError, subprocess.SubprocessError) as why:
            self.result.notes.append(f"stopped: {type(why).__name__}: {why}")
            self.say(f"  {claim.name} stopped: {why}")
        finally:
            self._stack = stack
            shutil.rmtree(self.area, ignore_errors=True)
            self.area.mkdir(exist_ok=True)
        self.result.seconds = time.monotonic() - begin
        return self.result

    def record(self, metric: str, subject: str, value: float, x: float | None = None) -> None:
        self.result.add(metric, subject, value, x)
        self.say(f"    {metric} {subject}{'' if x is None else f' @{x:g}'}: {value:.6g}")

    def note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)

    def skip(self, subject: str, reason: str) -> None:
        self.result.skipped.setdefault(subject, reason)
        self.say(f"    {subject} skipped: {reason}")

    @contextlib.contextmanager
    def trying(self, subject: str) -> Iterator[None]:
        """A failure inside becomes that subject's reason, and the others go on."""
        try:
            yield
        except (SkipSubject, CowfsError, OSError, RuntimeError, subprocess.SubprocessError) as why:
            self.skip(subject, f"{type(why).__name__}: {why}" if not isinstance(why, SkipSubject) else str(why))

    def rounds(self, subjects: Sequence[str], count: int | None = None) -> Iterator[tuple[int, str]]:
        """(round, subject) interleaved: A B C, A B C. Skipped subjects drop out; the clock ends it after a round."""
        for number in range(self.profile.rounds if count is None else count):
            if number and time.monotonic() > self._until:
                self.note(f"{number} rounds: the profile's time for a claim was over")
                return
            for subject in subjects:
                if subject not in self.result.skipped:
                    yield number, subject

    @property
    def late(self) -> bool:
        return time.monotonic() > self._until

    def wanted(self, subjects: Sequence[str]) -> list[str]:
        """The subjects that the user chose (all, unless ``only`` is set)."""
        return [s for s in subjects if self.only is None or s in self.only]

    def rng(self, salt: str = "") -> random.Random:
        """A generator with a fixed seed, the same for each subject that asks with the same salt."""
        name = self._claim.name if self._claim else ""
        return random.Random(f"{SEED}/{name}/{salt}")

    # -- places ---------------------------------------------------------------------------------------------------

    def folder(self, name: str = "") -> Path:
        """A new empty folder on the work folder's file system; removed after the claim."""
        self._count += 1
        path = self.area / f"{self._count:04}{'-' if name else ''}{name}"
        path.mkdir()
        return path

    @contextlib.contextmanager
    def fresh(self, kind: str, size: int = 8 << 30, *, direct: bool = False) -> Iterator[Path]:
        """A new, empty file system: "tmpfs", or "ext4"/"xfs"/"btrfs" made by mkfs on a sparse image and a loop device.

        Args:
            direct: the loop device passes requests on as they come, many at once, as a disk does. Otherwise it works on
                the image through the page cache, one request after the other.

        Raises:
            SkipSubject: this host has no mkfs for it.
        """
        where = self.folder(kind)
        if kind == "tmpfs":
            run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where])
            image = None
        else:
            maker = {
                "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard"],
                "xfs": ["mkfs.xfs", "-q", "-f"],
                "btrfs": ["mkfs.btrfs", "-q", "-f"],
            }[kind]
            if not shutil.which(maker[0]):
                raise SkipSubject(f"{maker[0]} is not installed")
            image = where.with_name(where.name + ".img")
            with open(image, "wb") as file:
                file.truncate(size)
            run([*maker, image])
            options = "loop,noatime" + (",allocsize=64k" if kind == "xfs" else "")
            device: Path | str = image
            if direct:
                made: list[str | Path] = ["losetup", "--find", "--show", "--direct-io=on", image]
                device = subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()
                options = options.removeprefix("loop,")
            # xfs allocates ahead of a growing file and gives the room back later, which would blur the figures
            try:
                run(["mount", "-o", options, device, where])
            finally:
                if direct:  # it goes when it is unmounted
                    run(["losetup", "--detach", device])
        try:
            yield where
        finally:
            unmount(where)
            if image is not None:
                image.unlink()
            where.rmdir()

    def child(
        self, argv: Sequence[str | os.PathLike[str]], *, env: dict[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a server that dies with us; it is ended at the latest when the claim ends."""
        with open(log or os.devnull, "wb") as told:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=told,
                env=env,
            )
        self._stack.callback(end_process, process)
        return process

    def hold(self, context: contextlib.AbstractContextManager[Path]) -> Path:
        """Enters a context that lasts until the claim ends."""
        return self._stack.enter_context(context)

    def on_end(self, call: Callable[[], object]) -> None:
        self._stack.callback(call)

    def close(self) -> None:
        self._stack.close()
        shutil.rmtree(self.area, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def end_process(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """SIGTERM, then SIGKILL, then the exit status is collected; a process that ended already is fine."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            process.wait(0 if process.poll() is not None else 0.01)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                return
    process.wait()


def is_mounted(path: Path) -> bool:
    """Whether ``path`` is a mount point, told from mountinfo: a dead FUSE server cannot make this fail."""
    wanted = os.fspath(path)
    text = Path("/proc/self/mountinfo").read_text()
    return any(line.split()[4] == wanted for line in text.splitlines())


def unmount(path: Path) -> None:
    """Unmounts, after a short wait for users of the mount, lazily in the end: it is gone afterwards."""
    for _ in range(40):
        done = subprocess.run(["umount", "--", path], capture_output=True, text=True, check=False)
        if done.returncode == 0 or not is_mounted(path):
            return
        time.sleep(0.05)
    subprocess.run(["umount", "-l", "--", path], capture_output=True, check=False)
