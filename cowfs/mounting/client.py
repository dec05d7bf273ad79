"""The library's side of mounts: making, finding, asking and unmounting them.

>>> import cowfs
>>> with cowfs.mount(["layers/base", "layers/python"], "/mnt/rootfs", size="2G") as m:  # doctest: +SKIP
...     open("/mnt/rootfs/hello", "w").write("hi")
...     [change.path for change in m.diff()]
[b'hello']

Strategy: a :class:`MountHandle` holds no more than a mount point and a socket's path; the mount lives in a process of its
own (:mod:`cowfs.mounting.server`) and outlives its maker unless unmounted. Every method asks that process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import EllipsisType, TracebackType

from cowfs._log import Part
from cowfs._record import record, replace
from cowfs._typed import TYPE_CHECKING, Any, Self
from cowfs.errors import FailedPrecondition, NotFound
from cowfs.model import SMALLEST_LIMIT, Limit, Statistics, Usage, parse_count, parse_size
from cowfs.mounting import mountpoint, protocol
from cowfs.mounting.answers import statistics_of
from cowfs.mounting.request import IdMap, MountSpec
from cowfs.mounting.spec import PathLike, block_size, make_spec

if TYPE_CHECKING:
    from cowfs.model import Change
    from cowfs.mounting.kernel import KernelMount
    from cowfs.sys.mounts import MountInfo

__all__ = ["MountHandle", "MountStatus", "attach", "make_spec", "mount", "mounts", "umount"]

_log = Part("cowfs.mounting")


_ELSEWHERE = "cowfs mounts lists what is here, with --everywhere also what is in other mount namespaces"
_NOTHING, _NO_LIMIT = Usage(), Limit()
COUNTING = 3600.0  # seconds for the count of a big upper layer


@record(frozen=True, slots=True, kw_only=True)
class MountStatus:
    """One mount of cowfs, as it is now.

    Attributes:
        mountpoint: its path.
        alive: whether its server exists; for a dead one only ``mountpoint`` (and perhaps ``socket``) is known.
        answers: whether the server answered in time; for one that did not, the same holds.
        layers: bottom first.
        upper: the writable directory, or None.
        readonly: whether every change is EROFS.
        usage, limit: bytes and inodes; ``usage`` is None while a big upper layer without a limit is being counted.
        pid: the server, as this process's pid namespace numbers it; None where it has no number here.
        here: whether it is a mount of this process's mount namespace.
        started: nanoseconds since 1970.
        socket: the path of its control socket, "" without one.
        label: a snapshot's key, "" for a mount without a store.
        details: the rest of the server's answer.
    """

    mountpoint: str
    alive: bool
    answers: bool = True
    layers: tuple[str, ...] = ()
    upper: str | None = None
    readonly: bool = False
    usage: Usage | None = _NOTHING
    limit: Limit = _NO_LIMIT
    pid: int | None = None
    here: bool = True
    started: int = 0
    socket: str = ""
    label: str = ""
    details: Mapping[str, Any]


class MountHandle:
    """A live mount. As a context manager it unmounts at the end of the block.

    Attributes:
        mountpoint: absolute path.
        pid: the server process.
        socket: its control socket.
    """

    def __init__(self, mountpoint: str, pid: int, socket: str) -> None:
        self.mountpoint = mountpoint
        self.pid = pid
        self.socket = socket

    def __repr__(self) -> str:
        return f"<cowfs mount {self.mountpoint!r}, server {self.pid}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.unmount()
        except NotFound:
            pass  # another process was faster

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One verb of the server's table (with the arguments of its record in :mod:`cowfs.mounting.verbs`).

        Raises:
            CowfsError: as the server raised it; FailedPrecondition when it is gone.
        """
        return protocol.ask(self.socket, verb, **arguments)

    def status(self) -> MountStatus:
        """The status of the mount, as in `cowfs mounts`. Raises CowfsError: FailedPrecondition when its server is gone."""
        return _status(self.mountpoint, self.socket, self.ask("info"))

    def usage(self) -> Usage:
        """The use of the upper layer: bytes in units of 4 KiB, and inodes.

        Without a limit the server walks the layer first, which may take long.

        Raises:
            FailedPrecondition: the server is gone.
        """
        return Usage(**self.ask("usage", timeout=COUNTING)["usage"])

    def limit(
        self, *, size: str | int | EllipsisType | None = ..., inodes: str | int | EllipsisType | None = ...
    ) -> Limit:
        """The limit; with arguments, change it first.

        Args:
            size: bytes, or "4G"; None for no limit; left out: as it was.
            inodes: a count, or "100k"; likewise.

        Raises:
            FailedPrecondition: a read-only mount, or one with ``io="passthrough"``.
        """
        wanted: dict[str, int | None] = {}
        if not isinstance(size, EllipsisType):
            wanted["bytes"] = None if size is None else parse_size(size, least=SMALLEST_LIMIT)
        if not isinstance(inodes, EllipsisType):
            wanted["inodes"] = None if inodes is None else parse_count(inodes)
        answer = self.ask("limit", **wanted) if wanted else self.ask("info")
        return Limit(**answer["limit"])

    def counters(self) -> dict[str, int]:
        """Requests that the kernel made so far, by opcode name. Raises CowfsError: FailedPrecondition when the server is gone."""
        return dict(self.ask("counters")["counters"])

    def statistics(self, *, timed: bool = False) -> Statistics:
        """All figures of the server.

        Args:
            timed: from now on, and for half a minute, it also takes the time of requests, which makes them a little slower.

        Raises:
            CowfsError: the server is of an older cowfs, which counts less.
        """
        return statistics_of(self.ask("statistics", timed=timed))

    def watch(self, *, interval: float = 1.0, timed: bool = False) -> Iterator[Statistics]:
        """:meth:`statistics` again and again, until the mount ends or the iterator is closed; the server sends each by itself.

        Args:
            interval: seconds from one to the next, at most 60.
            timed: as for :meth:`statistics`.

        Raises:
            CowfsError: the server is of an older cowfs, which counts less.
            FailedPrecondition: the server ended.
        """
        wait = protocol.TIMEOUT + interval
        news = protocol.stream(self.socket, "statistics", timeout=wait, interval=interval, timed=timed)
        return map(statistics_of, news)

    def diff(self) -> Iterator[Change]:
        """Changes that the upper layer makes: added, changed and deleted paths, sorted.

        Raises:
            FailedPrecondition: a mount without an upper layer.
        """
        from cowfs.diff import changes

        details = self.status().details
        if not details["upper"]:
            raise FailedPrecondition(f"{self.mountpoint} has no upper layer", remedy="it was mounted read-only")
        mountpoint.hand_over(self.mountpoint)
        return changes.changes(details["upper"], details["layers"], options=changes.view_options(details))

    def unmount(self, *, lazy: bool = False, force: bool = False) -> None:
        """Unmount, and wait until the server has closed everything.

        Args:
            lazy: take it off the tree now; the server ends with the last user.
            force: do not ask a server that may hang.

        Raises:
            FailedPrecondition: in use; the message names who.
            NotFound: not mounted any more.
        """
        umount(self.mountpoint, lazy=lazy, force=force, socket=self.socket)


