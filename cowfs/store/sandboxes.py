"""Snapshots in sandboxes: what an image asks for, how a sandbox gets a snapshot's tree, and where it is told that it has it.

Strategy: the tree is mounted in the keeper's mount namespace (:mod:`cowfs.sandbox.process`). cowfs's own server ends with the keeper, whatever
ends that. An ordinary user's snapshot without a limit is mounted by the kernel's overlayfs, in a user namespace in which that
user may: then the keeper and all that it starts hold the layer's lock, as a server would. Where the kernel does not, the server does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cowfs._typed import TYPE_CHECKING, Any, Protocol, Self
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Kind
from cowfs.mounting import notice, protocol
from cowfs.mounting.holders import take
from cowfs.sandbox import beside, process
from cowfs.sandbox.request import PATH, BindLike, Request, binds_of, check_network, check_timeout, limits_of
from cowfs.sys import host

if TYPE_CHECKING:
    from types import TracebackType

    from cowfs.driver.interface import Driver
    from cowfs.index.database import Row
    from cowfs.mounting.kernel import KernelMount
    from cowfs.store.handle import LiveHandle

__all__ = ["MOUNT_TYPES", "make_request", "run_beside", "run_in"]


class HasMounts(Protocol):
    """A store, as far as sandboxes ask it; see :class:`cowfs.Store`."""

    root: str

    @property
    def driver(self) -> Driver: ...

    @classmethod
    def open(cls, root: str, *, create: bool, fsync: bool) -> Self: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def resolve(self, name: str) -> Row: ...

    def mount_of(self, key: str) -> tuple[int, str] | None: ...

    def mount(self, key: str, target: str, *, mount_type: str, owner: int = 0) -> LiveHandle | KernelMount: ...


MOUNT_TYPES = (None, "fuse", "kernel")
_NOTE = notice.PREFIX + "sandbox"
"""The file beside a layer that says how the sandbox on it is entered; it goes with the notices of servers (:func:`cowfs.mounting.notice.drop`)."""


def make_request(
    config: str,
    name: str,
    argv: Sequence[str],
    *,
    default: Sequence[str] | None = None,
    network: str,
    binds: Sequence[BindLike],
    env: Mapping[str, str],
    user: str | int | None,
    workdir: str | None,
    privileged: bool,
    timeout: float | None,
    terminal: bool | None,
    memory: str | int | None = None,
    cpus: str | float | None = None,
    pids_limit: str | int | None = None,
) -> Request:
    """The request, completed by the configuration of the snapshot's image.

    Args:
        config: the configuration of its image, JSON text; "" for none.
        name: the snapshot.
        default: the command where ``argv`` is empty; None: the image's, else a shell.

    Raises:
        NotFound: no such snapshot, or a bind's source is missing.
        InvalidArgument: what cannot be done.
    """
    settings = _config(config, name)
    if default is None:
        default = [*(settings.get("Entrypoint") or ()), *(settings.get("Cmd") or ())] or ["/bin/sh"]
    command = [os.fspath(word) for word in argv] or list(default)
    where = workdir or settings.get("WorkingDir") or "/"
    who = settings.get("User") or "" if user is None else str(user)
    for word in (*command, where, who):
        if not _can_be_passed(word):
            raise InvalidArgument(f"{word!r} cannot be passed to a command", remedy="text without NUL")
    if not os.path.isabs(where):
        raise InvalidArgument(f"the working directory {where!r} is no absolute path", remedy="one that begins with /")
    for key, value in env.items():
        if not key or "=" in key or not _can_be_passed(key) or not _can_be_passed(value):
            raise InvalidArgument(f"not a variable: {key!r}", remedy="a name without = and a text, both without NUL")
    return Request(
        command=command,
        environment={"PATH": PATH, "TERM": os.environ.get("TERM", "dumb"), **_variables(settings), **env},
        workdir=where,
        network=check_network(network),
        privileged=privileged,
        timeout=check_timeout(timeout),
        binds=binds_of(binds),
        user=who,
        terminal=terminal,
        limits=limits_of(memory, cpus, pids_limit),
    )


def _config(document: str, name: str) -> dict[str, Any]:
    """The ``config`` of an image (OCI image-spec, config.md), {} where there is none."""
    from cowfs.images.digests import parse_json

    found = parse_json(document.encode(), f"the configuration of {name!r}").get("config") if document else None
    config = found if isinstance(found, dict) else {}
    for key in ("Entrypoint", "Cmd", "Env"):
        listed = config.get(key) or []
        if not isinstance(listed, list) or not all(map(_can_be_passed, listed)):
            raise InvalidArgument(f"{key} of {name!r} is no list of words that a command can be given")
    for key, what in (("WorkingDir", "path"), ("User", "user")):
        if not _can_be_passed(config.get(key) or ""):
            raise InvalidArgument(f"{key} of {name!r} is no {what}")
    return config


def _can_be_passed(word: object) -> bool:
    """Whether an image's word can be an argument, a variable or a path: not every string of JSON can."""
    if not isinstance(word, str) or "\0" in word:
        return False
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        return False
    return True


