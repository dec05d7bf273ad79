"""systemd's side: the sockets that it passes (sd_listen_fds(3)), the state reported to it (sd_notify(3)), and units."""

from __future__ import annotations

import os
import socket
import sys

from cowfs.errors import AlreadyExists, InvalidArgument

__all__ = ["install", "listening", "notify"]

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
ListenStream=/run/cowfs/docker.sock
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"""

SERVICE = """\
[Unit]
Description=cowfs: copy-on-write storage and the containers that stand on it
Documentation=man:cowfs(1)
After=network-online.target
Wants=network-online.target
Requires=cowfs.socket

[Service]
Type=notify
ExecStart={command} serve -H fd://
ExecReload=kill -HUP $MAINPID
# containers and mounts are processes of their own, which a restart leaves alone
KillMode=process
Delegate=yes
Restart=on-failure
LimitNOFILE=1048576
TasksMax=infinity
# A namespace of its own for mounts (ProtectSystem=, PrivateTmp=...) would hide the containers' mounts from the host.
NoNewPrivileges=no
RestrictRealtime=yes
RestrictSUIDSGID=no
LockPersonality=yes
SystemCallArchitectures=native
ProtectClock=yes
ProtectHostname=no
UMask=0077

[Install]
WantedBy=multi-user.target
Also=cowfs.socket
"""


def install(directory: str = "/etc/systemd/system", *, force: bool = False) -> list[str]:
    """Write the units, and return their paths.

    Raises:
        AlreadyExists: a different unit exists, and ``force`` is off.
    """
    command = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "cowfs")
    if not os.access(command, os.X_OK):
        command = f"{sys.executable} -m cowfs"
    written = []
    os.makedirs(directory, exist_ok=True)
    for name, text in (("cowfs.socket", SOCKET), ("cowfs.service", SERVICE.format(command=command))):
        path = os.path.join(directory, name)
        if os.path.exists(path) and not force:
            with open(path, encoding="utf-8") as file:
                if file.read() != text:
                    raise AlreadyExists(f"{path} has something else in it", remedy="--force overwrites it")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        written.append(path)
    return written
