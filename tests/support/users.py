"""Doing something as an ordinary user.

Two ways, for two questions. ``acting_as`` changes the effective ids of this process (all its
threads): what may this user do in a tree that somebody mounted? ``command_as`` wraps a command
line: what can this user mount? For the second, ``open_fuse_device`` binds a 0666 ``/dev/fuse``
and a permissive ``/etc/fuse.conf`` over the host's, inside the private namespace only.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import namespace

UID, GID = 4321, 4321
"""An ordinary user: no name, no capability, no other group."""
OTHER_UID, OTHER_GID = 4322, 4322


@contextmanager
def acting_as(uid: int = UID, gid: int = GID, groups: Sequence[int] = ()) -> Iterator[None]:
    """Effective ids of ``uid``, ``gid`` and ``groups`` within the block; needs root before."""
    before = os.getgroups()
    os.setgroups(list(groups))
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def command_as(command: Sequence[str], uid: int = UID, gid: int = GID) -> list[str]:
    """``command`` run with real ids of ``uid`` and no supplementary group."""
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--", *command]


def hand_over(place: Path, uid: int = UID) -> Path:
    """Give a directory below pytest's own to a user, who then can reach it."""
    for above in (place, *place.parents):  # pytest closes its own again whenever another session begins
        if above.stat().st_mode & 0o005 != 0o005:
            above.chmod(0o755)
    os.chown(place, uid, uid)
    return place


def open_fuse_device(base: Path) -> str | None:
    """Let everybody use /dev/fuse in this namespace. Returns why not, or None when it is so."""
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse on this host"
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed"
    if shutil.which("setpriv") is None:
        return "setpriv is not installed"
    node = base / "fuse"
    device = os.stat("/dev/fuse").st_rdev
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, device)
        node.chmod(0o666)
        os.close(os.open(node, os.O_RDWR))
        namespace.bind(str(node), "/dev/fuse")
        conf = base / "fuse.conf"
        conf.write_text("user_allow_other\n")
        if os.path.exists("/etc/fuse.conf"):
            namespace.bind(str(conf), "/etc/fuse.conf")
        passwd = base / "passwd"  # fusermount3 wants the user's name
        passwd.write_bytes(Path("/etc/passwd").read_bytes() + f"cowfs-test:x:{UID}:{GID}::/:/bin/sh\n".encode())
        namespace.bind(str(passwd), "/etc/passwd")
    except OSError as error:
        return f"cannot give everybody /dev/fuse: {error}"
    return None


def interpreter() -> tuple[str, dict[str, str]]:
    """A Python that an ordinary user can start, and the environment that lets it import cowfs.

    Our own, unless it lies where only root may look (a virtual environment over /root/.pyenv).
    """
    paths = [str(Path(__file__).parents[2])]
    for candidate in (sys.executable, "/usr/bin/python3"):
        environment = {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.environ.get("PATH", "/usr/bin:/bin")}
        try:
            done = subprocess.run(
                command_as([candidate, "-c", "import sys, cowfs; open(sys.executable, 'rb').close()"]),
                env=environment, cwd="/", capture_output=True, check=False,
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return candidate, environment
    pytest.skip("no Python that an ordinary user can start with cowfs in it")


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as the ordinary user; stdout and stderr as text."""
    python, base = interpreter()
    return subprocess.run(
        command_as([python, "-c", script]),
        env={**base, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
