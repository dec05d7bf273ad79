"""The mount service: whom it serves, as what, and that the command works the same without it, or with a bad one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import mounts, namespace, users
from support.command import ROOT, environment
from support.layers import Layer

from cowfs.mounting import standby

HANDOVER = ROOT / "cowfs/cli/handover.py"
SOCKET = f"/run/cowfs/{standby.NAME}"


@pytest.fixture
def run_directory(can_mount: None) -> Iterator[Path]:
    """A /run/cowfs of this test's own."""
    path = Path("/run/cowfs")
    namespace.mount("tmpfs", str(path), "tmpfs", 0, "mode=700")
    yield path
    mounts.umount_busy(str(path), 5.0)


class Service:
    """`cowfs serve --mounts` as root, of one copy of the package."""

    def __init__(self, root: Path = ROOT) -> None:
        variables = {**environment(), "PYTHONPATH": f"{root}:{environment()['PYTHONPATH']}"}
        self.told = Path("/run/cowfs/told")
        with self.told.open("wb") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cowfs", "serve", "--mounts"], env=variables, cwd="/", stderr=told
            )
        end = time.monotonic() + 60
        while not listens():
            assert self.process.poll() is None, "the service ended"
            assert time.monotonic() < end
            time.sleep(0.02)

    @property
    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> str:
        """Kill it; what it wrote."""
        self.process.kill()
        self.process.wait()
        return self.told.read_text()


def listens() -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(SOCKET)
        except OSError:
            return False
    return True


@pytest.fixture
def service(run_directory: Path) -> Iterator[Service]:
    service = Service()
    yield service
    service.end()


@pytest.fixture
def tree(space: Path, run_directory: Path) -> Iterator[Path]:
    Layer(space / "base").file("who", b"base")
    for name in ("up", "work", "mnt"):
        (space / name).mkdir()
    yield space
    while os.path.ismount(space / "mnt"):
        mounts.umount_busy(str(space / "mnt"), 0.0)


def options(tree: Path, more: str = "") -> list[str]:
    return ["-o", f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'}{more}", str(tree / "mnt")]


def command(*arguments: object, before: tuple[str, ...] = (), **more: object) -> subprocess.CompletedProcess[str]:
    """The command as installed: the script that hands over."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [*before, sys.executable, "-I", "-S", "-E", str(HANDOVER), *map(str, arguments)],
        **{"env": environment(), "cwd": "/", "capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL, **more},  # type: ignore[call-overload]
    )  # fmt: skip
    return done


def server_of(tree: Path) -> int:
    """The process that serves the mount."""
    found = subprocess.run(
        [sys.executable, "-m", "cowfs", "mounts", "--json"], env=environment(), capture_output=True, check=True
    )
    return int(next(each["pid"] for each in json.loads(found.stdout) if each["mountpoint"] == str(tree / "mnt")))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


# -- the same as without -----------------------------------------------------------------------------------------------


def test_a_mount_is_served_by_a_child_of_the_service(tree: Path, service: Service) -> None:
    done = command(*options(tree))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tree / "mnt/who").read_text() == "base"
    (tree / "mnt/new").write_text("1")
    assert parent(server_of(tree)) == service.process.pid
    assert os.path.basename(os.readlink(f"/proc/{server_of(tree)}/fd/2")).endswith(".log")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("-o", "lowerdir=/nowhere", "{mnt}"),
        ("-o", "lowerdir={base},size=many", "{mnt}"),
        ("-o", "lowerdir={base},unheard-of=1", "/nowhere"),
        ("-o", "lowerdir={base}"),
        ("-o", "remount,ro", "{mnt}"),
        ("-o", "lowerdir=base:\udcff,upperdir=\u00fc", "{mnt}"),
        (),
    ],
)
def test_output_and_status_are_those_of_the_command_alone(
    tree: Path, arguments: tuple[str, ...], run_directory: Path
) -> None:
    words = [word.format(base=tree / "base", mnt=tree / "mnt") for word in arguments]

    def outcome() -> tuple[int, str, str]:
        done = command(*words, cwd=tree, errors="surrogateescape")
        return done.returncode, done.stdout, done.stderr

    alone = outcome()
    service = Service()
    try:
        assert outcome() == alone
    finally:
        assert service.end() == ""  # it refused none


def test_in_the_foreground_the_command_serves_itself(tree: Path, service: Service) -> None:
    for flags in (["-f"], ["-d"], ["-o", "debug"]):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", HANDOVER, *flags, *options(tree)],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while not os.path.ismount(tree / "mnt"):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        assert server_of(tree) == process.pid
        subprocess.run(["umount", tree / "mnt"], check=True)
        assert process.wait(60) == 0


def test_relative_paths_and_environment_are_the_clients(tree: Path, service: Service, tmp_path: Path) -> None:
    done = command(
        "-o", "lowerdir=base,upperdir=up,workdir=work", "mnt", cwd=tree, env={**environment(), "MARK": "of the client"}
    )
    assert done.returncode == 0, done.stderr
    assert (tree / "mnt/who").exists()


def test_limits_of_resources_are_the_clients(tree: Path, service: Service) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    done = command(*options(tree), before=("prlimit", "--fsize=1048576:1048576", "--nofile=300:400", "--"))
    assert done.returncode == 0, done.stderr
    pid = server_of(tree)
    assert parent(pid) == service.process.pid
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (1 << 20, 1 << 20)
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (400, 400)


def test_a_hundred_at_once(tree: Path, service: Service) -> None:
    """More than the socket's queue and the machine have room for; each is mounted, whoever does it."""
    points = [tree / f"m{i}" for i in range(100)]
    for point in points:
        point.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", HANDOVER, "-o", f"lowerdir={tree / 'base'}", point], env=environment()
        )
        for point in points
    ]
    assert [process.wait(120) for process in running] == [0] * 100
    assert all((point / "who").read_text() == "base" for point in points)
    for point in points:
        subprocess.run(["umount", point], check=True)