def _variables(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for pair in config.get("Env") or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InvalidArgument(f"not a variable of the image: {pair!r}", remedy="write NAME=VALUE")
        found[name] = value
    return found


def run_in(
    store: HasMounts, key: str, request: Request, *, mount_type: str | None = None, life: int | None = None
) -> process.Ended:
    """Run a command in a sandbox on a snapshot that is not mounted. The calling process has one thread.

    Args:
        key: of an active snapshot or a view.
        mount_type: ``fuse``, ``kernel``, or None: what fits.
        life: as for :func:`cowfs.sandbox.process.run`.

    Raises:
        cowfs.sandbox.process.Stopped: by a signal, before the command began.
        CowfsError: of mounting, or of making the sandbox.
    """
    if mount_type not in MOUNT_TYPES:
        raise InvalidArgument(f"no mount type {mount_type!r}", remedy="kernel or fuse")
    as_user = not (host.has_cap(host.CAP_SYS_ADMIN) and host.init_userns())
    row = store.resolve(key)
    by_kernel = mount_type == "kernel" or (mount_type is None and as_user and not row.limit)

    @contextmanager
    def tree(target: str) -> Iterator[None]:
        with ExitStack() as mounted:
            if not (by_kernel and _mount_by_kernel(store, key, target, mounted, insist=mount_type == "kernel")):
                mounted.enter_context(store.mount(key, target, mount_type="fuse", owner=os.getpid()))
            yield

    return process.run(request, tree, _directory(), note=_note(store, row.id), life=life)


def _mount_by_kernel(store: HasMounts, key: str, target: str, mounted: ExitStack, *, insist: bool) -> bool:
    """Mount in this namespace by the kernel; whether it could.

    Args:
        mounted: unmounts at its end, and lets go of the layer's lock.
        insist: an error where it cannot.
    """
    try:  # a store of its own: its driver asks once more what may be done here
        with type(store).open(store.root, create=False, fsync=store.driver.fsync) as ours:
            handle = ours.mount(key, target, mount_type="kernel")
            mounted.callback(handle.unmount, lazy=True)  # in a namespace that ends
            row = ours.resolve(key)
            fd = os.open(ours.driver.tree(row.id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            mounted.callback(os.close, fd)
            holder = take(fd, [ours.driver.directory(row.id)])
    except (Unsupported, OSError) as error:
        if insist:
            raise
        del error
        return False
    if holder is not None:
        raise FailedPrecondition(f"{key!r} is in use by {holder}: cannot mount it", remedy="wait for it, or end it")
    return True


def run_beside(store: HasMounts, key: str, request: Request) -> process.Ended:
    """Run a command in a snapshot that is there: in the sandbox that runs on it, in one of its own beside its mount, or as :func:`run_in`.

    Args:
        key: of an active snapshot or a view.

    Raises:
        FailedPrecondition: it is committed, or in use by something else.
        CowfsError: as :func:`run_in`.
    """
    row = store.resolve(key)
    if row.kind is Kind.COMMITTED:
        raise FailedPrecondition(f"{key!r} is committed", remedy=f"cowfs run {key} --rm -- sh: a fresh snapshot of it")
    running = beside.found(_note(store, row.id))
    if running is not None:
        if request.binds:
            raise FailedPrecondition(
                f"a command runs in {key!r} already: its sandbox gets no more binds", remedy="leave out --bind"
            )
        if any(request.limits):
            raise FailedPrecondition(
                f"a command runs in {key!r} already: its limits hold for this one, too",
                remedy="leave out --memory, --cpus and --pids-limit",
            )
        return process.run(replace(request, network=running.network), None, _directory(), running=running)
    told = store.mount_of(key)
    if told is None:
        return run_in(store, key, request)
    return process.run(request, process.Mounted(*told), _directory())


def _directory() -> str:
    """Where keepers make their mount points, out of everybody's sight."""
    made = os.path.join(protocol.run_directory(), "sandboxes")
    os.makedirs(made, mode=0o700, exist_ok=True)
    return made


def _note(store: HasMounts, id: str) -> str:
    return f"{store.driver.directory(id)}/{_NOTE}"
