"""Running commands in snapshots from a program: `cowfs run` as a function.

Strategy: the command is started by a process of its own, ``python -m cowfs.store.run_process``, so the namespaces are not the caller's, threads
do not meet a fork, and nothing of what is asked for shows in ps. How it ended comes over a pipe of its own: an exit status is the
command's, whatever it is, and an error of cowfs is raised here as what it is. Another pipe, which nobody writes to, ends with the caller: then
the command ends, and its snapshot goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import partial

from cowfs._record import record
from cowfs._typed import IO, TYPE_CHECKING
from cowfs.errors import CowfsError, NotFound
from cowfs.model import Change, Usage
from cowfs.sandbox.process import error_of
from cowfs.store.names import RUN_KEY

if TYPE_CHECKING:
    from cowfs.mounting.client import MountHandle
    from cowfs.mounting.kernel import KernelMount
    from cowfs.sandbox.request import BindLike, Request
    from cowfs.store.context import Context
    from cowfs.store.mounts import Mounting
    from cowfs.store.naming import Naming
    from cowfs.store.snapshots import Snapshots

__all__ = ["Job", "RunResult", "Running"]

_GRACE = 10.0
"""Seconds that a command has to end by itself when its caller was interrupted."""


@record(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a command ended.

    Attributes:
        key: the snapshot that it ran in; gone unless it was kept.
        returncode: its exit status; 128 and the number of the signal that ended it; 124 when its time was over.
        timed_out: whether its time was over.
        stdout, stderr: what it wrote, empty unless captured; at a terminal all is in ``stdout``.
        usage: what the snapshot held when it had ended.
        changes: what it changed, in path order.
        cpu_seconds: processor time of it and of its children that were waited for.
        peak_memory: bytes that the largest of these had in memory at once.
        oom_killed: whether the kernel ended a process of it at the limit of memory.
    """

    key: str
    returncode: int
    timed_out: bool
    stdout: bytes
    stderr: bytes
    usage: Usage
    changes: tuple[Change, ...]
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    oom_killed: bool = False


class Running:
    """Commands in fresh snapshots, and mounts that end with a block."""

    def __init__(
        self,
        context: Context,
        naming: Naming,
        snapshots: Snapshots,
        mounting: Mounting,
    ) -> None:
        self.context = context
        self._naming = naming
        self._snapshots = snapshots
        self._mounting = mounting

    def _job(
        self,
        request: Request,
        parent: str,
        *,
        size: str | int | None,
        inodes: str | int | None,
        key: str | None,
        keep: bool,
        mount_type: str | None,
    ) -> Job:
        """A command that was checked and is not yet started."""
        made = key or f"{RUN_KEY}{secrets.token_hex(4)}"
        message = {
            "root": self.context.root, "fsync": self.context.driver.fsync, "parent": parent, "key": made, "size": size, "inodes": inodes,
            "keep": keep, "mount_type": mount_type, "request": request.to_json(),
        }  # fmt: skip
        return Job(made, message)

    def run(
        self,
        parent: str,
        argv: Sequence[str] = (),
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        memory: str | int | None = None,
        cpus: str | float | None = None,
        pids_limit: str | int | None = None,
        network: str = "none",
        binds: Sequence[BindLike] = (),
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        workdir: str | None = None,
        privileged: bool = False,
        tty: bool = False,
        timeout: float | None = None,
        input: bytes | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        capture: bool = True,
        key: str | None = None,
        keep: bool = False,
        mount_type: str | None = None,
    ) -> RunResult:
        """As :meth:`cowfs.Store.run`."""
        from cowfs.store.sandboxes import make_request

        request = make_request(
            self._naming.config(parent), parent, argv, network=network, binds=binds, env=env or {}, user=user, workdir=workdir,
            privileged=privileged, timeout=timeout, terminal=tty, memory=memory, cpus=cpus, pids_limit=pids_limit,
        )  # fmt: skip
        job = self._job(request, parent, size=size, inodes=inodes, key=key, keep=keep, mount_type=mount_type)
        return job.run(input, stdin, capture=capture)

    def run_async(
        self,
        parent: str,
        argv: Sequence[str] = (),
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        memory: str | int | None = None,
        cpus: str | float | None = None,
        pids_limit: str | int | None = None,
        network: str = "none",
        binds: Sequence[BindLike] = (),
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        workdir: str | None = None,
        privileged: bool = False,
        tty: bool = False,
        timeout: float | None = None,
        input: bytes | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        capture: bool = True,
        key: str | None = None,
        keep: bool = False,
        mount_type: str | None = None,
    ) -> Awaitable[RunResult]:
        """As :meth:`cowfs.Store.run_async`."""
        from cowfs.store.sandboxes import make_request

        request = make_request(
            self._naming.config(parent), parent, argv, network=network, binds=binds, env=env or {}, user=user, workdir=workdir,
            privileged=privileged, timeout=timeout, terminal=tty, memory=memory, cpus=cpus, pids_limit=pids_limit,
        )  # fmt: skip
        job = self._job(request, parent, size=size, inodes=inodes, key=key, keep=keep, mount_type=mount_type)
        return job.run_async(input, stdin, capture=capture)

    @contextmanager
    def temporary(
        self,
        parent: str | None = None,
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        target: str | os.PathLike[str] | None = None,
        mount_type: str | None = None,
        limit_engine: str | None = None,
        volatile: bool = False,
        allow_other: bool | None = None,
    ) -> Iterator[MountHandle | KernelMount]:
        """As :meth:`cowfs.Store.temporary`."""
        key = f"{RUN_KEY}{secrets.token_hex(4)}"
        self._snapshots.prepare(key, parent, size=size, inodes=inodes)
        made = tempfile.mkdtemp(prefix="cowfs-") if target is None else None
        try:
            with self._mounting.mount(
                key,
                made or os.fspath(target or ""),
                mount_type=mount_type,
                limit_engine=limit_engine,
                volatile=volatile,
                allow_other=allow_other,
                owner=0 if mount_type == "kernel" or limit_engine not in (None, "fuse") else os.getpid(),
            ) as handle:
                yield handle
        finally:
            with suppress(NotFound):
                self._snapshots.remove(key)
            if made is not None:
                os.rmdir(made)

    def temporary_async(
        self,
        parent: str | None = None,
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        target: str | os.PathLike[str] | None = None,
        mount_type: str | None = None,
        limit_engine: str | None = None,
        volatile: bool = False,
        allow_other: bool | None = None,
    ) -> AbstractAsyncContextManager[MountHandle | KernelMount]:
        """As :meth:`cowfs.Store.temporary_async`."""
        assert self.context.driver  # a closed store refuses now rather than later
        return _temporary_in_threads(
            self.temporary(
                parent, size=size, inodes=inodes, target=target, mount_type=mount_type, limit_engine=limit_engine,
                volatile=volatile, allow_other=allow_other,
            )
        )  # fmt: skip


