"""Running commands in snapshots from a program: `cowfs run` as a function.

Strategy: the command is started by a process of its own, ``python -m cowfs run``, so the namespaces are not the
caller's, threads do not meet a fork, and a killed caller takes nothing along. The outcome comes over a separate pipe:
an exit status is always the command's, and an error of cowfs is raised here in its own class.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from cowfs.errors import (
    AlreadyExists,
    Corrupt,
    CowfsError,
    FailedPrecondition,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Unsupported,
)
from cowfs.model import Change, Usage
from cowfs.store.names import RUN_KEY

if TYPE_CHECKING:
    from cowfs.mounting.client import MountHandle
    from cowfs.mounting.kernel import KernelMount
    from cowfs.store.context import Context
    from cowfs.store.mounts import Mounting
    from cowfs.store.queries import Queries
    from cowfs.store.reading import Reading
    from cowfs.store.snapshots import Snapshots

__all__ = ["RunResult", "Running"]

TIMED_OUT = 124

_GRACE = 10.0
"""Seconds that a command has to end by itself when its caller was interrupted."""

_KINDS: dict[str, type[CowfsError]] = {
    kind.__name__: kind
    for kind in (AlreadyExists, Corrupt, FailedPrecondition, InvalidArgument, LimitExceeded, NotFound, Unsupported)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The outcome of a command.

    Attributes:
        key: the snapshot that it ran in; gone unless it was kept.
        returncode: its exit status; 128 and the number of the signal that ended it; 124 when its time was over.
        timed_out: whether its time was over.
        stdout, stderr: its output, empty unless captured.
        usage: the snapshot's use at its end.
        changes: its changes, in path order.
    """

    key: str
    returncode: int
    timed_out: bool
    stdout: bytes
    stderr: bytes
    usage: Usage
    changes: tuple[Change, ...]


class Running:
    """Commands in fresh snapshots, and mounts that end with a block."""

    def __init__(
        self, context: Context, reading: Reading, queries: Queries, snapshots: Snapshots, mounting: Mounting
    ) -> None:
        self.context = context
        self._reading = reading
        self._queries = queries
        self._snapshots = snapshots
        self._mounting = mounting

    def run(
        self,
        parent: str,
        argv: Sequence[str] = (),
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        network: str = "host",
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        privileged: bool = False,
        timeout: float | None = None,
        input: bytes | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        capture: bool = True,
        key: str | None = None,
        keep: bool = False,
    ) -> RunResult:
        """As :meth:`cowfs.Store.run`."""
        made = key or f"{RUN_KEY}{secrets.token_hex(4)}"
        reading, writing = os.pipe()
        pipe = subprocess.PIPE if capture else None
        began = time.monotonic()
        try:
            try:
                words = self._words(
                    parent, argv, made, size, inodes, network, env or {}, workdir, privileged, timeout, writing
                )
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE if input is not None else stdin,
                    stdout=pipe,
                    stderr=pipe,
                    pass_fds=[writing],
                    env={**os.environ, "COWFS_FSYNC": "1" if self.context.driver.fsync else "0"},
                )
            finally:
                os.close(writing)
            with process:
                out, said = _communicate(process, input)
            with open(reading, "rb", closefd=False) as told:
                how = told.read()
        finally:
            os.close(reading)
        late = timeout is not None and time.monotonic() - began >= timeout
        return self._result(made, how, process.returncode, out or b"", said or b"", late=late, keep=keep)

    def _words(
        self,
        parent: str,
        argv: Sequence[str],
        key: str,
        size: str | int | None,
        inodes: str | int | None,
        network: str,
        env: Mapping[str, str],
        workdir: str | None,
        privileged: bool,
        timeout: float | None,
        status: int,
    ) -> list[str]:
        self._reading.resolve(parent)
        words = [
            sys.executable,
            "-P",
            "-m",
            "cowfs",
            "run",
            f"--root={self.context.root}",
            f"--key={key}",
            "--quiet",
            f"--status-fd={status}",
        ]
        given = {"size": size, "inodes": inodes, "network": network, "workdir": workdir, "timeout": timeout}
        words += [f"--{name}={value}" for name, value in given.items() if value is not None]
        words += [f"--env={name}={value}" for name, value in env.items()]
        return [*words, *(["--privileged"] if privileged else []), parent, "--", *argv]

    def _result(self, key: str, how: bytes, code: int, out: bytes, said: bytes, *, late: bool, keep: bool) -> RunResult:
        told = json.loads(how) if how else {}
        if "error" in told:  # its snapshot is removed again
            raise _KINDS.get(told["error"], CowfsError)(told["message"], remedy=told["remedy"])
        if "status" not in told:
            last = said.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("cowfs: ")
            raise CowfsError(last or f"cowfs run ended with status {code}", remedy=f"its snapshot may be there: {key}")
        try:
            return RunResult(
                key=key,
                returncode=told["status"],
                timed_out=late and told["status"] == TIMED_OUT,
                stdout=out,
                stderr=said,
                usage=self._queries.usage(key),
                changes=tuple(self._queries.diff(key)),
            )
        finally:
            if not keep:
                self._snapshots.remove(key)

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
            ) as handle:
                yield handle
        finally:
            with suppress(NotFound):
                self._snapshots.remove(key)
            if made is not None:
                os.rmdir(made)


def _communicate(process: subprocess.Popen[bytes], input: bytes | None) -> tuple[bytes | None, bytes | None]:
    """As :meth:`subprocess.Popen.communicate`; an interruption ends the command."""
    try:
        return process.communicate(input)
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
