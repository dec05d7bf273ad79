"""The kernel's side of the wire, as constants: nothing here runs.

Rule 1.  Every struct of the protocol that cowfs reads or writes is one :class:`struct.Struct`,
         little-endian and without implicit padding; its size is asserted at import against the size
         that the kernel's header gives.
Rule 2.  A constant has the kernel's name without the leading ``FUSE_``; it is a plain ``int`` at
         module level (an IntEnum costs ten times as much to look up).
Rule 3.  The protocol is little-endian because the machines are: a big-endian host is refused.

Source: ``include/uapi/linux/fuse.h`` of Linux 6.18 (protocol 7.45).
"""

from __future__ import annotations

import struct
import sys

from cowfs._typed import Final

if sys.byteorder != "little":  # pragma: no cover - no such host at hand
    raise ImportError("cowfs.fuse: the FUSE protocol is in host byte order; only little-endian hosts are supported")

MAJOR: Final = 7
MINOR: Final = 45
#: The oldest minor served: 7.31 (Linux 5.4) is the first with all of NO_OPENDIR_SUPPORT, MAX_PAGES,
#: CACHE_SYMLINKS and EXPLICIT_INVAL_DATA.
MIN_MINOR: Final = 31
ROOT_ID: Final = 1
MIN_READ_BUFFER: Final = 8192
PAGE: Final = 4096

# -- opcodes ----------------------------------------------------------------------------------

OPCODES: Final[dict[str, int]] = {
    "LOOKUP": 1, "FORGET": 2, "GETATTR": 3, "SETATTR": 4, "READLINK": 5, "SYMLINK": 6, "MKNOD": 8, "MKDIR": 9,
    "UNLINK": 10, "RMDIR": 11, "RENAME": 12, "LINK": 13, "OPEN": 14, "READ": 15, "WRITE": 16, "STATFS": 17,
    "RELEASE": 18, "FSYNC": 20, "SETXATTR": 21, "GETXATTR": 22, "LISTXATTR": 23, "REMOVEXATTR": 24, "FLUSH": 25,
    "INIT": 26, "OPENDIR": 27, "READDIR": 28, "RELEASEDIR": 29, "FSYNCDIR": 30, "GETLK": 31, "SETLK": 32,
    "SETLKW": 33, "ACCESS": 34, "CREATE": 35, "INTERRUPT": 36, "BMAP": 37, "DESTROY": 38, "IOCTL": 39, "POLL": 40,
    "NOTIFY_REPLY": 41, "BATCH_FORGET": 42, "FALLOCATE": 43, "READDIRPLUS": 44, "RENAME2": 45, "LSEEK": 46,
    "COPY_FILE_RANGE": 47, "SETUPMAPPING": 48, "REMOVEMAPPING": 49, "SYNCFS": 50, "TMPFILE": 51, "STATX": 52,
    "COPY_FILE_RANGE_64": 53,
}  # fmt: skip
LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
GETLK: Final = 31
SETLK: Final = 32
SETLKW: Final = 33
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
BMAP: Final = 37
DESTROY: Final = 38
IOCTL: Final = 39
POLL: Final = 40
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SETUPMAPPING: Final = 48
REMOVEMAPPING: Final = 49
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52
COPY_FILE_RANGE_64: Final = 53
#: One past the largest opcode of this protocol version: the length of every table by opcode.
OPCODE_END: Final = 54

#: Opcode -> name; ``""`` where the protocol has no such opcode.
NO_REPLY: Final = frozenset((FORGET, BATCH_FORGET, INTERRUPT))  # these get no answer
NAMES: Final[list[str]] = [""] * OPCODE_END
for _name, _opcode in OPCODES.items():
    assert globals()[_name] == _opcode, _name
    NAMES[_opcode] = _name

# -- notifications (server to kernel, unasked) ------------------------------------------------

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_DELETE: Final = 6
NOTIFY_INC_EPOCH: Final = 8  # 7.44
NOTIFY_PRUNE: Final = 9  # 7.45
NOTIFY_NAMES: Final[dict[int, str]] = {2: "INVAL_INODE", 3: "INVAL_ENTRY", 6: "DELETE", 8: "INC_EPOCH", 9: "PRUNE"}
#: FUSE_NOTIFY_PRUNE: the kernel takes node ids in batches of this many under one lock.
PRUNE_BATCH: Final = 512

# -- flags ------------------------------------------------------------------------------------

