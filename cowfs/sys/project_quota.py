"""Project quotas of a host file system: whether they are there and enforced. Asking changes nothing and needs no privilege.

Source of numbers and structs: Linux ``include/uapi/linux/quota.h`` and ``dqblk_xfs.h``; quotactl(2), quotactl_fd(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from cowfs.sys import files
from cowfs.sys._libc import syscall

__all__ = ["why_not"]

_QUOTACTL_FD = 443  # on every architecture but alpha
_PROJECT = 2  # PRJQUOTA
_Q_GETINFO = 0x800005
_Q_XGETQSTATV = ord("X") << 8 | 8
_ENFORCED = 1 << 5  # FS_QUOTA_PDQ_ENFD
_ROOM = 256  # more than struct if_dqinfo (24 bytes) and struct fs_quota_statv (160 bytes)


def why_not(fd: int) -> str:
    """The reason why no project quota can hold on the file system of an open file; "" where they are enforced."""
    name = files.fs_name(fd)
    try:
        _ask(fd, _Q_GETINFO)
        (flags,) = struct.unpack_from("=H", _ask(fd, _Q_XGETQSTATV), 2)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return f"the kernel has none for {name}" if _has_call() else "quotactl_fd needs Linux 5.14"
        if error.errno == errno.EINVAL:
            return f"{name} has quotas, but none of projects"
        if error.errno == errno.ESRCH:
            return f"{name} is mounted without prjquota" + _needs(name)
        return f"{name}: {os.strerror(error.errno or 0)}"
    return "" if flags & _ENFORCED else f"{name} counts projects, but enforces no limit: it is mounted without prjquota"


def _ask(fd: int, command: int) -> bytes:
    answer = ctypes.create_string_buffer(_ROOM)
    answer[0] = b"\x01"  # FS_QSTATV_VERSION1, which the caller of Q_XGETQSTATV gives; Q_GETINFO writes only
    syscall(_QUOTACTL_FD, fd, command << 8 | _PROJECT, 0, answer)
    return answer.raw


def _has_call() -> bool:
    try:
        syscall(_QUOTACTL_FD, -1, _Q_GETINFO << 8 | _PROJECT, 0, None)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def _needs(name: str) -> str:
    if name != "ext4":
        return ""
    return ", which wants mkfs.ext4 -O quota,project and a kernel with CONFIG_QFMT_V2"
