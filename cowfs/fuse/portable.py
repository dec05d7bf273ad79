"""The portable front end: the same view through libfuse 2 and fusepy, by paths.

For hosts where cowfs's own protocol engine cannot run. It is slower, and libfuse's path interface cannot express
everything (docs/fusepy.md lists what, with reasons).

Strategy:

* libfuse runs its single-threaded loop in C and calls back; a lock stands for the view's one owner, so that
  :meth:`PortableSession.call` may run in its caller's thread.
* A path is walked from the root by directory entries; links are never followed (the kernel has done that). Paths travel
  through fusepy as Latin-1, which maps every byte to a character and back.
* Open files are handles: a handle holds a look-up of its node.
* **Unlinked files that are open.** libfuse would rename them to ``.fuse_hidden*``, where everybody sees them. It asks
  for that rename; instead, the file is unlinked, its node kept, and the hidden name answered from a table until libfuse
  removes it. So the link count is right, no name shows, and its directory can be removed.
* Hard links are different inodes to the kernel here, since libfuse has a node for each path. Attributes are therefore
  never kept by the kernel (``attr_timeout=0``), and data is dropped at each open.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from cowfs._typed import TYPE_CHECKING, Any, Final, TextIO, TypeVar
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.fuse import device, log
from cowfs.sys import mounts

if TYPE_CHECKING:
    from cowfs.fuse.handshake import Agreement
    from cowfs.fuse.tree import Tree

__all__ = ["PortableSession"]

_T = TypeVar("_T")
_ENCODING: Final = "latin-1"
#: The name libfuse gives to a file that is removed while open (lib/fuse.c, hidden_name).
_HIDDEN: Final = re.compile(rb"\.fuse_hidden[0-9a-f]{16}\Z")
_UTIME_NOW: Final = (1 << 30) - 1
_UTIME_OMIT: Final = (1 << 30) - 2
#: Unused nodes are dropped once the view has this many, since libfuse sends no forgets here.
_KEEP_NODES: Final = 50_000
#: Words that libfuse 2 takes as mount options.
_WORDS: Final = frozenset(
    ("ro", "rw", "nodev", "dev", "nosuid", "suid", "noexec", "exec", "sync", "async", "dirsync", "noatime", "atime")
)


def fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class PortableSession:
    """Serves one view at one mount point through libfuse 2; the interface of :class:`cowfs.fuse.Session`.

    Unlike there, the mount is made by :meth:`run`: ``ready`` is set once it answers.

    Args:
        mountpoint, options, allow_other, source, subtype: as for :func:`cowfs.fuse.mount_fuse`.
        view: the merged view.
        trace: the file for one line an operation, or None.

    Raises:
        Unsupported: no fusepy or no libfuse 2 on this host.
        CowfsError: as :func:`cowfs.fuse.mount_fuse` for a bad mount point or option.
    """

    def __init__(
        self,
        mountpoint: str | bytes | os.PathLike[str],
        view: Tree,
        options: Iterable[str] = (),
        allow_other: bool | None = None,
        source: str = "cowfs",
        subtype: str = "cowfs",
        *,
        trace: TextIO | None = None,
    ) -> None:
        self.view = view
        self.mountpoint = os.fsdecode(mountpoint)
        self.ready = threading.Event()
        self.agreement: Agreement | None = None  # libfuse makes its own
        self.notifier = NoNotifier()
        self.trace = trace
        self._fuse = _load()
        self._lock = threading.RLock()  # its holder owns the view
        self._counts: dict[str, int] = {}
        self._ended = False
        self._said = ""  # the last line of damage that was logged
        words = [word for word in options if word and word not in device.IGNORED]
        for word in words:
            if word not in mounts.OPTION_FLAGS:
                raise InvalidArgument(f"mount option {word!r} is not known", remedy=", ".join(sorted(_WORDS)))
        device.check_target(self.mountpoint)
        os.close(device.open_device())
        root = os.geteuid() == 0
        kept = [word for word in words if word in _WORDS]
        if root:  # libfuse adds nosuid and nodev unless told otherwise
            kept += [on for on, off in (("suid", "nosuid"), ("dev", "nodev")) if off not in kept and on not in kept]
        self._mount_options: dict[str, Any] = dict.fromkeys(kept, True) | {
            "fsname": source.replace("\\", "\\\\").replace(",", "\\,"),
            "subtype": subtype,
            "default_permissions": True,
            "use_ino": True,
            "attr_timeout": 0,
            "entry_timeout": 3600,
            "big_writes": True,
        }
        if root if allow_other is None else allow_other:
            self._mount_options["allow_other"] = True

    @property
    def counters(self) -> dict[str, int]:
        """Operations served so far, by name in capitals; only those that came."""
        return dict(self._counts)

    @property
    def connected(self) -> bool:
        """Whether libfuse still serves the file system. Any thread."""
        return not self._ended

    def call(self, fn: Callable[[], _T]) -> _T:
        """Run ``fn`` while no operation is being answered. Any thread. Raises ENODEV after the end."""
        with self._lock:
            if self._ended:
                raise OSError(errno.ENODEV, "the mount is gone")
            return fn()

    def post(self, fn: Callable[[], None]) -> None:
        """Run ``fn`` as :meth:`call` does, without a result."""
        self.call(fn)

    def stop(self) -> None:
        """Make :meth:`run` return soon; libfuse offers no way but to unmount."""
        try:
            mounts.umount(self.mountpoint, mounts.MNT_DETACH)
        except OSError:
            device.clear_dead(self.mountpoint)

    def run(self) -> None:
        """Mount, and serve until the file system is unmounted.

        Raises:
            FailedPrecondition: libfuse could not mount (its message is on standard error).
        """
        operations = Operations(self)
        try:
            self._fuse(
                operations,
                os.fsencode(self.mountpoint).decode(_ENCODING),
                encoding=_ENCODING,
                foreground=True,
                nothreads=True,
                **self._mount_options,
            )
        except RuntimeError as error:
            if not self.ready.is_set():
                raise FailedPrecondition(f"{self.mountpoint}: libfuse could not mount (status {error})") from None
            raise
        finally:
            with self._lock:
                self._ended = True

    def _report(self, error: Exception, label: str) -> int:
        """Log an unforeseen error, and return the errno of the answer. As :meth:`cowfs.fuse.loop.Session.report`."""
        if not isinstance(error, CowfsError):
            log.exception("%s failed: answered EIO", label)
            return errno.EIO
        if str(error) != self._said:
            self._said = str(error)
            log.error("%s", error)
        return error.errno

    def serve(self, name: str, method: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """One operation: counted, traced, and never failing otherwise than by OSError."""
        with self._lock:
            label = name.upper()
            self._counts[label] = self._counts.get(label, 0) + 1
            start = time.perf_counter_ns() if self.trace is not None else 0
            result = "ok"
            try:
                return method(*arguments)
            except OSError as error:
                result = errno.errorcode.get(error.errno or 0, str(error.errno))
                raise fail(error.errno or errno.EIO) from None
            except Exception as error:  # noqa: BLE001 - a bug must not end the server; it is logged
                result = f"{type(error).__name__} -> EIO"
                raise fail(self._report(error, label)) from None
            finally:
                if self.trace is not None:
                    what = repr(arguments[0])[1:-1] if arguments and isinstance(arguments[0], str) else "-"
                    self.trace.write(f"{label} {what} = {result} {(time.perf_counter_ns() - start) // 1000}us\n")


class NoNotifier:
    """libfuse 2 has no notifications on its path interface: every one is refused."""

    unsupported: frozenset[int] = frozenset(range(1, 64))
    sent: dict[int, int] = {}  # noqa: RUF012 - always empty

    def send(self, message: bytes) -> None:
        raise fail(errno.EOPNOTSUPP)

    def flush(self, timeout: float | None = None) -> bool:
        return True

    def _refuse(self, *_: Any) -> None:
        raise fail(errno.EOPNOTSUPP)

    inval_inode = inval_entry = delete = prune = inc_epoch = _refuse


def _load() -> Any:
    """fusepy's FUSE class, changed to pass on time stamps unrounded."""
    try:
        import fuse
    except ImportError as error:
        raise Unsupported(
            f"the fusepy front end needs the package fusepy: {error}", remedy="pip install fusepy"
        ) from None
    except OSError as error:
        raise Unsupported(f"the fusepy front end needs libfuse 2: {error}", remedy="apt-get install libfuse2") from None

    # fusepy describes libfuse's table of operations up to ioctl; libfuse 2.9.1 has five more. FUSE.__init__ looks it up
    # by its name in the module.
    if not any(field[0] == "fallocate" for field in fuse.fuse_operations._fields_):
        handle = ctypes.POINTER(fuse.fuse_file_info)
        fallocate = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, handle
        )
        unused = [(name, ctypes.c_void_p) for name in ("poll", "write_buf", "read_buf", "flock")]
        fields = [*fuse.fuse_operations._fields_, *unused, ("fallocate", fallocate)]
        fuse.fuse_operations = type("fuse_operations", (ctypes.Structure,), {"_fields_": fields})

    class Fuse(fuse.FUSE):
        """fusepy's class with fallocate, and ``utimens`` with UTIME_NOW and UTIME_OMIT, which fusepy folds into the number."""

        def utimens(self, path: bytes, buf: Any) -> Any:
            times: Any = ("now", "now")
            if buf:
                times = (_time(buf.contents.actime), _time(buf.contents.modtime))
            return self.operations("utimens", path.decode(self.encoding), times)

        def fallocate(self, path: bytes | None, mode: int, offset: int, length: int, fip: Any) -> Any:
            handle = fip.contents.fh
            return self.operations("fallocate", self._decode_optional_path(path), mode, offset, length, handle)

    return Fuse