# ---------------------------------------------------------------------------------------------------------------
# Making one


def mount(
    layers: PathLike | Sequence[PathLike],
    mountpoint: PathLike,
    *,
    upper: PathLike | None = None,
    work: PathLike | None = None,
    readonly: bool = False,
    ephemeral: bool = False,
    memory: bool = False,
    size: str | int | None = None,
    inodes: str | int | None = None,
    volatile: bool = False,
    allow_other: bool | None = None,
    io: str = "cached",
    frontend: str = "kernel",
    uid_map: IdMap = (),
    gid_map: IdMap = (),
    options: Iterable[str] = (),
    max_nodes: int | None = None,
    row: str | int | None = None,
    log: PathLike | None = None,
    trace: bool = False,
) -> MountHandle | KernelMount:
    """Mount a stack of layers as one tree; returns when it answers.

    Args:
        layers: directories, bottom first; or one path: a directory whose sub-directories are the layers.
        mountpoint: an existing directory.
        upper: the directory for changes (made if missing); default: kept in ``.cowfs`` beside the layers, used again next time.
        work: same file system as ``upper``; default: beside it.
        readonly: no changes; an ``upper`` given is the topmost layer.
        ephemeral: changes are dropped at unmount.
        memory: keep the changes of an ephemeral mount in memory: as root by the kernel's overlayfs over a tmpfs of the
            limit's size.
        size, inodes: the limit: bytes or "2G"; a count or "100k".
        volatile: sync nothing; after a crash of the host the upper cannot be used.
        allow_other: whether other users may enter; default: as root yes.
        io: "cached" (no requests when warm) or "passthrough" (root only, no limit: for databases).
        frontend: "kernel" (cowfs's own protocol engine) or "fusepy" (libfuse 2).
        uid_map, gid_map: ranges (id in the layers, id shown, count).
        options: mount(8) words: nodev, nosuid, noexec, ro, noatime...
        max_nodes: bound on cached nodes in the server.
        row: bytes a block, a power of two from 4 KiB to 1 MiB: redirect on write instead of copying up (docs/row.md).
        log: file for the server's diagnostics.
        trace: write one line a request to the log.

    Raises:
        NotFound, InvalidArgument: layers, upper or mount point are missing or unfit.
        FailedPrecondition: upper or mount point in use; the upper belongs to other layers.
        Unsupported: the host or user may not mount.
    """
    spec = make_spec(
        layers,
        mountpoint,
        upper=upper,
        work=work,
        readonly=readonly,
        ephemeral=ephemeral,
        memory=memory,
        size=size,
        inodes=inodes,
        options=options,
        volatile=volatile,
        allow_other=allow_other,
        io=io,
        frontend=frontend,
        uid_map=uid_map,
        gid_map=gid_map,
        max_nodes=max_nodes,
        log=os.path.abspath(log) if log else "",
        trace=trace,
    )
    spec = spec if row is None else replace(spec, row=block_size(row))
    if memory:
        from cowfs.mounting import kernel

        if not kernel.why_not_in_memory(spec):
            return kernel.mount_in_memory(spec)
    return spawn(spec)


