"""The mount service: whom it serves, and as what; nobody gets a right more."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import namespace, users
from support.command import ROOT, environment
from support.layers import Layer
from support.standby import CLIENT, HANDOVER, SOCKET, Service, ask, command, options, parent, refused, server_of

# -- whom it serves ----------------------------------------------------------------------------------------------------


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
found = map(int, open({f"/proc/{service.process.pid}/task/{service.process.pid}/children"!r}).read().split())
pid = next(each for each in found if open(f"/proc/{{each}}/cmdline").read().startswith("cowfs server"))
print(json.dumps([facts("self"), facts(pid), os.listdir("mnt"), pid]))
"""
    jail = tree / "jail"
    code = {Path(each).parts[1] for each in (sys.executable, os.path.realpath(sys.executable), HANDOVER)}
    shown = {"proc", "run", "usr", "lib", "lib64", "etc", "tmp", "dev"} | code
    (jail / "in").mkdir(parents=True)
    for name in shown:
        (jail / name).mkdir()
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
        for name in shown:
            namespace.umount(str(jail / name), namespace.MNT_DETACH)


def test_nothing_is_remembered_of_the_services_own_rights(tree: Path, service: Service) -> None:
    """A user namespace has no ``trusted.*`` and makes no devices; a server that thought otherwise failed at the first deletion."""
    script = f"""
import os, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
mnt = {str(tree / "mnt")!r}
os.unlink(mnt + "/who"); os.symlink("a", mnt + "/link"); os.mkdir(mnt + "/d"); os.rename(mnt + "/d", mnt + "/e")
open(mnt + "/f", "w").write("x")
print(sorted(os.listdir(mnt)))
subprocess.run(["umount", mnt], check=True)
"""
    words = ["unshare", "-U", "-r", "-m", sys.executable, "-c", script, *CLIENT, *options(tree)]
    done = subprocess.run(words, env=environment(), cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['e', 'f', 'link']\n"
    assert os.path.lexists(tree / "up/who"), "its whiteout"
    assert service.end() == ""


def test_only_what_stays_true_is_cached_for_good() -> None:
    """A child of the service becomes another process's equal: a fact about rights is ``host.remembered``, and forgotten then."""
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("sys", "format", "union", "fuse", "row", "mounting")
        for path in (ROOT / "cowfs" / folder).rglob("*.py")
        for before, line in itertools.pairwise(path.read_text().splitlines())
        if before.startswith(("@functools.cache", "@functools.lru_cache", "@cache", "@lru_cache"))
    }
    assert found == {"cowfs/row/map.py: def boot_id() -> bytes:", "cowfs/sys/process.py: def boot_id() -> str:"}


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
        status = 2
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
                ask(sock, nonce, options(tree))
            status = 0 if refused(sock) else 1
        finally:
            os._exit(status)
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