@asynccontextmanager
async def _temporary_in_threads(
    made: AbstractContextManager[MountHandle | KernelMount],
) -> AsyncIterator[MountHandle | KernelMount]:
    """A context manager, entered and left in threads. A task that is cancelled meanwhile leaves it first."""
    entering = asyncio.ensure_future(asyncio.to_thread(made.__enter__))
    try:
        handle = await asyncio.shield(entering)
    except asyncio.CancelledError:
        with suppress(CowfsError, OSError):
            await entering
            await asyncio.to_thread(made.__exit__, None, None, None)
        raise
    try:
        yield handle
    finally:
        leaving = asyncio.ensure_future(asyncio.to_thread(made.__exit__, None, None, None))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            await leaving
            raise


async def _in_thread(job: Job, function: partial[RunResult]) -> RunResult:
    """Run a job in a thread of its own, not of the loop's few, and end it when this task is cancelled."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[RunResult] = loop.create_future()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  told to who waits
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    threading.Thread(target=work, name="cowfs-run", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        job.cancel()
        with suppress(Exception):
            await done
        raise


class Job:
    """A command that is run once. :meth:`cancel` may be called from any thread."""

    def __init__(self, key: str, message: Mapping[str, object]) -> None:
        self._key = key
        self._message = message
        self._lock = threading.Lock()
        self._life = -1  # guarded by _lock: the writing end of the pipe that ends with us; -1: none, -2: cancelled

    def cancel(self) -> None:
        """End the command; :meth:`run` then ends, too."""
        with self._lock:
            if self._life >= 0:
                os.close(self._life)
            self._life = -2

    def run(self, input: bytes | None, stdin: int | IO[bytes] | None, *, capture: bool) -> RunResult:
        """Run it, and wait."""
        told = os.memfd_create("cowfs-run")  # of any length, unlike what a pipe takes before it is read
        lives, life = os.pipe()
        asked, asks = os.pipe()
        with self._lock:
            cancelled, self._life = self._life == -2, life
        if cancelled:
            self.cancel()
        pipe = subprocess.PIPE if capture else None
        try:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "cowfs.store.run_process", str(asked), str(told), str(lives)],
                    stdin=subprocess.PIPE if input is not None else stdin,
                    stdout=pipe,
                    stderr=pipe,
                    pass_fds=[asked, told, lives],
                )
            finally:
                for fd in (asked, lives):
                    os.close(fd)
            with process, suppress(BrokenPipeError), open(asks, "wb") as requests:
                requests.write(json.dumps(self._message).encode())
                requests.close()
                out, said = self._communicate(process, input)
            os.lseek(told, 0, os.SEEK_SET)
            with open(told, "rb", closefd=False) as file:
                how = file.read()
        finally:
            self.cancel()
            os.close(told)
        return self._result(how, process.returncode, out or b"", said or b"")

    def run_async(self, input: bytes | None, stdin: int | IO[bytes] | None, *, capture: bool) -> Awaitable[RunResult]:
        """Run it in a thread of its own; the task that waits may be cancelled."""
        return _in_thread(self, partial(self.run, input, stdin, capture=capture))

    def _communicate(self, process: subprocess.Popen[bytes], input: bytes | None) -> tuple[bytes | None, bytes | None]:
        """As :meth:`subprocess.Popen.communicate`; the command ends with whoever breaks it off."""
        try:
            return process.communicate(input)
        except BaseException:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self.cancel()
                process.wait()
            raise

    def _result(self, how: bytes, code: int, out: bytes, said: bytes) -> RunResult:
        told = json.loads(how) if how else {}
        if "error" in told:  # a snapshot that it had made is gone again
            raise error_of(told)
        if "status" not in told:
            last = said.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("cowfs: ")
            raise CowfsError(
                last or f"the sandbox's process ended with status {code}",
                remedy=f"its snapshot may be there: {self._key}",
            )
        return RunResult(
            key=self._key,
            returncode=told["status"],
            timed_out=told["timed_out"],
            stdout=out,
            stderr=said,
            usage=Usage(**told["usage"]),
            changes=tuple(
                Change(path=os.fsencode(path), kind=kind, type=type, size=size, what=frozenset(what))
                for path, kind, type, size, what in told["changes"]
            ),
            cpu_seconds=told["cpu_seconds"],
            peak_memory=told["peak_memory"],
            oom_killed=told["oom_killed"],
        )