_INIT_BITS: Final = (
    "ASYNC_READ", "POSIX_LOCKS", "FILE_OPS", "ATOMIC_O_TRUNC", "EXPORT_SUPPORT", "BIG_WRITES", "DONT_MASK",
    "SPLICE_WRITE", "SPLICE_MOVE", "SPLICE_READ", "FLOCK_LOCKS", "HAS_IOCTL_DIR", "AUTO_INVAL_DATA",
    "DO_READDIRPLUS", "READDIRPLUS_AUTO", "ASYNC_DIO", "WRITEBACK_CACHE", "NO_OPEN_SUPPORT", "PARALLEL_DIROPS",
    "HANDLE_KILLPRIV", "POSIX_ACL", "ABORT_ERROR", "MAX_PAGES", "CACHE_SYMLINKS", "NO_OPENDIR_SUPPORT",
    "EXPLICIT_INVAL_DATA", "MAP_ALIGNMENT", "SUBMOUNTS", "HANDLE_KILLPRIV_V2", "SETXATTR_EXT", "INIT_EXT",
    "INIT_RESERVED", "SECURITY_CTX", "HAS_INODE_DAX", "CREATE_SUPP_GROUP", "HAS_EXPIRE_ONLY",
    "DIRECT_IO_ALLOW_MMAP", "PASSTHROUGH", "NO_EXPORT_SUPPORT", "HAS_RESEND", "ALLOW_IDMAP", "OVER_IO_URING",
    "REQUEST_TIMEOUT",
)  # fmt: skip
#: INIT flags by name; bits from 32 up travel in ``flags2``.
INIT_FLAGS: Final[dict[str, int]] = {name: 1 << bit for bit, name in enumerate(_INIT_BITS)}
assert INIT_FLAGS["INIT_EXT"] == 1 << 30
assert INIT_FLAGS["PASSTHROUGH"] == 1 << 37
assert INIT_FLAGS["REQUEST_TIMEOUT"] == 1 << 42

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_LOCKOWNER: Final = 1 << 9
FATTR_CTIME: Final = 1 << 10
FATTR_KILL_SUIDGID: Final = 1 << 11

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

OPEN_KILL_SUIDGID: Final = 1 << 0
WRITE_CACHE: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0
SETXATTR_ACL_KILL_SGID: Final = 1 << 0

