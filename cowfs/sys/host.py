"""The rights of this process on this host: privilege, capabilities, user namespace."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    _T = TypeVar("_T")

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID = 0, 1, 2, 3, 4
CAP_SYS_ADMIN, CAP_SYS_RESOURCE, CAP_MKNOD, CAP_SETFCAP = 21, 24, 27, 31


_REMEMBERED: list[Callable[[], None]] = []


def _status(field: str) -> str:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    return ""


def is_root_here() -> bool:
    """Effective uid 0 in this user namespace."""
    return os.geteuid() == 0


def remembered(function: Callable[[], _T]) -> Callable[[], _T]:
    """Ask once for a fact about this process's rights; :func:`forget` is for a process whose rights have changed since."""
    cached = functools.cache(function)
    _REMEMBERED.append(cached.cache_clear)
    return cached


def forget() -> None:
    """Forget what was remembered of this process's rights: it has joined a user namespace, say."""
    for clear in _REMEMBERED:
        clear()


@remembered
def init_userns() -> bool:
    """Whether this is the initial user namespace (its map is the identity over all ids)."""
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


@remembered
def has_many_ids() -> bool:
    """Whether this is a user namespace, not the initial one, in which more than one id is known."""
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as file:
            return not init_userns() and sum(int(line.split()[2]) for line in file) > 1
    except (OSError, ValueError):
        return False


def id_maps() -> tuple[str, str]:
    """The maps of this process's user namespace, as the kernel writes them; "" where /proc is out of sight."""
    found = []
    for name in ("uid_map", "gid_map"):
        try:
            with open(f"/proc/self/{name}", encoding="utf-8") as file:
                found.append(file.read())
        except OSError:
            found.append("")
    return found[0], found[1]


def outer_uid() -> int:
    """This process's effective user id outside of its user namespace; the id inside where that is unknown."""
    uid = os.geteuid()
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as file:
            for inside, outside, count in (map(int, line.split()) for line in file):
                if inside <= uid < inside + count:
                    return outside + uid - inside
    except (OSError, ValueError):
        pass
    return uid


def has_user(number: int) -> bool:
    """Whether a user has a number in this process's user namespace."""
    return _has(id_maps()[0], number)


def has_group(number: int) -> bool:
    """Whether a group has a number in this process's user namespace."""
    return _has(id_maps()[1], number)


def _has(id_map: str, number: int) -> bool:
    rows = [line.split() for line in id_map.splitlines()]
    return not rows or any(int(row[0]) <= number < int(row[0]) + int(row[2]) for row in rows)


def has_cap(number: int) -> bool:
    """Whether the effective set holds capability ``number``."""
    return bool(int(_status("CapEff") or "0", 16) >> number & 1)


def can_trusted_xattr() -> bool:
    """``trusted.*`` needs CAP_SYS_ADMIN in the initial user namespace (xattr(7))."""
    return init_userns() and has_cap(CAP_SYS_ADMIN)
