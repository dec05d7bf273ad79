"""Extended attributes of a name in a directory, never following a symbolic link.

The *at forms of the xattr calls exist only since Linux 6.13, so names go through
``/proc/self/fd/DIRFD/NAME``: the magic link ends at the open directory even if its path has changed, and the last
component is not followed. With ``name == b""`` the descriptor's own object is meant, also for O_PATH descriptors, those
of symbolic links included; ``name is None`` means the object of an ordinary descriptor, which is quicker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable

# The errnos of "no such attribute", "no attributes here" and "not for this namespace".
_NONE = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM})
ABSENT = _NONE | {errno.EACCES}

try:
    from os import (
        XATTR_CREATE as CREATE,
        XATTR_REPLACE as REPLACE,
        getxattr as _getxattr,
        listxattr as _listxattr,
        removexattr as _removexattr,
        setxattr as _setxattr,
    )
except ImportError:  # Python was built without sys/xattr.h
    from cowfs.sys._xattr_package import (
        CREATE as CREATE,
        REPLACE as REPLACE,
        getxattr as _getxattr,
        listxattr as _listxattr,
        removexattr as _removexattr,
        setxattr as _setxattr,
    )


# getxattrat(2) of Linux 6.13, asked for sizes only: most questions here end in "no such attribute", and this is the
# cheap way to hear that (half the time of the path through /proc). The call keeps the interpreter's lock.
_GETXATTRAT, _LISTXATTRAT, _AT_SYMLINK_NOFOLLOW, _AT_FDCWD = 464, 465, 0x100, -100
_ask = ctypes.PyDLL(None, use_errno=True).syscall
_ask.restype = ctypes.c_long
_ask.argtypes = (
    ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t,
)  # fmt: skip
_size_only = ctypes.create_string_buffer(16)  # struct xattr_args: no buffer, size 0; never written to
_SIZE_ONLY = ctypes.addressof(_size_only)


def _can_ask() -> bool:
    """Whether the kernel has the call: old kernels answer ENOSYS, some sandboxes EPERM."""
    if _ask(_GETXATTRAT, _AT_FDCWD, b"/", _AT_SYMLINK_NOFOLLOW, b"user.cowfs.none", _SIZE_ONLY, 16) >= 0:
        return True
    return ctypes.get_errno() in (errno.ENODATA, errno.EOPNOTSUPP)


_CAN_ASK = _can_ask()


def at(dirfd: int, name: bytes | None) -> bytes | int:
    """The path under /proc that names ``name`` in the open directory ``dirfd``; a descriptor stands for itself."""
    if name is None:
        return dirfd
    return b"/proc/self/fd/%d/%b" % (dirfd, name) if name else b"/proc/self/fd/%d" % dirfd


def get(dirfd: int, name: bytes | None, attribute: bytes | str) -> bytes:
    """The value. Raises OSError: ENODATA when the object does not have it."""
    return _getxattr(at(dirfd, name), attribute, follow_symlinks=not name)


def try_get(dirfd: int, name: bytes | None, attribute: bytes | str) -> bytes | None:
    """The value, or ``None`` where the object or its file system does not have it.

    A user.* attribute of an object that its owner may not read exists all the same: the owner reads it with the mode lifted.
    On a stranger's unreadable object it counts as absent, since nothing can be known.
    """
    if (
        _CAN_ASK
        and name
        and attribute.__class__ is bytes
        and _ask(_GETXATTRAT, dirfd, name, _AT_SYMLINK_NOFOLLOW, attribute, _SIZE_ONLY, 16) < 0
        and ctypes.get_errno() in _NONE
    ):
        return None
    where = at(dirfd, name)
    try:
        return _getxattr(where, attribute, follow_symlinks=not name)
    except OSError as error:
        if error.errno in _NONE:
            return None
        if error.errno != errno.EACCES:
            raise
        denied = error
    found: list[bytes] = []
    try:
        _lifted(denied, where, name, lambda: found.append(_getxattr(where, attribute, follow_symlinks=not name)), _READ)
    except OSError as error:
        if error.errno not in (*_NONE, errno.EROFS):
            raise
    return found[0] if found else None


def has_none(dirfd: int, name: bytes) -> bool:
    """Whether the object certainly has no attribute that this process may see; False also where this cannot be known cheaply."""
    return _CAN_ASK and _ask(_LISTXATTRAT, dirfd, name, _AT_SYMLINK_NOFOLLOW, None, None, 0) == 0


def listx(dirfd: int, name: bytes | None) -> list[bytes]:
    """All names that this process may see; empty where the file system has none."""
    try:
        return [os.fsencode(n) for n in _listxattr(at(dirfd, name), follow_symlinks=not name)]
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise


def setx(dirfd: int, name: bytes | None, attribute: bytes | str, value: bytes, flags: int = 0) -> None:
    """Create or replace (``flags``: 0, CREATE or REPLACE)."""
    where = at(dirfd, name)
    try:
        _setxattr(where, attribute, value, flags, follow_symlinks=not name)
    except PermissionError as error:
        if not _lifted(error, where, name, lambda: _setxattr(where, attribute, value, flags, follow_symlinks=not name)):
            raise


def remove(dirfd: int, name: bytes | None, attribute: bytes | str) -> None:
    """Remove. Raises OSError: ENODATA when the object does not have it."""
    where = at(dirfd, name)
    try:
        _removexattr(where, attribute, follow_symlinks=not name)
    except PermissionError as error:
        if not _lifted(error, where, name, lambda: _removexattr(where, attribute, follow_symlinks=not name)):
            raise


_READ, _WRITE = 0o400, 0o200


def _lifted(
    error: OSError, where: bytes | int, name: bytes | None, access: Callable[[], None], bit: int = _WRITE
) -> bool:
    """Call a function that the owner's own mode forbids (user.* takes the permission ``bit``), with the mode lifted meanwhile.

    Returns whether it was called; a server without privilege keeps its marks on files that their owner may not read or write.
    """
    if error.errno != errno.EACCES:
        return False
    st = os.stat(where, follow_symlinks=not name)
    if st.st_uid != os.geteuid() or st.st_mode & bit or not (stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)):
        return False
    if name and isinstance(where, bytes):  # chmod(2) would follow a link put there meanwhile; a descriptor does not
        fd = os.open(where, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return _lifted(error, b"/proc/self/fd/%d" % fd, None, access, bit)
        finally:
            os.close(fd)
    os.chmod(where, stat.S_IMODE(st.st_mode) | bit)
    try:
        access()
    finally:
        os.chmod(where, stat.S_IMODE(st.st_mode))
    return True


def drop(dirfd: int, name: bytes | None, attribute: bytes | str) -> None:
    """Remove the attribute if the object has it. Raises OSError for any failure but its absence."""
    try:
        remove(dirfd, name, attribute)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise


def read_all(dirfd: int, name: bytes) -> dict[bytes, bytes]:
    """Every attribute with its value; one that vanishes meanwhile is left out."""
    found: dict[bytes, bytes] = {}
    for attribute in listx(dirfd, name):
        value = try_get(dirfd, name, attribute)
        if value is not None:
            found[attribute] = value
    return found
