"""A user namespace in which an ordinary user has many ids: its own as root, and the ranges that the host's administrator gave it.

Source: subuid(5), subgid(5), newuidmap(1). Their set-id programs write the maps, since the kernel lets nobody else map ids that are not
his own. Rule: they are started from outside of the namespace, by a process forked before it is made.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from contextlib import suppress

from cowfs._typed import NamedTuple
from cowfs.errors import Unsupported
from cowfs.sys import host, mounts, namespaces

__all__ = ["Range", "enter", "enter_with_own", "ranges", "try_enter"]


class Range(NamedTuple):
    """Ids of the host from ``first`` on."""

    first: int
    length: int


def ranges(path: str, uid: int) -> list[Range]:
    """The ranges of a user in a file of the form of subuid(5); none where the file cannot be read."""
    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        names = {str(uid)}
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                parts = line.strip().split(":")
                if len(parts) == 3 and parts[0] in names and parts[1].isdecimal() and parts[2].isdecimal():
                    found.append(Range(int(parts[1]), int(parts[2])))
    except OSError:
        pass
    return [each for each in found if each.length]


def enter(*, follow: bool = False) -> None:
    """Move this process, which has one thread, into such a namespace, with a mount namespace of its own.

    Args:
        follow: the host's mounts of later on are seen, too; without, none is.

    Raises:
        Unsupported: the user has no ranges, there is no newuidmap, or the kernel makes no user namespaces.
    """
    uid, gid = os.geteuid(), os.getegid()
    words = _all_words(uid, gid)
    problem = _unshare(words)
    if problem:
        raise Unsupported(problem, remedy="cowfs doctor says how")
    _become_root(follow=follow)


def try_enter() -> bool:
    """:func:`enter` where this user has ranges and the programs are there; else nothing happens. Whether it did.

    Where newuidmap(1) fails (it is not set-uid, say) this process has one id in its namespace, as without ranges.

    Raises:
        OSError: a namespace was made, but this process has no rights in it.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        words = _all_words(uid, gid)
        problem = _unshare(words)
    except (Unsupported, OSError):
        return False
    if problem:
        namespaces.map_one(uid, gid)
    _become_root()
    return not problem


def _all_words(uid: int, gid: int) -> list[list[str]]:
    return [
        _words("newuidmap", uid, ranges("/etc/subuid", uid), "/etc/subuid"),
        _words("newgidmap", gid, ranges("/etc/subgid", uid), "/etc/subgid"),
    ]


def _unshare(words: list[list[str]]) -> str:
    """Make the namespaces and have the maps written; why that failed, "" where it did not.

    Raises:
        Unsupported: the kernel makes none.
    """
    made, makes = os.pipe()
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = b"the maps cannot be written"
        try:
            os.close(makes)
            if os.read(made, 1):
                status = _write_maps(words, os.getppid())
        finally:
            os.write(tells, status or b"+")
            os._exit(0)
    os.close(tells)
    try:
        namespaces.unshare(namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
        os.write(makes, b"1")
        problem = os.read(told, 1 << 12).decode(errors="replace")
    except OSError as error:
        raise Unsupported(f"no user namespace can be made: {error.strerror}", remedy="cowfs doctor says how") from None
    finally:
        for fd in (made, makes, told):
            os.close(fd)
        os.waitpid(pid, 0)
    return "" if problem == "+" else problem


def _become_root(*, follow: bool = False) -> None:
    host.forget()
    with suppress(PermissionError):  # one group, and no right to set others
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    if not follow:  # the kernel has made them slaves of the host's: mount_namespaces(7)
        mounts.make_private()


def enter_with_own() -> None:
    """The same with the user's own id alone, as root: no program of others is needed for that.

    Raises:
        Unsupported: the kernel makes no user namespaces.
    """
    try:
        namespaces.become_root()
    except OSError as error:
        raise Unsupported(f"no user namespace can be made: {error.strerror}", remedy="cowfs doctor says how") from None


def _words(program: str, own: int, given: list[Range], path: str) -> list[str]:
    """The words of newuidmap(1) behind the number of the process."""
    found = shutil.which(program)
    if found is None:
        raise Unsupported(f"there is no {program}", remedy="apt-get install uidmap")
    if not given:
        name = path.rpartition("/")[2]
        raise Unsupported(
            f"{path} has no range for this user", remedy=f"as root: usermod --add-{name}s 100000-165535 USER"
        )
    words, inside = ["0", str(own), "1"], 1
    for each in given:
        words += [str(inside), str(each.first), str(each.length)]
        inside += each.length
    return [found, *words]


def _write_maps(words: list[list[str]], pid: int) -> bytes:
    for program, *numbers in words:
        done = subprocess.run([program, str(pid), *numbers], capture_output=True, check=False)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{program} failed".encode()
    return b""
