"""INIT: the requested features of the kernel, each with its reason.

Strategy: one table, three kinds of session. ``always`` features come with every session; the others depend on how
data travels: through the page cache without opens (``cached``), the same with writes held back (``writeback``), or
past the server (``passthrough``). Other features are not requested, for the reasons in the second table.
"""

from __future__ import annotations

from cowfs._record import record
from cowfs._typed import Final
from cowfs.errors import Unsupported
from cowfs.fuse import abi
from cowfs.fuse.codec import ProtocolError

CACHED, WRITEBACK, PASSTHROUGH = "cached", "writeback", "passthrough"
_ALL: Final = frozenset((CACHED, WRITEBACK, PASSTHROUGH))
_NO_OPEN: Final = frozenset((CACHED, WRITEBACK))

#: Feature -> (sessions that ask for it, why).
WANTED: Final[dict[str, tuple[frozenset[str], str]]] = {
    "ASYNC_READ": (_ALL, "read-ahead in parallel"),
    "EXPORT_SUPPORT": (_ALL, "file handles of forgotten nodes come back as LOOKUP of '.' and '..'"),
    "BIG_WRITES": (_ALL, "more than a page a WRITE (kernels since 4.20 do it unasked)"),
    "DONT_MASK": (_ALL, "with default ACLs the umask must not be applied: the view decides"),
    "HAS_IOCTL_DIR": (_ALL, "ioctls on directories are answered ENOTTY like those on files"),
    "DO_READDIRPLUS": (_ALL, "a listing brings nodes and attributes along"),
    # with it the kernel answers EIO to a direct write that is taken in part, at a limit (fs/fuse/file.c, fuse_get_res_by_io)
    "ASYNC_DIO": (frozenset((PASSTHROUGH,)), "direct I/O may have several requests under way"),
    "NO_OPEN_SUPPORT": (_NO_OPEN, "OPEN, CREATE and RELEASE vanish after one ENOSYS"),
    "NO_OPENDIR_SUPPORT": (_ALL, "OPENDIR vanishes likewise, and listings are cached"),
    "PARALLEL_DIROPS": (_ALL, "look-ups in one directory need not wait for each other"),
    "POSIX_ACL": (_ALL, "the kernel checks ACLs, from its cache"),
    "ABORT_ERROR": (_ALL, "a connection that was cut (ECONNABORTED) can be told from an unmount (ENODEV)"),
    "MAX_PAGES": (_ALL, "requests of 1 MiB"),
    "CACHE_SYMLINKS": (_ALL, "READLINK is asked once"),
    "EXPLICIT_INVAL_DATA": (_ALL, "the mount is the only writer: pages are dropped only when a notification says so"),
    "HANDLE_KILLPRIV_V2": (_ALL, "set-id bits are cleared here, and the kernel asks no xattr before each write"),
    "SETXATTR_EXT": (_ALL, "carries the kill-sgid flag of an ACL change"),
    "INIT_EXT": (_ALL, "flags past bit 31"),
    "HAS_EXPIRE_ONLY": (_ALL, "INVAL_ENTRY may expire instead of drop"),
    "DIRECT_IO_ALLOW_MMAP": (frozenset((PASSTHROUGH,)), "a database may map what it opened with O_DIRECT"),
    "WRITEBACK_CACHE": (frozenset((WRITEBACK,)), "small writes are gathered in the page cache"),
    "PASSTHROUGH": (frozenset((PASSTHROUGH,)), "reads and writes go to the file below without the server"),
}

