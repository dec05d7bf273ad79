"""The mount service: the command works the same with it, without it, and with a bad one."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import users
from support.command import ROOT, environment
from support.standby import CLIENT, SOCKET, Service, ask, both, command, options, parent, refused, server_of

from cowfs.mounting import standby

# -- the same as without -----------------------------------------------------------------------------------------------


@both
def test_a_mount_is_served_by_a_child_of_the_service(tree: Path, service: Service) -> None:
    done = command(*options(tree))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tree / "mnt/who").read_text() == "base"
    (tree / "mnt/new").write_text("1")
    assert parent(server_of(tree)) == service.process.pid
    assert os.path.basename(os.readlink(f"/proc/{server_of(tree)}/fd/2")).endswith(".log")


@both
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


@both
def test_in_the_foreground_the_command_serves_itself(tree: Path, service: Service) -> None:
    for flags in (["-f"], ["-d"], ["-o", "debug"]):
        process = subprocess.Popen(
            [*CLIENT, *flags, *options(tree)],
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


@both
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


@both
def test_a_hundred_at_once(tree: Path, service: Service) -> None:
    """More than the socket's queue and the machine have room for; each is mounted, whoever does it."""
    points = [tree / f"m{i}" for i in range(100)]
    for point in points:
        point.mkdir()
    running = [
        subprocess.Popen([*CLIENT, "-o", f"lowerdir={tree / 'base'}", str(point)], env=environment())
        for point in points
    ]
    assert [process.wait(120) for process in running] == [0] * 100
    assert all((point / "who").read_text() == "base" for point in points)
    for point in points:
        subprocess.run(["umount", point], check=True)


# -- a service that is not what it should be ---------------------------------------------------------------------------


@both
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


def waiting(pid: int) -> list[int]:
    """Children of a service that wait for a connection."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if not Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"cowfs server")]


def test_a_killed_service_leaves_no_process_but_servers(tree: Path, service: Service) -> None:
    assert command(*options(tree)).returncode == 0
    server, idle = server_of(tree), waiting(service.process.pid)
    assert idle
    service.end()
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in idle):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert os.path.exists(f"/proc/{server}")


@both
def test_kills_at_any_moment_cost_no_mount(tree: Path, service: Service) -> None:
    """Of the service, or of the children that wait or are about to mount, while commands mount."""
    chance, stop = random.Random(20261128), threading.Event()
    services = [service]

    def kill() -> None:
        while not stop.wait(chance.uniform(0.02, 0.4)):
            current = services[-1]
            if chance.random() < 0.4:
                current.end()
                services.append(Service())
                continue
            try:
                os.kill(chance.choice(waiting(current.process.pid)), signal.SIGKILL)
            except (OSError, IndexError):
                pass

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for number in range(15):
            done = command(*options(tree))
            assert (done.returncode, done.stderr) == (0, "")
            (tree / f"mnt/{number}").write_text("kept")
            subprocess.run(["umount", tree / "mnt"], check=True)
    finally:
        stop.set()
        killer.join()
        for each in services:
            each.end()
    assert {path.read_text() for path in (tree / "up").iterdir()} == {"kept"}
    assert len(list((tree / "up").iterdir())) == 15


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


@both
@pytest.mark.parametrize("name", BAD)
def test_with_a_bad_service_the_command_does_it_itself(tree: Path, name: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen()
    pid = os.fork()
    if pid == 0:
        try:
            sock, _ = listener.accept()
            BAD[name](sock)
        finally:
            os._exit(0)
    listener.close()
    done = command(*options(tree))
    os.waitpid(pid, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tree / "mnt/who").read_text() == "base"


@both
def test_a_service_that_hangs_is_waited_for_only_so_long(tree: Path, service: Service) -> None:
    service.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    done = command(*options(tree))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin > 4
    assert (tree / "mnt/who").read_text() == "base"
    service.process.send_signal(signal.SIGCONT)


@both
def test_the_socket_of_another_user_is_not_asked(tree: Path, run_directory: Path) -> None:
    """An ordinary user who could make a socket where root looks would be told what root mounts."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chmod(run_directory, 0o777)
            os.setuid(users.UID)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(SOCKET)
            listener.listen()
            os.write(told, b"x")
            sock, _ = listener.accept()
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