def spawn(spec: MountSpec) -> MountHandle:
    """Start a server for a mount request, in a process of its own.

    Raises:
        CowfsError: as :func:`mount`.
    """
    from cowfs.mounting import prefork

    started = prefork.start(spec)
    return MountHandle(spec.mountpoint, started.pid, started.socket)


# ---------------------------------------------------------------------------------------------------------------
# Finding and ending


def attach(target: PathLike) -> MountHandle:
    """The handle of an existing mount.

    Args:
        target: the mount point, in this process's mount namespace.

    Raises:
        NotFound: no mount of cowfs there.
        FailedPrecondition: its server is gone.
    """
    path = os.fspath(target)
    entry = mountpoint.find(path)
    if entry is not None and mountpoint.is_kernel_mount(entry):
        raise FailedPrecondition(
            f"{path} is mounted by the kernel: there is no server to ask", remedy="the verbs of a store take its key"
        )
    if entry is not None and entry.fstype not in mountpoint.TYPES:
        entry = None
    if entry is None:
        raise NotFound(f"no mount of cowfs at {path}", remedy=_ELSEWHERE)
    where = os.fsdecode(entry.target)
    socket = protocol.socket_of(entry.dev)
    if socket is None:
        raise _gone(where, entry)
    try:
        pid = protocol.ask(socket, "info")["pid"]
    except FailedPrecondition:
        raise _gone(where, entry) from None
    return MountHandle(where, pid, socket)


def _gone(where: str, entry: MountInfo) -> FailedPrecondition:
    if mountpoint.is_dead(where, entry):
        return FailedPrecondition(f"the server of {where} is gone", remedy=f"cowfs umount {where} clears the mount")
    if mountpoint.listens(entry):
        return FailedPrecondition(
            f"the server of {where} does not answer", remedy=f"cowfs umount --force {where} ends it"
        )
    return FailedPrecondition(f"the server of {where} cannot be reached by this user")


def mounts(*, everywhere: bool = False) -> list[MountStatus]:
    """The mounts of cowfs in this mount namespace, dead ones and other users' included, by mount point.

    Args:
        everywhere: also those of other mount namespaces whose control sockets this process can reach; their mount points are
            paths there, and :attr:`MountStatus.here` is false.
    """
    found = []
    entries = {entry.dev: entry for entry in mountpoint.cowfs_mounts()}
    asked = []
    for path in protocol.sockets():
        if everywhere or protocol.device_of(path) in entries:
            asked.append(path)
        elif not _lives(path):
            _sweep(path)
    told = set()
    for path, answer in protocol.ask_all(asked, "info"):
        entry = entries.get(protocol.device_of(path))
        if isinstance(answer, TimeoutError):
            if entry is not None:
                where = os.fsdecode(entry.target)
                found.append(MountStatus(mountpoint=where, alive=True, answers=False, socket=path, details={}))
                told.add(entry.dev)
        elif isinstance(answer, OSError):
            _sweep(path)
        else:
            where = answer["mountpoint"] if entry is None else os.fsdecode(entry.target)
            found.append(_status(where, path, answer, here=entry is not None))
            if entry is not None:
                told.add(entry.dev)
    for entry in entries.values():
        if entry.dev not in told:
            where = os.fsdecode(entry.target)
            found.append(MountStatus(mountpoint=where, alive=not mountpoint.is_dead(where, entry), details={}))
    found += kernel_mounts()
    return sorted(found, key=lambda status: (not status.here, status.mountpoint))


