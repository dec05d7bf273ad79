"""Users and groups of a container, from its own ``/etc/passwd`` and ``/etc/group``.

Rule: a stranger owns these files. They are opened beneath the container's root without following any link, only if they are
regular files, and no more than a mebibyte of them is read (CVE-2024-9676 and its kind).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from cowfs.errors import InvalidArgument
from cowfs.sys.files import open_beneath

__all__ = ["User", "find"]

MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """The user and groups of a process."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


def _lines(root: int, path: bytes) -> list[list[str]]:
    try:
        fd = open_beneath(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        data = b""
        while len(data) < MAX and (piece := os.read(fd, MAX - len(data))):
            data += piece
    finally:
        os.close(fd)
    return [line.split(":") for line in data.decode("utf-8", "replace").splitlines()]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and int(text) < 1 << 31 else None


def find(root: int, text: str, more: list[str]) -> User:
    """The user that ``USER[:GROUP]`` names.

    Args:
        root: descriptor of the container's root directory.
        text: names or numbers; "" is root.
        more: further groups.

    Raises:
        InvalidArgument: no such user or group there.
    """
    name, colon, group = (text or "0").partition(":")
    passwd = [line for line in _lines(root, b"etc/passwd") if len(line) >= 6 and _number(line[2]) is not None]
    groups = [line for line in _lines(root, b"etc/group") if len(line) >= 3 and _number(line[2]) is not None]
    number = _number(name)
    entry = next((line for line in passwd if line[0] == name), None)
    if entry is None and number is not None:
        entry = next((line for line in passwd if _number(line[2]) == number), None)
    if entry is None and number is None:
        raise InvalidArgument(f"unable to find user {name}: no matching entries in passwd file")
    uid = int(entry[2]) if entry is not None else number or 0
    gid = _number(entry[3]) or 0 if entry is not None else 0
    if colon and group:
        gid = _group(groups, group)
    member_of = (
        [int(line[2]) for line in groups if entry is not None and entry[0] in line[-1].split(",")] if not group else []
    )
    extra = [_group(groups, each) for each in more]
    return User(
        uid=uid,
        gid=gid,
        groups=tuple(dict.fromkeys([*member_of, *extra])),
        home=(entry[5] if entry is not None else "") or "/",
    )


def _group(groups: list[list[str]], text: str) -> int:
    found = next((int(line[2]) for line in groups if line[0] == text), None)
    found = _number(text) if found is None else found
    if found is None:
        raise InvalidArgument(f"unable to find group {text}: no matching entries in group file")
    return found
