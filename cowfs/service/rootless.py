"""The daemon of an ordinary user: a user namespace in which this user is root, and a mount namespace of its own.

Strategy. The daemon's process moves there before it has a thread, so doors, store, mounts, supervisors and the OCI runtime
are all in one namespace, and containers need none of their own. Ids are those of /etc/subuid and /etc/subgid by newuidmap(1), else the
user's own alone.

The namespaces live as long as a process in them, and containers outlive the daemon. So the next daemon joins them: their mount
namespace has a mark, a small mount with a random name, and any process that sees it leads there. Where none is left, neither is
anything that a new namespace would hide.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator

from cowfs.archive import ApplyOptions
from cowfs.errors import Unsupported
from cowfs.sandbox import subids
from cowfs.sys import host, mounts, namespaces
from cowfs.sys.atomic import write_file

__all__ = ["apply_options", "enter", "has_many_ids", "is_rootless", "join"]

_RECORD = "namespace.json"
_PLACE = "namespace"
_USER = "/proc/self/ns/user"
_FLAGS = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC


def is_rootless() -> bool:
    """Whether this process is root of a user namespace only, or nobody's root."""
    return not host.init_userns() or os.geteuid() != 0


def has_many_ids() -> bool:
    """Whether this process's user namespace has more ids than one."""
    return sum(int(line.split()[2]) for line in host.id_maps()[0].splitlines()) > 1


def apply_options() -> ApplyOptions:
    """How layers of images are unpacked: in a user namespace devices, and owners without a number there, are left out, as in Docker's."""
    return ApplyOptions(owners="ignore" if is_rootless() else "fail")


def enter(run_dir: str) -> str:
    """Move this process, of an ordinary user and with one thread, into the namespaces of its daemon.

    Args:
        run_dir: exists, and is the user's own.

    Returns:
        Why the ids of /etc/subuid are not there; "" where they are.

    Raises:
        Unsupported: the kernel makes no user namespaces for this user.
    """
    if join(run_dir):
        return "" if has_many_ids() else "the namespace of before has one id"
    problem, before, own = "", os.readlink(_USER), (os.geteuid(), os.getegid())
    try:
        subids.enter(follow=True)
    except Unsupported as error:
        problem = str(error)
        if os.readlink(_USER) == before:
            subids.enter_with_own()
        else:  # newuidmap refused the maps: no_new_privs, say, or overlapping ranges
            namespaces.map_one(*own)
            host.forget()
    _mark(run_dir)
    return problem


def _mark(run_dir: str) -> None:
    token = f"cowfs-{secrets.token_hex(16)}"
    place = os.path.join(run_dir, _PLACE)
    os.makedirs(place, mode=0o700, exist_ok=True)
    mounts.mount(token, place, "tmpfs", _FLAGS, "size=4096,nr_inodes=1,mode=700")
    record = {"token": token, "mnt": os.readlink("/proc/self/ns/mnt")}
    write_file(os.path.join(run_dir, _RECORD), json.dumps(record).encode(), durable=False)


def join(run_dir: str) -> bool:
    """Move this process, with one thread, into the namespaces that a daemon has left, if a process is still there. Returns whether it has."""
    try:
        with open(os.path.join(run_dir, _RECORD), encoding="utf-8") as file:
            record = json.load(file)
        token, space = str(record["token"]), str(record["mnt"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    here, before = os.getcwd(), os.readlink(_USER)
    for pid in _processes():
        fds: list[int] = []
        try:
            if os.readlink(f"/proc/{pid}/ns/mnt") != space:
                continue
            fds = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("user", "mnt")]
            with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="replace") as file:
                is_marked = any(f" {token} " in line for line in file)
            if not is_marked or os.readlink(f"/proc/{pid}/ns/mnt") != space:
                continue
            for fd in fds:
                namespaces.join_by(fd)
        except OSError:  # it ends at this moment, or is another's
            if os.readlink(_USER) != before:
                raise
            continue
        finally:
            for fd in fds:
                os.close(fd)
        host.forget()
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        try:
            os.chdir(here)
        except OSError:
            os.chdir("/")
        return True
    return False


def _processes() -> Iterator[int]:
    """The processes that may be of this user, the newest first: a mount's server or a supervisor is younger than the session."""
    uid = os.geteuid()
    for name in sorted((each for each in os.listdir("/proc") if each.isdecimal()), key=int, reverse=True):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid and int(name) != os.getpid():
                yield int(name)
        except OSError:
            continue
