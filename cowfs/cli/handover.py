"""`cowfs-overlayfs` as it is installed: hands its work to the mount service where one runs, and else does it itself.

Rule: nothing but built-in modules is imported before the service has declined, because Python's own start is all that this
program costs. So it knows the service's conversation by heart (:mod:`cowfs.mounting.standby` describes it), and can be run as a script by
``python -I -S -E``. Work that cannot be handed over, for any reason, is done here, as without a service; this part never fails on its own account.
"""

import _socket as socket
import posix
import sys

TYPE_CHECKING = False  # of typing, which would have to be imported
if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = b"1"
PATIENCE = 5.0
"""Seconds that a service has to answer; then it hangs, or the machine is so busy that nothing is gained."""


def places(environment: dict[bytes, bytes]) -> "Iterator[bytes]":
    """Paths where the service of this user may listen, as cowfs.mounting.protocol.directories has them."""
    user = posix.geteuid()
    if user == 0:
        yield b"/run/cowfs"
    if environment.get(b"XDG_RUNTIME_DIR"):
        yield environment[b"XDG_RUNTIME_DIR"] + b"/cowfs"
    outside = user
    try:
        fd = posix.open("/proc/self/uid_map", posix.O_RDONLY)
        for line in posix.read(fd, 4096).splitlines():
            first, other, count = map(int, line.split())
            if first <= user < first + count:
                outside = other + user - first
        posix.close(fd)
    except OSError:
        pass
    for owner in {outside: 0, user: 0}:
        yield (environment.get(b"TMPDIR") or b"/tmp") + b"/cowfs-%d" % owner


def connect(environment: dict[bytes, bytes]) -> tuple[socket.socket, bytes] | None:
    """A connection to a service of this user, and the nonce that it sent, or None."""
    status = posix.stat(__file__.rpartition("/")[0] + "/../__init__.py")
    code = b"%d:%d:%d" % (status.st_dev, status.st_ino, status.st_mtime_ns)
    for place in places(environment):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(place + b"/mounts.socket")
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if int.from_bytes(peer[4:8], sys.byteorder) == posix.geteuid():
                told = sock.recv(200).split()
                if len(told) == 4 and told[:3] == [b"cowfs-mounts", VERSION, code]:
                    sock.settimeout(None)
                    return sock, told[3]
        except OSError:
            pass
        sock.close()
    return None


def hand_over(words: list[str]) -> int | None:
    """Have a service do this. Returns the exit status, or None where none does."""
    if not {"-f", "-d", "--debug"}.isdisjoint(words):
        return None  # in the foreground
    try:
        for number in range(3):
            try:
                posix.fstat(number)
            except OSError:
                posix.open("/dev/null", posix.O_RDWR)  # the lowest free number
        environment = posix.environ
        found = connect(environment)
        if found is None:
            return None
        sock, nonce = found
        order = sys.byteorder
        encoding = sys.getfilesystemencoding()
        texts = [word.encode(encoding, "surrogateescape") for word in words]
        texts += [name + b"=" + value for name, value in environment.items()]
        body = b"".join(text + b"\0" for text in texts)
        numbers = (len(body), len(words), len(environment))
        head = nonce + b"".join(number.to_bytes(4, order) for number in numbers)
        streams = b"".join(number.to_bytes(4, order) for number in range(3))
        sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        sock.sendall(body)
        answer = sock.recv(16)
        sock.close()
        return int(answer) if answer else None
    except (OSError, ValueError):
        return None


def main() -> int:
    """Entry point of the command. Returns the exit status."""
    try:
        status = hand_over(["overlayfs", *sys.argv[1:]])
    except KeyboardInterrupt:
        return 130
    if status is not None:
        return status
    if sys.flags.no_site:  # as a script: now the interpreter with all that belongs to it
        posix.execv(sys.executable, [sys.executable, "-P", "-m", "cowfs.cli.overlayfs", *sys.argv[1:]])
    from cowfs.cli import overlayfs

    return overlayfs.main()


if __name__ == "__main__":
    sys.exit(main())
