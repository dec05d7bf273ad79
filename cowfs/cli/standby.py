"""`cowfs serve --mounts`: the mount service that the commands of podman and buildah hand their work to.

Strategy. The command executes a bare interpreter that imports what a mount's server may ever need, and nothing of the command: what is there before the
fork is shared by all servers, and nothing is imported in the mount namespace of somebody else.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import socket
import sys

from cowfs._typed import NoReturn
from cowfs.errors import CowfsError, InvalidArgument
from cowfs.mounting import standby

_FIRST = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_IDLE = 600.0
"""Seconds after which a service that systemd starts on demand ends."""
_PAD = " " * 1024  # room for what ps shows of a server
_FOLDERS = ("sys", "format", "fuse", "mounting", "row", "union")
_PROGRAMS = {"overlayfs": "cowfs.cli.overlayfs:handed_over"}


def start(path: str) -> NoReturn:
    """Be the mount service: at a socket of this user, or at the one that systemd passes; this process's program is replaced.

    Args:
        path: the socket; "" for the usual one of this user.

    Raises:
        FailedPrecondition: another process listens there.
        InvalidArgument: not a path of a socket.
    """
    passed = _passed()
    if passed is None:
        try:
            if path:
                os.makedirs(os.path.dirname(path := os.path.abspath(path)), mode=0o700, exist_ok=True)
            sock = standby.open_socket(path := path or standby.address())
        except OSError as error:
            raise InvalidArgument(f"no socket can be made at {path}: {error.strerror}") from None
        _execute(sock, path)
    _execute(passed, "")


def _passed() -> socket.socket | None:
    """The socket that systemd passes (sd_listen_fds(3))."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return None
    if count != "1":
        raise InvalidArgument(f"{count} sockets were passed; a mount service has one")
    return socket.socket(fileno=_FIRST)


def _execute(sock: socket.socket, path: str) -> NoReturn:
    """Replace this program by the service's own."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    places = os.pathsep.join([root, *(place for place in sys.path if place and os.pathsep not in place)])
    fd = os.dup(sock.fileno())  # which is inherited
    os.set_inheritable(fd, True)
    program = "from cowfs.cli.standby import main; main()"
    os.execve(
        sys.executable,
        [sys.executable, "-S", "-P", "-c", program, str(fd), path, _PAD],
        {**os.environ, "PYTHONPATH": places},
    )


def main() -> NoReturn:
    """The service's own program; its arguments are the socket's descriptor and path."""
    fd, path = int(sys.argv[1]), sys.argv[2]
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    os.chdir("/")
    _import_all()
    service = standby.Standby(
        sock,
        path,
        {name: _load(place) for name, place in _PROGRAMS.items()},
        _rehearse,
        lambda: _execute(sock, path),
        None if path else _IDLE,
    )
    service.run()
    sys.exit(0)


def _rehearse() -> None:
    """Go the way of a mount as far as nothing is changed by it: pages shared with the service are copied now, and not while a client waits."""
    from cowfs.cli import overlayfs
    from cowfs.mounting.assemble import make_view
    from cowfs.mounting.resources import Stack
    from cowfs.mounting.server import Server

    try:
        server = Server(overlayfs.spec_of(["-o", f"lowerdir={os.path.dirname(os.path.abspath(__file__))},ro", "/"]))
        stack = Stack.open(server.spec)
        make_view(stack).close()
        stack.close()
    except (CowfsError, OSError):
        pass  # it only takes longer then


def _load(place: str) -> standby.Program:
    module, _, name = place.partition(":")
    found: standby.Program = vars(importlib.import_module(module))[name]
    return found


def _import_all() -> None:
    """Everything that a server may import later; then what is there is kept from the garbage collector, so that it stays shared."""
    import gc

    for name in (
        "json",
        "shutil",
        "subprocess",
        "traceback",
        "encodings.ascii",
        "encodings.idna",
        "cowfs.cli.overlayfs",
        "cowfs.cli.mount",
        "cowfs.cli.oci_hook",
    ):
        importlib.import_module(name)
    for folder in _FOLDERS:
        package = importlib.import_module(f"cowfs.{folder}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                importlib.import_module(found.name)
            except ImportError:
                pass  # the front end of a library that is not installed
    gc.collect()
    gc.freeze()
