"""`cowfs podman install`: what podman and buildah need to use the mount service and limits of single containers.

Strategy: files that are there in full or not at all, at the places where podman and systemd look, and no file of somebody else's is touched: what has to
stand in storage.conf and containers.conf is printed.
"""

from __future__ import annotations

import os
import sys

from cowfs._typed import TYPE_CHECKING, NamedTuple
from cowfs.cli.common import Command
from cowfs.errors import AlreadyExists, Unsupported

if TYPE_CHECKING:
    import argparse

PARTS = ("program", "units", "hook")

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


def _compiled() -> bytes:
    import shutil
    import subprocess
    import tempfile

    compiler = shutil.which("cc")
    if compiler is None:
        raise Unsupported("no C compiler (cc)", remedy="apt-get install gcc libc6-dev, or --kind python")
    here = os.path.dirname(os.path.abspath(__file__))
    values = {"PYTHON": sys.executable, "CODE": os.path.join(os.path.dirname(here), "__init__.py")}
    with tempfile.TemporaryDirectory() as place:
        made = os.path.join(place, "program")
        words = [f'-D{name}="{_quoted(value)}"' for name, value in values.items()]
        done = subprocess.run(
            [compiler, "-O2", "-s", *words, "-o", made, os.path.join(here, "handover.c")],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason given"]
            raise Unsupported(f"{compiler}: {said[0]}", remedy="--kind python")
        with open(made, "rb") as file:
            return file.read()


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def hook_text(program: str) -> str:
    """The hook of oci-hooks(5): called for containers that have one of our annotations.

    Runtimes differ in the environment that they give to a hook, so it is in here, with the place of control sockets.
    """
    import json

    names = ("PATH", "XDG_RUNTIME_DIR", "TMPDIR")
    hook = {
        "path": program,
        "args": [os.path.basename(program), "--limit-hook"],
        "env": [f"{name}={os.environ[name]}" for name in names if name in os.environ],
    }
    when = {"annotations": {r"^cowfs\.(size|inodes)$": ".*"}}
    return json.dumps({"version": "1.0.0", "hook": hook, "when": when, "stages": ["createRuntime"]}, indent=1) + "\n"


class _File(NamedTuple):
    path: str
    text: str | bytes
    mode: int = 0o644


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=("install",), help="install: write the files, and print what to put into storage.conf")
    add("--only", choices=PARTS, action="append", default=[], help="only this part; repeated")
    add("--program", metavar="PATH", help="where the mount program goes (default: /usr/local/libexec/cowfs/cowfs-overlayfs,"
        " as an ordinary user ~/.local/libexec/cowfs/cowfs-overlayfs)")  # fmt: skip
    add("--kind", choices=("auto", "c", "python"), default="auto", help="of the program: compiled by this host's C compiler (starts in less than a"
        " millisecond), Python (in about ten), or what there is (the default)")  # fmt: skip
    add("--hooks-dir", metavar="DIR", help="where the hook goes (default: /etc/containers/oci/hooks.d, as an ordinary user"
        " ~/.config/containers/oci/hooks.d)")  # fmt: skip
    add("--force", action="store_true", help="overwrite files that have something else in them")


def _podman(args: argparse.Namespace) -> int:
    home = os.path.expanduser("~")
    root = os.geteuid() == 0
    base = "/usr/local" if root else f"{home}/.local"
    path = os.path.abspath(args.program or f"{base}/libexec/cowfs/cowfs-overlayfs")
    units = "/etc/systemd/system" if root else f"{home}/.config/systemd/user"
    parts = args.only or PARTS
    files = []
    if "program" in parts:
        files.append(_File(path, program(args.kind), 0o755))
    if "units" in parts:
        files.append(_File(f"{units}/cowfs-mounts.socket", SOCKET.format(directory="/run" if root else "%t")))
        files.append(_File(f"{units}/cowfs-mounts.service", SERVICE.format(command=_command())))
    hooks = os.path.abspath(args.hooks_dir or ("/etc" if root else f"{home}/.config") + "/containers/oci/hooks.d")
    if "hook" in parts:
        files.append(_File(f"{hooks}/cowfs-limit.json", hook_text(path)))
    for file in files:
        _write(file, force=args.force)
    if "units" in parts:
        print(
            f"systemctl {'' if root else '--user '}daemon-reload && systemctl {'' if root else '--user '}enable --now cowfs-mounts.socket"
        )
    if "program" in parts:
        where = "/etc" if root else "~/.config"
        print(f'# {where}/containers/storage.conf\n[storage.options.overlay]\nmount_program = "{path}"')
    if "hook" in parts:
        where = "/etc" if root else "~/.config"
        print(f'# {where}/containers/containers.conf, if it names no hooks_dir yet\n[engine]\nhooks_dir = ["{hooks}"]')
        print("# then: podman run --annotation cowfs.size=2G --annotation cowfs.inodes=100k IMAGE")
    return 0


def program(kind: str) -> str | bytes:
    """The mount program, for this interpreter and this copy of cowfs.

    Args:
        kind: ``c``: compiled by the host's compiler; ``python``; ``auto``: compiled where there is one.

    Raises:
        Unsupported: ``c``, and it cannot be compiled.
    """
    if kind != "python":
        try:
            return _compiled()
        except Unsupported:
            if kind == "c":
                raise
    return PROGRAM.format(python=sys.executable, place=os.path.dirname(os.path.abspath(__file__)))


def _command() -> str:
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "cowfs")
    return beside if os.access(beside, os.X_OK) and not os.path.isdir(beside) else f"{sys.executable} -m cowfs"


def _write(file: _File, *, force: bool) -> None:
    """Raises AlreadyExists: the file has something else in it, and ``force`` is off."""
    data = file.text.encode() if isinstance(file.text, str) else file.text
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    if os.path.exists(file.path) and not force:
        with open(file.path, "rb") as there:
            if there.read() != data:
                raise AlreadyExists(f"{file.path} has something else in it", remedy="--force overwrites it")
    fresh = f"{file.path}.{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
    with open(fd, "wb") as out:
        out.write(data)
        os.fchmod(fd, file.mode)
    os.rename(fresh, file.path)


COMMANDS = {
    "podman": Command(
        _configure,
        _podman,
        "Write what podman and buildah need for mounts in milliseconds: a mount program that starts fast, systemd's units of the mount service\n"
        "(cowfs serve --mounts), and the hook that gives a container the limit of its annotations (podman run --annotation cowfs.size=2G ...); for the\n"
        "system as root, else for this user. Prints what to put into storage.conf and containers.conf.",
        ("cowfs podman install", "cowfs podman install --only program --program ~/bin/cowfs-overlayfs"),
    ),
}
