"""`cowfs podman install`: what podman and buildah need to use the mount service and limits of single containers.

Strategy: files that are there in full or not at all, at the places where podman and systemd look, and no file of somebody else's is touched: what has to
stand in storage.conf and containers.conf is printed.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from cowfs.cli.common import Command
from cowfs.errors import AlreadyExists

if TYPE_CHECKING:
    import argparse

PARTS = ("program", "units")

PROGRAM = """\
#!{python} -ISE
# cowfs-overlayfs as a program that starts fast: made by `cowfs podman install`, which makes it anew.
import sys

sys.path.insert(0, {place!r})
try:
    from handover import main
except ImportError:
    sys.exit("cowfs-overlayfs: cowfs is not at {place} any more; run: cowfs podman install")
del sys.path[0]
sys.exit(main())
"""

SOCKET = """\
[Unit]
Description=cowfs: the socket of the mount service of podman and buildah

[Socket]
ListenStream={directory}/cowfs/mounts.socket
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"""

# Nothing here may install a seccomp filter, drop capabilities or make namespaces (RestrictRealtime=, LockPersonality=, SystemCallArchitectures=,
# NoNewPrivileges=, ProtectSystem=...): the service serves only whom it can equal.
SERVICE = """\
[Unit]
Description=cowfs: the mount service of podman and buildah
Documentation=man:cowfs(1)
Requires=cowfs-mounts.socket

[Service]
ExecStart={command} serve --mounts
# mounts are processes of their own, which a restart leaves alone
KillMode=process
Restart=on-failure
LimitNOFILE=1048576
TasksMax=infinity
# no sandbox (seccomp, capabilities, namespaces): the service serves only processes whose equal it can become
NoNewPrivileges=no

[Install]
Also=cowfs-mounts.socket
"""


class _File(NamedTuple):
    path: str
    text: str
    mode: int = 0o644


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=("install",), help="install: write the files, and print what to put into storage.conf")
    add("--only", choices=PARTS, action="append", default=[], help="only this part; repeated")
    add("--program", metavar="PATH", help="where the mount program goes (default: /usr/local/libexec/cowfs/cowfs-overlayfs,"
        " as an ordinary user ~/.local/libexec/cowfs/cowfs-overlayfs)")  # fmt: skip
    add("--force", action="store_true", help="overwrite files that have something else in them")


def _podman(args: argparse.Namespace) -> int:
    home = os.path.expanduser("~")
    root = os.geteuid() == 0
    base = "/usr/local" if root else f"{home}/.local"
    program = os.path.abspath(args.program or f"{base}/libexec/cowfs/cowfs-overlayfs")
    units = "/etc/systemd/system" if root else f"{home}/.config/systemd/user"
    parts = args.only or PARTS
    files = []
    if "program" in parts:
        files.append(_File(program, program_text(), 0o755))
    if "units" in parts:
        files.append(_File(f"{units}/cowfs-mounts.socket", SOCKET.format(directory="/run" if root else "%t")))
        files.append(_File(f"{units}/cowfs-mounts.service", SERVICE.format(command=_command())))
    for file in files:
        _write(file, force=args.force)
    if "units" in parts:
        print(
            f"systemctl {'' if root else '--user '}daemon-reload && systemctl {'' if root else '--user '}enable --now cowfs-mounts.socket"
        )
    if "program" in parts:
        where = "/etc" if root else "~/.config"
        print(f'# {where}/containers/storage.conf\n[storage.options.overlay]\nmount_program = "{program}"')
    return 0


def program_text() -> str:
    """The mount program, for this interpreter and this copy of cowfs."""
    return PROGRAM.format(python=sys.executable, place=os.path.dirname(os.path.abspath(__file__)))


def _command() -> str:
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "cowfs")
    return beside if os.access(beside, os.X_OK) and not os.path.isdir(beside) else f"{sys.executable} -m cowfs"


def _write(file: _File, *, force: bool) -> None:
    """Raises AlreadyExists: the file has something else in it, and ``force`` is off."""
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    if os.path.exists(file.path) and not force:
        with open(file.path, encoding="utf-8", errors="replace") as there:
            if there.read() != file.text:
                raise AlreadyExists(f"{file.path} has something else in it", remedy="--force overwrites it")
    fresh = f"{file.path}.{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
    with open(fd, "w", encoding="utf-8") as out:
        out.write(file.text)
        os.fchmod(fd, file.mode)
    os.rename(fresh, file.path)


COMMANDS = {
    "podman": Command(
        _configure,
        _podman,
        "Write what podman and buildah need for mounts in milliseconds: a mount program that starts fast, and systemd's units of the mount service\n"
        "(cowfs serve --mounts), for the system as root, else for this user. Prints what to put into storage.conf.",
        ("cowfs podman install", "cowfs podman install --only program --program ~/bin/cowfs-overlayfs"),
    ),
}