# -- structs ----------------------------------------------------------------------------------

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
HEAD: Final = struct.Struct("<IIQQ")  # the first four fields of IN_HEADER: all that most requests need
CALLER: Final = struct.Struct("<IIIH")  # uid gid pid total_extlen, at offset 24
CALLER_AT: Final = 24
OUT_HEADER: Final = struct.Struct("<IiQ")  # len error unique

ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
# ino size blocks atime mtime ctime | atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags
ENTRY_OUT: Final = struct.Struct("<QQQQII")  # nodeid generation entry_valid attr_valid (nsec twice); ATTR follows
ATTR_OUT: Final = struct.Struct("<QII")  # attr_valid attr_valid_nsec dummy; ATTR follows
FORGET_IN: Final = struct.Struct("<Q")  # nlookup
FORGET_ONE: Final = struct.Struct("<QQ")  # nodeid nlookup
BATCH_FORGET_IN: Final = struct.Struct("<II")  # count dummy; FORGET_ONE follow
GETATTR_IN: Final = struct.Struct("<IIQ")  # getattr_flags dummy fh
MKNOD_IN: Final = struct.Struct("<IIII")  # mode rdev umask padding; name
MKDIR_IN: Final = struct.Struct("<II")  # mode umask; name
RENAME_IN: Final = struct.Struct("<Q")  # newdir; two names
RENAME2_IN: Final = struct.Struct("<QII")  # newdir flags padding; two names
LINK_IN: Final = struct.Struct("<Q")  # oldnodeid; name
SETATTR_IN: Final = struct.Struct("<IIQQQQQQIIIIIIII")
# valid padding fh size lock_owner atime mtime ctime | atimensec mtimensec ctimensec mode unused4 uid gid unused5
OPEN_IN: Final = struct.Struct("<II")  # flags open_flags
CREATE_IN: Final = struct.Struct("<IIII")  # flags mode umask open_flags; name
OPEN_OUT: Final = struct.Struct("<QIi")  # fh open_flags backing_id
RELEASE_IN: Final = struct.Struct("<QIIQ")  # fh flags release_flags lock_owner
FLUSH_IN: Final = struct.Struct("<QIIQ")  # fh unused padding lock_owner
READ_IN: Final = struct.Struct("<QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN: Final = struct.Struct("<QQIIQII")  # fh offset size write_flags lock_owner flags padding; data
WRITE_OUT: Final = struct.Struct("<II")  # size padding
STATFS_OUT: Final = struct.Struct("<QQQQQIIII24x")  # blocks bfree bavail files ffree bsize namelen frsize padding
FSYNC_IN: Final = struct.Struct("<QII")  # fh fsync_flags padding
SETXATTR_IN: Final = struct.Struct("<IIII")  # size flags setxattr_flags padding; name, value (SETXATTR_EXT)
SETXATTR_COMPAT_IN: Final = struct.Struct("<II")  # size flags; name, value
GETXATTR_IN: Final = struct.Struct("<II")  # size padding; name (GETXATTR), nothing (LISTXATTR)
GETXATTR_OUT: Final = struct.Struct("<II")  # size padding
LK_IN: Final = struct.Struct("<QQQQIIII")  # fh owner (start end type pid) lk_flags padding
ACCESS_IN: Final = struct.Struct("<II")  # mask padding
INIT_IN: Final = struct.Struct("<IIIII44x")  # major minor max_readahead flags flags2
INIT_COMPAT_IN: Final = struct.Struct("<IIII")  # major minor max_readahead flags (before 7.36)
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHIIH22x")
# major minor max_readahead flags | max_background congestion_threshold | max_write time_gran
# max_pages map_alignment | flags2 max_stack_depth request_timeout
INTERRUPT_IN: Final = struct.Struct("<Q")  # unique
BMAP_IN: Final = struct.Struct("<QII")  # block blocksize padding
IOCTL_IN: Final = struct.Struct("<QIIQII")  # fh flags cmd arg in_size out_size
POLL_IN: Final = struct.Struct("<QQII")  # fh kh flags events
FALLOCATE_IN: Final = struct.Struct("<QQQII")  # fh offset length mode padding
DIRENT: Final = struct.Struct("<QQII")  # ino off namelen type; name, padded to 8
DIRENTPLUS: Final = struct.Struct("<QQQQII88sQQII")  # ENTRY_OUT, ATTR, DIRENT
LSEEK_IN: Final = struct.Struct("<QQII")  # fh offset whence padding
LSEEK_OUT: Final = struct.Struct("<Q")  # offset
COPY_FILE_RANGE_IN: Final = struct.Struct("<QQQQQQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
COPY_FILE_RANGE_OUT: Final = struct.Struct("<Q")  # bytes_copied
SYNCFS_IN: Final = struct.Struct("<Q")  # padding
STATX_IN: Final = struct.Struct("<IIQII")  # getattr_flags reserved fh sx_flags sx_mask
NOTIFY_INVAL_INODE_OUT: Final = struct.Struct("<Qqq")  # ino off len
NOTIFY_INVAL_ENTRY_OUT: Final = struct.Struct("<QII")  # parent namelen flags; name, NUL
NOTIFY_DELETE_OUT: Final = struct.Struct("<QQII")  # parent child namelen padding; name, NUL
NOTIFY_PRUNE_OUT: Final = struct.Struct("<IIQ")  # count padding spare; node ids
BACKING_MAP: Final = struct.Struct("<iIQ")  # fd flags padding

#: Name of a Struct above -> its size in the kernel's header, bytes.
SIZES: Final[dict[str, int]] = {
    "IN_HEADER": 40, "OUT_HEADER": 16, "ATTR": 88, "ENTRY_OUT": 128 - 88, "ATTR_OUT": 104 - 88, "FORGET_IN": 8,
    "FORGET_ONE": 16, "BATCH_FORGET_IN": 8, "GETATTR_IN": 16, "MKNOD_IN": 16, "MKDIR_IN": 8, "RENAME_IN": 8,
    "RENAME2_IN": 16, "LINK_IN": 8, "SETATTR_IN": 88, "OPEN_IN": 8, "CREATE_IN": 16, "OPEN_OUT": 16,
    "RELEASE_IN": 24, "FLUSH_IN": 24, "READ_IN": 40, "WRITE_IN": 40, "WRITE_OUT": 8, "STATFS_OUT": 80,
    "FSYNC_IN": 16, "SETXATTR_IN": 16, "SETXATTR_COMPAT_IN": 8, "GETXATTR_IN": 8, "GETXATTR_OUT": 8, "LK_IN": 48,
    "ACCESS_IN": 8, "INIT_IN": 64, "INIT_COMPAT_IN": 16, "INIT_OUT": 64, "INTERRUPT_IN": 8, "BMAP_IN": 16,
    "IOCTL_IN": 32, "POLL_IN": 24, "FALLOCATE_IN": 32, "DIRENT": 24, "DIRENTPLUS": 152, "LSEEK_IN": 24,
    "LSEEK_OUT": 8, "COPY_FILE_RANGE_IN": 56, "COPY_FILE_RANGE_OUT": 8, "SYNCFS_IN": 8, "STATX_IN": 24,
    "NOTIFY_INVAL_INODE_OUT": 24, "NOTIFY_INVAL_ENTRY_OUT": 16, "NOTIFY_DELETE_OUT": 24, "NOTIFY_PRUNE_OUT": 16,
    "BACKING_MAP": 16,
}  # fmt: skip
for _name, _size in SIZES.items():
    assert globals()[_name].size == _size, f"{_name}: {globals()[_name].size} bytes, the kernel has {_size}"

# -- ioctls of the device ---------------------------------------------------------------------

_IOW: Final = 1 << 30
DEV_IOC_BACKING_OPEN: Final = _IOW | BACKING_MAP.size << 16 | 229 << 8 | 1  # struct fuse_backing_map
DEV_IOC_BACKING_CLOSE: Final = _IOW | 4 << 16 | 229 << 8 | 2  # uint32_t
