"""The door for containerd: gRPC at a unix socket.

Strategy: handlers translate between messages and :class:`~cowfs.service.containerd.snapshots.Snapshots`; each runs in a thread of a
pool. A CowfsError becomes the status code that containerd's errdefs translates back; a fault of cowfs costs one call,
and its traceback goes to the log alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

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
from cowfs.model import Info, Kind, Mount
from cowfs.service.containerd.messages import METHODS, SERVICE, message
from cowfs.service.containerd.snapshots import Snapshots
from cowfs.service.doors import answers
from cowfs.service.logs import log

__all__ = ["SnapshotsServer"]

_THREADS = 16
_AT_ONCE = 100  # snapshots in one message of List
_LONGEST = 107  # bytes of a unix socket's address (unix(7))

_CODES = {
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Corrupt: grpc.StatusCode.DATA_LOSS,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
}
_KINDS = {Kind.VIEW: 1, Kind.ACTIVE: 2, Kind.COMMITTED: 3}


def _code(error: CowfsError) -> grpc.StatusCode:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)


class SnapshotsServer:
    """A listening server.

    Args:
        address: ``unix:///PATH``.

    Raises:
        InvalidArgument: the address is malformed, or listening there is impossible.
        FailedPrecondition: another process listens there.
    """

    def __init__(self, snapshots: Snapshots, address: str) -> None:
        self._snapshots = snapshots
        path = address.removeprefix("unix://")
        if not path.startswith("/"):
            raise InvalidArgument(
                f"--containerd {address}: not the address of a unix socket",
                remedy="--containerd unix:///run/cowfs/snapshotter.sock",
            )
        if len(os.fsencode(path)) > _LONGEST:
            raise InvalidArgument(f"--containerd {address}: the address of a socket has at most {_LONGEST} bytes")
        self.address = f"unix://{path}"
        self._path = path
        self._inode = 0
        handlers = {name: self._handler(name) for name in METHODS}
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, "cowfs-containerd"),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, handlers)],
        )

    def start(self) -> None:
        """Listen, for the socket's owner alone."""
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            if answers(self._path):
                raise FailedPrecondition(
                    f"another process listens at {self._path}", remedy="end it, or choose another place"
                )
            before = os.umask(0o177)
            try:
                self._server.add_insecure_port(f"unix:{self._path}")
            except RuntimeError as error:
                raise InvalidArgument(f"--containerd {self.address}: {error}") from None
            finally:
                os.umask(before)
            self._inode = os.stat(self._path).st_ino
        except OSError as error:
            raise InvalidArgument(f"--containerd {self.address}: {error.strerror or error}") from None
        self._server.start()

    def stop(self, patience: float = 5.0) -> None:
        """Finish the running calls, and remove the socket's file if it is still this server's."""
        self._server.stop(patience).wait()
        try:
            if self._inode and os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass

    # -- methods ----------------------------------------------------------------------------------------------------------

    def _handler(self, name: str) -> Any:
        request, answer = METHODS[name]
        method: Callable[[Any], Any] = getattr(self, f"_{name.lower()}")
        if name == "List":
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method), message(request).FromString, message(answer).SerializeToString
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(name, method), message(request).FromString, message(answer).SerializeToString
        )

    @staticmethod
    def _guarded(name: str, method: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: Any) -> Any:
            try:
                return method(request)
            except CowfsError as error:
                code, told = _code(error), str(error)
            except OSError as error:
                log.warning("%s: %s", name, error)
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                code, told = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNKNOWN, str(error)
            except Exception:  # noqa: BLE001  a fault of ours costs this call, and its traceback goes to the log alone
                log.exception("%s failed", name)
                code, told = grpc.StatusCode.INTERNAL, "an internal error; the log of cowfs serve tells more"
            log.debug("%s: %s: %s", name, code.name, told)
            return context.abort(code, told)

        return call

    def _streaming(self, method: Callable[[Any], Iterator[Any]]) -> Callable[[Any, Any], Iterator[Any]]:
        def stream(request: Any, context: Any) -> Iterator[Any]:
            answers = self._guarded("List", method)(request, context)
            step = self._guarded("List", lambda _: next(answers, None))
            while (answer := step(request, context)) is not None:
                yield answer

        return stream

    def _prepare(self, request: Any) -> Any:
        mounts = self._snapshots.prepare(request.key, request.parent, dict(request.labels))
        return message("PrepareSnapshotResponse")(mounts=_records(mounts))

    def _view(self, request: Any) -> Any:
        mounts = self._snapshots.view(request.key, request.parent, dict(request.labels))
        return message("ViewSnapshotResponse")(mounts=_records(mounts))

    def _mounts(self, request: Any) -> Any:
        return message("MountsResponse")(mounts=_records(self._snapshots.mounts(request.key)))

    def _commit(self, request: Any) -> Any:
        self._snapshots.commit(request.name, request.key, dict(request.labels), request.parent)
        return message("Empty")()

    def _remove(self, request: Any) -> Any:
        self._snapshots.remove(request.key)
        return message("Empty")()

    def _stat(self, request: Any) -> Any:
        return message("StatSnapshotResponse")(info=_info(self._snapshots.stat(request.key)))

    def _update(self, request: Any) -> Any:
        info = self._snapshots.update(request.info.name, dict(request.info.labels), list(request.update_mask.paths))
        return message("UpdateSnapshotResponse")(info=_info(info))

    def _list(self, request: Any) -> Iterator[Any]:
        found = self._snapshots.walk(list(request.filters))

        def parts() -> Iterator[Any]:
            part: list[Any] = []
            for info in found:
                part.append(_info(info))
                if len(part) == _AT_ONCE:
                    yield message("ListSnapshotsResponse")(info=part)
                    part = []
            if part:
                yield message("ListSnapshotsResponse")(info=part)

        return parts()

    def _usage(self, request: Any) -> Any:
        usage = self._snapshots.usage(request.key)
        return message("UsageResponse")(size=usage.bytes, inodes=usage.inodes)

    def _cleanup(self, request: Any) -> Any:
        self._snapshots.cleanup()
        return message("Empty")()


def _records(mounts: Iterable[Mount]) -> list[Any]:
    return [message("Mount")(type=one.type, source=one.source, options=list(one.options)) for one in mounts]


def _time(ns: int) -> Any:
    seconds, nanos = divmod(ns, 1_000_000_000)
    return message("Timestamp")(seconds=seconds, nanos=nanos)


def _info(info: Info) -> Any:
    return message("Info")(
        name=info.name,
        parent=info.parent or "",
        kind=_KINDS[info.kind],
        created_at=_time(info.created),
        updated_at=_time(info.updated),
        labels=dict(info.labels),
    )