#: Feature -> why no session asks for it.
UNWANTED: Final[dict[str, str]] = {
    "POSIX_LOCKS": "the kernel's own locks are right: the mount has no second client",
    "FLOCK_LOCKS": "the same",
    "FILE_OPS": "never implemented by the kernel",
    "ATOMIC_O_TRUNC": "with no OPEN nobody would truncate: ': > file' would keep its content",
    "SPLICE_WRITE": "a splice needs a pipe and two system calls; one read into a reused buffer is cheaper here",
    "SPLICE_MOVE": "the same",
    "SPLICE_READ": "the same",
    "AUTO_INVAL_DATA": "would drop pages when a time stamp changes; EXPLICIT_INVAL_DATA is the opposite",
    "READDIRPLUS_AUTO": "would list names only from the second buffer on, and walkers then look up one by one (docs/fuse.md)",
    "HANDLE_KILLPRIV": "the first version clears bits of those who may keep them; V2 does it as the VFS does",
    "MAP_ALIGNMENT": "DAX windows exist for virtiofs only",
    "SUBMOUNTS": "one mount shows one tree",
    "INIT_RESERVED": "not a feature",
    "SECURITY_CTX": "no security module's label is set at creation",
    "HAS_INODE_DAX": "DAX windows exist for virtiofs only",
    "CREATE_SUPP_GROUP": "the VFS strips set-gid by itself since Linux 6.0",
    "NO_EXPORT_SUPPORT": "file handles are supported",
    "HAS_RESEND": "a server that died takes its state with it: there is nobody to resend to",
    "ALLOW_IDMAP": "owners are mapped by the view (uid_map), not by the mount",
    "OVER_IO_URING": "slower from Python than read and write (docs)",
    "REQUEST_TIMEOUT": "a copy-up may take as long as it takes",
}
assert WANTED.keys() | UNWANTED.keys() == abi.INIT_FLAGS.keys()
assert not WANTED.keys() & UNWANTED.keys()


@record(frozen=True, slots=True)
class Agreement:
    """The features that both sides agreed on."""

    minor: int
    flags: int
    max_write: int
    #: "cached", "writeback" or "passthrough": the requested one, or "cached" if the kernel has less.
    mode: str

    def has(self, feature: str) -> bool:
        return bool(self.flags & abi.INIT_FLAGS[feature])


def negotiate(body: memoryview, *, mode: str = CACHED, max_write: int = 1 << 20) -> tuple[bytes, Agreement | None]:
    """Answer the INIT whose body (what follows the header) is ``body``.

    Returns the body of the reply, and the agreement; None when the kernel speaks a newer major version and must
    ask again (it does so by itself).

    Raises:
        ProtocolError: the body is no INIT.
        Unsupported: the kernel is older than protocol 7.31 (Linux 5.4).
    """
    if len(body) < abi.INIT_COMPAT_IN.size:
        raise ProtocolError(f"INIT of {len(body)} bytes")
    major, minor, readahead, flags = abi.INIT_COMPAT_IN.unpack_from(body)
    if major > abi.MAJOR:
        return abi.INIT_OUT.pack(abi.MAJOR, abi.MINOR, *[0] * 11), None
    if major < abi.MAJOR or minor < abi.MIN_MINOR:
        raise Unsupported(
            f"the kernel speaks FUSE {major}.{minor}, cowfs needs {abi.MAJOR}.{abi.MIN_MINOR}",
            remedy="Linux 5.4 or newer, or --frontend fusepy",
        )
    if flags & abi.INIT_FLAGS["INIT_EXT"]:
        if len(body) < abi.INIT_IN.size:
            raise ProtocolError(f"extended INIT of {len(body)} bytes")
        flags |= abi.INIT_IN.unpack_from(body)[4] << 32
    if mode != CACHED and not flags & abi.INIT_FLAGS["WRITEBACK_CACHE" if mode == WRITEBACK else "PASSTHROUGH"]:
        mode = CACHED
    agreed = 0
    for feature, (modes, _why) in WANTED.items():
        if mode in modes:
            agreed |= abi.INIT_FLAGS[feature] & flags
    pages = max(1, min(256, max_write // abi.PAGE))
    if not agreed & abi.INIT_FLAGS["MAX_PAGES"]:
        pages = 32
    max_write = pages * abi.PAGE
    minor = min(minor, abi.MINOR)
    reply = abi.INIT_OUT.pack(
        abi.MAJOR,
        minor,
        readahead,
        agreed & 0xFFFFFFFF,
        64,  # max_background: read-ahead requests under way
        48,  # congestion_threshold: three quarters, as the kernel's own default has it
        max_write,
        1,  # time_gran: nanoseconds
        pages,
        0,
        agreed >> 32,
        1 if mode == PASSTHROUGH else 0,  # files below must not lie on a stacked file system themselves
        0,
    )
    return reply, Agreement(minor, agreed, max_write, mode)
