"""Verbs of commands in snapshots, and of mounts that end with a block."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager

from cowfs._typed import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.mounting.client import MountHandle
    from cowfs.mounting.kernel import KernelMount
    from cowfs.sandbox.request import BindLike
    from cowfs.store.running import RunResult
    from cowfs.store.services import Services

__all__ = ["RunVerbs"]

_DEVNULL = -3  # subprocess.DEVNULL, without the import, which costs a verb of the command 2 ms


class RunVerbs:
    """Commands in fresh snapshots, mounts that end with a block, and both for asyncio."""

    services: Services

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
        stdin: int | IO[bytes] | None = _DEVNULL,
        capture: bool = True,
        key: str | None = None,
        keep: bool = False,
        mount_type: str | None = None,
    ) -> RunResult:
        """Run a command in a fresh snapshot, in a sandbox, and wait for its end.

        Isolated are files, processes, signals, the terminal, the network, privilege, devices, System V IPC, the host's name, and, with
        ``size`` and ``inodes``, disk space; with ``memory``, ``cpus`` and ``pids_limit`` these, by control groups. Not isolated are the kernel itself, and what
        ``binds``, ``network="host"`` and the standard streams hand in: docs/security.md. When the caller ends, however it ends,
        the command and all that it started end, too.

        Threads: any; it blocks. In asyncio: :meth:`run_async`.

        Args:
            parent: a committed snapshot, or a tag.
            argv: the command; default: the image's, else a shell.
            size, inodes: the limit of the snapshot, as for :meth:`prepare`.
            memory: the most that the command and all that it starts may have in memory and swap, bytes or ``"512M"``; 6M or more.
            cpus: processors that they may use at once: 1.5.
            pids_limit: processes and threads that they may be at once.
            network: ``none``: only a loopback interface of its own; ``host``: the host's.
            binds: files and directories of the host that it sees: ``"SOURCE:TARGET"``, ``"SOURCE:TARGET:ro"``, or tuples of these.
            env: variables beside those of the image.
            user: ``USER[:GROUP]``, names in the snapshot or numbers; default: the image's, else root. An ordinary user has the ids of
                /etc/subuid in there, where newuidmap is; else one id: whoever it is, files are this user's.
            workdir: where it starts; default: the image's, else ``/``.
            privileged: keep all privilege, devices and /proc, and every system call.
            tty: give it a terminal of its own; what it writes there is in ``stdout``.
            timeout: seconds, after which it and all that it started are ended.
            input: its standard input; else ``stdin``, as for :class:`subprocess.Popen`.
            capture: keep what it writes; else it goes to the caller's standard output and error.
            key: the snapshot's key; default: one that is made up.
            keep: leave the snapshot there, for :meth:`commit` or :meth:`diff`.
            mount_type: ``fuse`` or ``kernel``; default: as an ordinary user without a limit the kernel's, where it can; else ``fuse``.

        Raises:
            NotFound: no such snapshot, or no such source of a bind.
            InvalidArgument: a bad limit, network, timeout, variable, bind or user.
            AlreadyExists: the key is taken.
            Unsupported: this host or user can make no namespaces or mounts, or no control group where one is needed.
        """
        return self.services.running.run(
            parent, argv, size=size, inodes=inodes, memory=memory, cpus=cpus, pids_limit=pids_limit, network=network, binds=binds, env=env, user=user, workdir=workdir,
            privileged=privileged, tty=tty, timeout=timeout, input=input, stdin=stdin, capture=capture, key=key, keep=keep,
            mount_type=mount_type,
        )  # fmt: skip

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
        stdin: int | IO[bytes] | None = _DEVNULL,
        capture: bool = True,
        key: str | None = None,
        keep: bool = False,
        mount_type: str | None = None,
    ) -> Awaitable[RunResult]:
        """:meth:`run` for asyncio: ``await store.run_async(...)``. It waits in a thread of its own, one for each command.

        When the task that waits is cancelled, the command and all that it started end, and the snapshot goes, before the
        cancellation goes on.

        Args:
            parent, argv, size, inodes, memory, cpus, pids_limit, network, binds, env, user, workdir, privileged, tty, timeout, input, stdin, capture, key, keep,
                mount_type: as for :meth:`run`.

        Raises:
            NotFound, InvalidArgument, AlreadyExists, Unsupported: as :meth:`run`.
        """
        return self.services.running.run_async(
            parent, argv, size=size, inodes=inodes, memory=memory, cpus=cpus, pids_limit=pids_limit, network=network, binds=binds, env=env, user=user, workdir=workdir,
            privileged=privileged, tty=tty, timeout=timeout, input=input, stdin=stdin, capture=capture, key=key, keep=keep,
            mount_type=mount_type,
        )  # fmt: skip

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
    ) -> AbstractContextManager[MountHandle | KernelMount]:
        """A fresh snapshot, mounted for the block and removed with all that was written at its end.

        When this process is killed in the block, a mount by cowfs's own server ends with it; the snapshot is left for
        :meth:`prune`.

        Args:
            parent: a committed snapshot, or a tag; None: an empty tree.
            size, inodes: its limit, as for :meth:`prepare`.
            target: where; default: a directory of its own.
            mount_type, limit_engine, volatile, allow_other: as for :meth:`mount`.

        Yields:
            The mount: ``mountpoint`` is where its files are.

        Raises:
            NotFound, InvalidArgument, Unsupported: as :meth:`prepare` and :meth:`mount`.
            FailedPrecondition: at the end, when something still uses the mount.
        """
        return self.services.running.temporary(
            parent, size=size, inodes=inodes, target=target, mount_type=mount_type, limit_engine=limit_engine,
            volatile=volatile, allow_other=allow_other,
        )  # fmt: skip

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
        """:meth:`temporary` for asyncio: ``async with store.temporary_async(...) as mount``. Mounting and removing are done in threads.

        Args:
            parent, size, inodes, target, mount_type, limit_engine, volatile, allow_other: as for :meth:`temporary`.

        Yields:
            The mount.

        Raises:
            NotFound, InvalidArgument, Unsupported, FailedPrecondition: as :meth:`temporary`.
        """
        return self.services.running.temporary_async(
            parent, size=size, inodes=inodes, target=target, mount_type=mount_type, limit_engine=limit_engine,
            volatile=volatile, allow_other=allow_other,
        )  # fmt: skip