def _time(spec: Any) -> int | str | None:
    """A timespec: ns since 1970, "now", or None for "leave it"."""
    if spec.tv_nsec == _UTIME_OMIT:
        return None
    if spec.tv_nsec == _UTIME_NOW:
        return "now"
    return int(spec.tv_sec) * 10**9 + int(spec.tv_nsec)


class Operations:
    """The operations that fusepy calls, by name and path. Every method runs under the session's lock."""

    use_ns = True
    flag_nullpath_ok = True  # a handle's operations come without path once its directory is gone
    flag_nopath = False
    flag_utime_omit_ok = True

    def __init__(self, session: PortableSession) -> None:
        from fuse import fuse_get_context

        self._session = session
        self._view: Any = session.view
        self._context = fuse_get_context
        self._handles: dict[int, Any] = {}
        self._next = 1
        self._hidden: dict[bytes, Any] = {}

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self._session.serve(name, getattr(self, name), arguments)

    # -- paths --------------------------------------------------------------------------------

    def _split(self, path: str) -> tuple[Any, bytes]:
        """(parent directory, last name) of a path."""
        parts = path.encode(_ENCODING).strip(b"/").split(b"/")
        node = self._view.root
        for part in parts[:-1]:
            node = self._view.lookup(node, part)
        return node, parts[-1]

    def _node(self, path: str | None, handle: int | None = None) -> Any:
        if handle:
            return self._handles[handle]
        assert path is not None
        if self._hidden:
            node = self._hidden.get(_last(path))
            if node is not None:
                return node
        parent, name = self._split(path)
        return self._view.lookup(parent, name) if name else self._view.root

    def _ids(self) -> tuple[int, int]:
        uid, gid, _ = self._context()
        return uid, gid

    def _hold(self, node: Any) -> int:
        node.nlookup += 1
        handle = self._next
        self._next += 1
        self._handles[handle] = node
        return handle

    def _sweep(self) -> None:
        """Drop unused nodes, once there are many."""
        view = self._view
        if len(view.nodes) > _KEEP_NODES:
            for id in list(view.nodes):
                node = view.nodes.get(id)
                if node is not None and node.nlookup <= 0:
                    view.forget(id, 0)

    # -- life ---------------------------------------------------------------------------------

    def init(self, path: str) -> None:
        self._session.ready.set()

    def destroy(self, path: str) -> None:
        pass

    # -- names --------------------------------------------------------------------------------

    def getattr(self, path: str | None, handle: int | None = None) -> dict[str, int]:
        from cowfs.fuse import abi

        self._sweep()
        (
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            atime_ns,
            mtime_ns,
            ctime_ns,
            mode,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            _,
        ) = abi.ATTR.unpack(self._view.attr(self._node(path, handle)))
        return {
            "st_ino": ino, "st_size": size, "st_blocks": blocks, "st_mode": mode, "st_nlink": nlink, "st_uid": uid,
            "st_gid": gid, "st_rdev": rdev, "st_blksize": blksize,
            "st_atime": _signed(atime) * 10**9 + atime_ns,
            "st_mtime": _signed(mtime) * 10**9 + mtime_ns,
            "st_ctime": _signed(ctime) * 10**9 + ctime_ns,
        }  # fmt: skip

    def readlink(self, path: str) -> str:
        return bytes(self._view.readlink(self._node(path))).decode(_ENCODING)

    def mknod(self, path: str, mode: int, rdev: int) -> int:
        parent, name = self._split(path)
        self._view.mknod(parent, name, mode, rdev, *self._ids(), 0)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        parent, name = self._split(path)
        self._view.mkdir(parent, name, mode, *self._ids(), 0)
        return 0

    def symlink(self, path: str, target: str) -> int:
        parent, name = self._split(path)
        self._view.symlink(parent, name, target.encode(_ENCODING), *self._ids())
        return 0

    def link(self, path: str, source: str) -> int:
        node = self._node(source)
        parent, name = self._split(path)
        self._view.link(node, parent, name)
        return 0

    def unlink(self, path: str) -> int:
        node = self._hidden.pop(_last(path), None)
        if node is not None:  # its name went when it was hidden
            self._view.forget(node.id, 1)
            return 0
        self._view.unlink(*self._split(path))
        return 0

    def rmdir(self, path: str) -> int:
        self._view.rmdir(*self._split(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        parent, name = self._split(old)
        target, new_name = self._split(new)
        if _HIDDEN.match(new_name) and self._is_open(parent, name):
            node = self._view.lookup(parent, name)
            node.nlookup += 1
            self._view.unlink(parent, name)
            self._hidden[new_name] = node
            return 0
        self._view.rename(parent, name, target, new_name, 0)
        return 0

    def _is_open(self, parent: Any, name: bytes) -> bool:
        node = self._view.child(parent, name)
        return node is not None and any(held is node for held in self._handles.values())

    def opendir(self, path: str) -> int:
        return self._hold(self._node(path))

    def readdir(self, path: str, handle: int) -> Iterator[tuple[str, dict[str, int], int]]:
        node = self._handles[handle]
        found = []
        for name, _cookie in self._view.listing(node, 0):
            ino, kind = self._view.entry(node, name)
            if ino:
                found.append((name.decode(_ENCODING), {"st_ino": ino, "st_mode": kind << 12}, 0))
        return iter(found)

    def releasedir(self, path: str, handle: int) -> int:
        return self.release(path, handle)

    # -- attributes ---------------------------------------------------------------------------

    def chmod(self, path: str, mode: int) -> int:
        self._view.setattr(self._node(path), mode=stat.S_IMODE(mode))
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        changes = {key: value for key, value in (("uid", uid), ("gid", gid)) if value not in (-1, 0xFFFFFFFF)}
        if changes:
            self._view.setattr(self._node(path), **changes, kill=True)
        return 0

    def truncate(self, path: str | None, length: int, handle: int | None = None) -> int:
        self._view.setattr(self._node(path, handle), size=length)
        return 0

    def utimens(self, path: str, times: tuple[int | str | None, int | str | None]) -> int:
        changes = {
            key: self._view.NOW if value == "now" else value
            for key, value in zip(("atime", "mtime"), times, strict=True)
            if value is not None
        }
        if changes:
            self._view.setattr(self._node(path), **changes)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        st = self._view.statfs()
        keys = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
        return {key: getattr(st, key) for key in keys}

    def setxattr(self, path: str, name: str, value: bytes, flags: int, *_: Any) -> int:
        self._view.setxattr(self._node(path), name.encode(_ENCODING), value, flags)
        return 0

    def getxattr(self, path: str, name: str, *_: Any) -> bytes:
        return bytes(self._view.getxattr(self._node(path), name.encode(_ENCODING)))

    def listxattr(self, path: str) -> list[str]:
        return [name.decode(_ENCODING) for name in self._view.listxattr(self._node(path))]

    def removexattr(self, path: str, name: str) -> int:
        self._view.removexattr(self._node(path), name.encode(_ENCODING))
        return 0

    # -- data ---------------------------------------------------------------------------------

    def create(self, path: str, mode: int) -> int:
        parent, name = self._split(path)
        return self._hold(self._view.mknod(parent, name, stat.S_IFREG | stat.S_IMODE(mode), 0, *self._ids(), 0))

    def open(self, path: str, flags: int) -> int:
        return self._hold(self._node(path))

    def read(self, path: str | None, size: int, offset: int, handle: int) -> bytes:
        buffer = bytearray(size)
        got = self._view.pread(self._handles[handle], offset, memoryview(buffer))
        return bytes(memoryview(buffer)[:got])

    def write(self, path: str | None, data: bytes, offset: int, handle: int) -> int:
        return int(self._view.write(self._handles[handle], offset, memoryview(data)))

    def fsync(self, path: str | None, datasync: int, handle: int) -> int:
        fd = self._view.fsync_fd(self._handles[handle])
        if fd is not None:
            try:
                (os.fdatasync if datasync else os.fsync)(fd)
            finally:
                os.close(fd)
        return 0

    fsyncdir = fsync

    def fallocate(self, path: str | None, mode: int, offset: int, length: int, handle: int) -> int:
        self._view.fallocate(self._handles[handle], mode, offset, length)
        return 0

    def release(self, path: str | None, handle: int) -> int:
        node = self._handles.pop(handle)
        if self._hidden and not any(held is node for held in self._handles.values()):
            # libfuse removes the hidden name after this, but not when its directory is gone.
            for name in [name for name, hidden in self._hidden.items() if hidden is node]:
                del self._hidden[name]
                self._view.forget(node.id, 1)
        self._view.forget(node.id, 1)
        return 0


def _last(path: str) -> bytes:
    """The last name of a path."""
    return path.rpartition("/")[2].encode(_ENCODING)


def _signed(seconds: int) -> int:
    return seconds - (1 << 64) if seconds >> 63 else seconds
