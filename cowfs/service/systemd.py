"""systemd's side: the sockets that it passes (sd_listen_fds(3)), the state reported to it (sd_notify(3)), and units."""

from __future__ import annotations

import os
import shutil
import socket
import sys

from cowfs.errors import AlreadyExists, InvalidArgument, Unsupported

__all__ = ["directory_of_units", "install", "listening", "notify"]

FIRST = 3
"""SD_LISTEN_FDS_START."""


def listening() -> list[socket.socket]:
    """The listening sockets that were passed to this process; the environment is cleared of them.

    Raises:
        InvalidArgument: there is none.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or not int(count):
        raise InvalidArgument("fd:// but no socket was passed", remedy="start it by systemd's cowfs.socket")
    sockets = []
    for fd in range(FIRST, FIRST + int(count)):
        os.set_inheritable(fd, False)
        sockets.append(socket.socket(fileno=fd))
    return sockets


def notify(state: str) -> None:
    """Notify systemd, if it asks for it: ``READY=1``, ``RELOADING=1``, ``STOPPING=1``..."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            pass  # the notification is optional


SOCKET = """\
[Unit]
Description=cowfs: the socket that Docker's clients use

[Socket]
ListenStream={runtime}/cowfs/docker.sock
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"""

SERVICE = """\
[Unit]
Description=cowfs: copy-on-write storage and the containers that stand on it
Documentation=man:cowfs(1)
{order}Requires=cowfs.socket

[Service]
Type=notify
ExecStart={command} serve -H fd://
ExecReload=kill -HUP $MAINPID
# containers and mounts are processes of their own, which a restart leaves alone
KillMode=process
Delegate=yes
Restart=on-failure
{limits}# A namespace of its own for mounts (ProtectSystem=, PrivateTmp=...) would hide the containers' mounts from the host. Filters of system
# calls (ProtectHostname=, RestrictRealtime=, SystemCallArchitectures=, NoNewPrivileges=...) would be those of every container, too: none
# could have a name, or a program of 32 bits. Containers have a filter of their own.
UMask=0077

[Install]
WantedBy={target}
Also=cowfs.socket
"""

_OF_ROOT = {
    "runtime": "/run",
    "order": "After=network-online.target\nWants=network-online.target\n",
    "limits": "LimitNOFILE=1048576\nTasksMax=infinity\n",
    "target": "multi-user.target",
}
_OF_USER = {"runtime": "%t", "order": "", "limits": "", "target": "default.target"}


def directory_of_units(*, user: bool) -> str:
    """Where systemd looks for the units of an administrator, or of this user (systemd.unit(5))."""
    if not user:
        return "/etc/systemd/system"
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(home, "systemd", "user")


def install(directory: str, *, user: bool = False, force: bool = False) -> list[str]:
    """Write the units, and return their paths.

    Args:
        user: those of an ordinary user's own service manager.

    Raises:
        AlreadyExists: a different unit exists, and ``force`` is off.
        Unsupported: this user may not write there.
    """
    words = {**(_OF_USER if user else _OF_ROOT), "command": _command()}
    written = []
    try:
        os.makedirs(directory, exist_ok=True)
        for name, text in (("cowfs.socket", SOCKET.format(**words)), ("cowfs.service", SERVICE.format(**words))):
            path = os.path.join(directory, name)
            if not force and os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    if file.read() != text:
                        raise AlreadyExists(f"{path} has something else in it", remedy="--force overwrites it")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            written.append(path)
    except OSError as error:
        remedy = "--user writes the units of an ordinary user" if not user else ""
        raise Unsupported(f"{error.filename or directory}: {error.strerror}", remedy=remedy) from None
    return written


def _command() -> str:
    """The command line of this very cowfs, quoted for a unit (systemd.service(5), "Command lines")."""
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "cowfs")
    words = [beside] if shutil.which(beside) else [sys.executable, "-m", "cowfs"]
    return " ".join(
        _quoted(word) for word in words
    )  # the program is the only word with letters of others: there $ is plain


def _quoted(word: str) -> str:
    safe = word.replace("%", "%%")
    if all(each.isalnum() or each in "/._-+%$" for each in safe):
        return safe
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'