# -- a service that is not what it should be ---------------------------------------------------------------------------


def test_a_killed_service_disturbs_no_mount(tree: Path, service: Service) -> None:
    assert command(*options(tree)).returncode == 0
    service.end()
    (tree / "mnt/after").write_text("x")
    assert (tree / "mnt/after").read_text() == "x"
    other = tree / "other"
    other.mkdir()
    assert command("-o", f"lowerdir={tree / 'base'}", other).returncode == 0, "its socket is still there"
    assert (other / "who").exists()
    subprocess.run(["umount", other], check=True)
    subprocess.run(["umount", tree / "mnt"], check=True)
    assert (tree / "up/after").read_text() == "x"


def hello(nonce: bytes = b"0123456789abcdef", code: str | None = None) -> bytes:
    return b"cowfs-mounts 1 %s %s\n" % ((code or standby.code()).encode(), nonce)


BAD: dict[str, Callable[[socket.socket], None]] = {
    "says nothing and closes": lambda sock: None,
    "another program": lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "another version of the conversation": lambda sock: sock.sendall(hello().replace(b"mounts 1", b"mounts 2")),
    "other code": lambda sock: sock.sendall(hello(code="1:2:3")),
    "dies when it was asked": lambda sock: (sock.sendall(hello()), sock.recv(10), None)[2],
    "dies with the question read": lambda sock: (sock.sendall(hello()), time.sleep(0.3), sock.recv(1 << 20), None)[3],
    "answers nonsense": lambda sock: (sock.sendall(hello()), sock.recv(1 << 20), sock.sendall(b"what\n"))[2],
}