def _sweep(path: str) -> None:
    """Remove the socket and log of a killed server; its mount, if any, is listed from mountinfo."""
    import contextlib

    try:
        protocol.connect(path, 1.0).close()
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        log = path.removesuffix(protocol.SUFFIX) + ".log"
        with contextlib.suppress(OSError):
            if not os.path.getsize(log):
                os.unlink(log)
    except OSError:
        pass


def kernel_mounts() -> list[MountStatus]:
    """The mounts of cowfs in this mount namespace that the kernel serves. No server is asked."""
    return [_kernel_status(entry) for entry in mountpoint.kernel_mounts()]


def _kernel_status(entry: MountInfo) -> MountStatus:
    """The status of a mount that the kernel serves, from mountinfo; ``store`` is the directory of its store, "" if
    there is none."""
    values: dict[str, str] = {}
    for option in entry.super_options.split(b","):
        name, _, value = option.partition(b"=")
        values.setdefault(os.fsdecode(name), os.fsdecode(value))
    id = os.fsdecode(entry.source.partition(b":")[2])
    upper, store = values.get("upperdir"), ""
    for key, end in (("datadir+", "/layers"), ("lowerdir+", "/empty"), ("upperdir", f"/layers/{id}/fs")):
        if not store and values.get(key, "").endswith(end):
            store = values[key].removesuffix(end)
    if upper is not None and upper.startswith("/proc/self/fd/"):  # of a file system that is mounted nowhere else
        upper = f"{store}/layers/{id}/upper.img" if store else "memory"
    return MountStatus(
        mountpoint=os.fsdecode(entry.target),
        alive=True,
        upper=upper,
        readonly=upper is None,
        details={"engine": "kernel", "id": id, "store": store},
    )


def _lives(path: str) -> bool:
    """Whether a server listens at a socket. No verb is sent, so a hanging server does no harm."""
    try:
        protocol.connect(path, 1.0).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True


def _status(where: str, socket: str, details: Mapping[str, Any], *, here: bool = True) -> MountStatus:
    return MountStatus(
        mountpoint=where,
        alive=True,
        here=here,
        layers=tuple(details["layers"]),
        upper=details["upper"],
        readonly=details["readonly"],
        usage=Usage(**details["usage"]) if details["usage"] is not None else None,
        limit=Limit(**details["limit"]),
        pid=details["pid"],
        started=details["started"],
        socket=socket,
        label=details["label"],
        details=details,
    )


def umount(target: PathLike, *, lazy: bool = False, force: bool = False, socket: str | None = None) -> None:
    """Unmount what is mounted at ``target`` and wait until its server has closed everything; clears dead mounts, too.

    Args:
        target: the mount point.
        lazy: take it off the tree now; the server ends with the last user.
        force: cut the connection of a server that hangs.
        socket: the control socket of a mount that the caller knows, in whatever mount namespace it is.

    Raises:
        NotFound: no mount of cowfs there, in this mount namespace.
        FailedPrecondition: in use; the message names who.
    """
    path = os.fspath(target)
    _log.info("unmount %s", path)
    entry = mountpoint.find(path)
    if entry is not None and socket is not None and protocol.device_of(socket) != entry.dev:
        entry = None  # the path is one of another mount namespace
    if entry is None and socket is None:
        raise NotFound(f"nothing is mounted at {path}", remedy=_ELSEWHERE)
    if entry is not None and mountpoint.is_kernel_mount(entry):
        mountpoint.detach(os.fsdecode(entry.target), lazy=lazy, force=force)
        return
    if entry is not None and entry.fstype not in mountpoint.TYPES:
        raise NotFound(f"what is mounted at {path} is {entry.fstype}, not cowfs", remedy=f"umount {path}")
    where = os.fsdecode(entry.target) if entry is not None else path
    if entry is not None and socket is None:
        socket = protocol.socket_of(entry.dev)
    if socket is None or force:
        mountpoint.detach(where, lazy=lazy, force=force or mountpoint.is_dead(where, entry))
        return
    try:
        connection = protocol.connect(socket)
    except OSError:
        if entry is None:
            raise NotFound(f"nothing is mounted at {path}", remedy="cowfs mounts lists what is") from None
        mountpoint.detach(where, lazy=lazy, force=mountpoint.is_dead(where, entry))
        _sweep(socket)
        return
    with connection:
        try:
            protocol.talk(connection, "umount", {"lazy": lazy})
        except FailedPrecondition:
            if entry is None or not mountpoint.is_dead(where, entry):
                raise
            mountpoint.detach(where, force=True)  # it was killed meanwhile
            return
        if not lazy:
            connection.settimeout(protocol.TIMEOUT)
            try:
                connection.recv(1)  # ends when the server does
            except OSError:
                pass
