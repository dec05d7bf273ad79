"""The user of a container's process, who must have a number on this host."""

from __future__ import annotations

from cowfs.sandbox import users
from cowfs.service.errors import ApiError
from cowfs.sys import host

__all__ = ["find_user"]


def find_user(root: int, text: str, more: list[str]) -> users.User:
    """The user that ``USER[:GROUP]`` names; arguments are those of :func:`cowfs.sandbox.users.find`.

    Raises:
        InvalidArgument: no such user or group there.
        ApiError: 400: it has a number that the daemon's user namespace does not have.
    """
    found = users.find(root, text, more)
    if not host.has_user(found.uid):
        raise ApiError(400, f"user {found.uid} has no number in this daemon's user namespace: {_REMEDY}")
    for gid in (found.gid, *found.groups):
        if not host.has_group(gid):
            raise ApiError(400, f"group {gid} has no number in this daemon's user namespace: {_REMEDY}")
    return found


_REMEDY = (
    "it has the ids of /etc/subuid and /etc/subgid (usermod --add-subuids, --add-subgids), if newuidmap is installed"
)