@pytest.mark.parametrize("name", BAD)
def test_with_a_bad_service_the_command_does_it_itself(tree: Path, name: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen()
    pid = os.fork()
    if pid == 0:
        sock, _ = listener.accept()
        try:
            BAD[name](sock)
        finally:
            os._exit(0)
    listener.close()
    done = command(*options(tree))
    os.waitpid(pid, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tree / "mnt/who").read_text() == "base"


def test_a_service_that_hangs_is_waited_for_only_so_long(tree: Path, service: Service) -> None:
    service.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    done = command(*options(tree))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin > 4
    assert (tree / "mnt/who").read_text() == "base"
    service.process.send_signal(signal.SIGCONT)


def test_the_socket_of_another_user_is_not_asked(tree: Path, run_directory: Path) -> None:
    """An ordinary user who could make a socket where root looks would be told what root mounts."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chmod(run_directory, 0o777)
        os.setuid(users.UID)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(SOCKET)
        listener.listen()
        os.write(told, b"x")
        sock, _ = listener.accept()
        try:
            sock.sendall(hello())
            os._exit(0 if refused(sock) else 1)
        finally:
            os._exit(0)
    os.read(ready, 1)
    done = command(*options(tree))
    assert done.returncode == 0, done.stderr
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "something was told"


def test_a_service_of_another_version_executes_the_new_one(tree: Path, run_directory: Path, tmp_path: Path) -> None:
    """The file of the version replaced, as pip does: the next question is answered by the new code, in the same process; mounts go on."""
    for name in ("cowfs", "drivers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    handover = tmp_path / "cowfs/cli/handover.py"
    service = Service(tmp_path)
    try:
        first = command(*options(tree), before=())
        assert first.returncode == 0
        assert parent(server_of(tree)) != service.process.pid, "the client of another copy is served by itself"
        subprocess.run(["umount", tree / "mnt"], check=True)

        def mount() -> None:
            words = [sys.executable, "-I", "-S", "-E", str(handover), *options(tree)]
            done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            assert parent(server_of(tree)) == service.process.pid

        mount()
        version = tmp_path / "cowfs/__init__.py"
        (tmp_path / "new").write_text(version.read_text().replace('"0.1.0"', '"9.9.9"'))
        os.rename(tmp_path / "new", version)
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-E", str(handover), "--version"],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert "9.9.9" in done.stdout
        assert (tree / "mnt/who").read_text() == "base"
        subprocess.run(["umount", tree / "mnt"], check=True)
        mount()
    finally:
        service.end()


def test_a_client_that_is_killed_takes_its_mount_with_it(tree: Path, service: Service) -> None:
    """Nobody would unmount it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(SOCKET)
        nonce = sock.recv(200).split()[3]
        ask(sock, nonce, options(tree))
        sock.shutdown(socket.SHUT_RDWR)
    end = time.monotonic() + 30
    while service.children and time.monotonic() < end:
        time.sleep(0.05)
    assert service.children == []
    assert not os.path.ismount(tree / "mnt")


# -- whom it serves ----------------------------------------------------------------------------------------------------


def ask(sock: socket.socket, nonce: bytes, arguments: list[str], **wrong: object) -> None:
    """Send a question as the command does; ``wrong``: parts of it replaced."""
    body = b"".join(os.fsencode(word) + b"\0" for word in ["overlayfs", *arguments]) + b"PATH=/usr/bin:/bin\0"
    head = standby.HEADER.pack(
        nonce, int(str(wrong.get("size", len(body)))), int(str(wrong.get("words", len(arguments) + 1))), 1
    )
    fds = struct.pack("=3i", 0, 1, 2)[: int(str(wrong.get("fds", 12)))]
    sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
    sock.sendall(body)


def served(service: Service, tree: Path, before: tuple[str, ...]) -> bool:
    """Mount by a command after some words; whether the service did it. Either way it must be there."""
    done = command(*options(tree), before=before)
    assert done.returncode == 0, done.stderr
    by_service = bool(service.children)
    for pid in service.children:
        os.kill(pid, signal.SIGTERM)
    return by_service


@pytest.mark.parametrize(
    ("before", "equal"),
    [
        ((), True),
        (("setpriv", "--no-new-privs"), False),
        (("setpriv", "--bounding-set=-net_raw"), False),
        (("setpriv", "--groups=4"), False),
        (("unshare", "-m", "--propagation", "private"), True),
        (("unshare", "-n", "-i", "-u", "-C"), True),
        (("unshare", "-p", "-f"), False),
        (("unshare", "-U", "-r", "-m"), True),
    ],
)
def test_it_serves_whose_equal_it_can_become(
    tree: Path, service: Service, before: tuple[str, ...], equal: bool
) -> None:
    assert served(service, tree, before) is equal


def test_the_server_has_what_its_client_has(tree: Path, service: Service) -> None:
    """Namespaces, root and credentials of a client in namespaces of its own, with a root of its own."""
    script = f"""
import json, os, subprocess, sys
os.chroot({str(tree / "jail")!r}); os.chdir("/in")
subprocess.run(sys.argv[1:], check=True)
def facts(pid):
    status = [l for l in open(f"/proc/{{pid}}/status") if l.startswith(("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp:"))]
    return status, {{n: os.readlink(f"/proc/{{pid}}/ns/{{n}}") for n in os.listdir("/proc/self/ns")}}, os.stat(f"/proc/{{pid}}/root").st_ino
pid = int(open({f"/proc/{service.process.pid}/task/{service.process.pid}/children"!r}).read())
print(json.dumps([facts("self"), facts(pid), os.listdir("mnt"), pid]))
"""
    jail = tree / "jail"
    for name in ("proc", "run", "usr", "lib", "lib64", "etc", "tmp", "dev", "in"):
        (jail / name).mkdir(parents=True)
    for name in ("proc", "run", "usr", "lib", "lib64", "etc", "tmp", "dev"):
        namespace.mount(f"/{name}", str(jail / name), None, namespace.MS_BIND | namespace.MS_REC)
    for name in ("up", "work", "mnt"):
        (jail / "in" / name).mkdir()
    Layer(jail / "in/base").file("who", b"jailed")
    words = [sys.executable, "-I", "-S", "-E", str(HANDOVER), "-o", "lowerdir=base,upperdir=up,workdir=work", "mnt"]
    try:
        done = subprocess.run(
            ["unshare", "-U", "-r", "-m", "-i", "-u", sys.executable, "-c", script, *words],
            env=environment(), cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ours, theirs, found, pid = json.loads(done.stdout)
        assert ours == theirs
        assert found == ["who"]
        os.kill(pid, signal.SIGTERM)
    finally:
        for name in ("proc", "run", "usr", "lib", "lib64", "etc", "tmp", "dev"):
            namespace.umount(str(jail / name), namespace.MNT_DETACH)


def test_a_process_with_fewer_rights_gets_no_more(tree: Path, service: Service) -> None:
    """Root without CAP_SYS_ADMIN, as in a container that got hold of the socket: it cannot mount, with the service or without."""
    weak = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all")
    done = command(*options(tree), before=weak)
    assert done.returncode != 0
    assert not os.path.ismount(tree / "mnt")
    assert "CapEff" in service.end()


def test_another_users_question_is_not_even_read(tree: Path, service: Service, run_directory: Path) -> None:
    """Where the socket was opened to everybody by mistake."""
    os.chmod(run_directory, 0o755)
    os.chmod(SOCKET, 0o777)
    with users.acting_as(), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(SOCKET)
        assert sock.recv(100) == b""


def refused(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "wrong",
    [{"size": 1}, {"size": 1 << 31}, {"words": 0}, {"words": 99}, {"fds": 0}, {"fds": 4}, {"fds": 8}],
    ids=str,
)
def test_a_question_that_is_none_is_refused(tree: Path, service: Service, wrong: dict[str, int]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(SOCKET)
        nonce = sock.recv(200).split()[3]
        try:
            ask(sock, nonce, options(tree), **wrong)
            sock.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass
        assert refused(sock)
    assert not os.path.ismount(tree / "mnt")
    assert command(*options(tree)).returncode == 0
    assert parent(server_of(tree)) == service.process.pid


def test_a_question_without_the_nonce_is_refused(tree: Path, service: Service) -> None:
    """Sent before the service said it, by a process that may be gone and whose number another has since."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(SOCKET)
        ask(sock, b"0" * 16, options(tree))
        sock.recv(200)
        assert refused(sock)
    assert not os.path.ismount(tree / "mnt")


def test_a_question_of_another_process_than_connected_is_refused(tree: Path, service: Service) -> None:
    """A connection that was handed on: whose rights would count?"""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(SOCKET)
    nonce = sock.recv(200).split()[3]
    pid = os.fork()
    if pid == 0:
        ask(sock, nonce, options(tree))
        os._exit(0 if refused(sock) else 1)
    sock.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not os.path.ismount(tree / "mnt")


def test_clients_that_say_nothing_hold_nobody_up(tree: Path, service: Service) -> None:
    silent = []
    for _ in range(20):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(SOCKET)
        silent.append(sock)
    assert command(*options(tree)).returncode == 0
    assert parent(server_of(tree)) == service.process.pid
    for sock in silent:
        sock.close()


def test_nothing_is_imported_for_a_mount(tree: Path, service: Service) -> None:
    """A module imported after the fork would come from the client's mount namespace, and cost each mount."""
    script = f"""
import os, sys
from cowfs.cli import standby, overlayfs
from cowfs.mounting import server
standby._import_all()
before = set(sys.modules)
class Told(server.Report):
    def send(self, message, before_close=None):
        os.write(1, repr((sorted(set(sys.modules) - before), message)).encode() + b"\\n")
        return super().send(message, before_close)
def serve(spec):
    server.serve(spec, Told(os.dup(1)))
overlayfs.main({options(tree)!r}, serve)
"""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    words = [sys.executable, "-S", "-c", script]
    with subprocess.Popen(
        words, env={**environment(), "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("([], {'pid'")
        subprocess.run(["umount", tree / "mnt"], check=True)
