"""The daemon itself: options, doors, signals, one instance; and the first things that clients ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import Daemon, wait_for

Make = Callable[..., Daemon]


def cowfs(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cowfs", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("version", ["", "1.40", "1.44"])
def test_version_and_info(daemon: Daemon, version: str) -> None:
    more = {"DOCKER_API_VERSION": version} if version else {}
    told = json.loads(daemon.out("version", "--format", "{{json .}}", **more))
    assert told["Server"]["ApiVersion"] == "1.50"
    assert told["Client"]["ApiVersion"] == (version or told["Client"]["DefaultAPIVersion"])
    info = daemon.out("info", **more)
    assert "Storage Driver: " in info
    assert f"Docker Root Dir: {daemon.root}" in info


def test_docker_py(daemon: Daemon) -> None:
    docker = pytest.importorskip("docker")
    client = docker.DockerClient(base_url=f"unix://{daemon.socket}")
    try:
        assert client.ping()
        assert client.info()["Driver"] in ("overlay", "row", "vfs")
        assert client.volumes.list() == []
    finally:
        client.close()


def test_the_seeds_line_about_the_driver(make_daemon: Make, docker_command: str) -> None:
    """``docker info | grep "Storage Driver"``, and the choice of another driver."""
    daemon = make_daemon("--storage-driver", "row", "--storage-opt", "size=10G").start()
    done = subprocess.run(
        f'docker -H unix://{daemon.socket} info | grep "Storage Driver"',
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "Storage Driver: row"
    assert "Default Size: 10G" in daemon.out("info")


def test_what_is_not_offered_says_so(daemon: Daemon) -> None:
    for method, path in (("GET", "/swarm"), ("POST", "/build"), ("POST", "/networks/create"), ("PUT", "/volumes/x/y"),
                         ("POST", "/plugins/pull"), ("POST", "/session")):  # fmt: skip
        status, told = daemon.request(method, path)
        assert (status, told["message"][:21]) == (501, "cowfs does not offer "), path
    assert daemon.request("GET", "/nonsense")[0] == 404
    assert daemon.request("DELETE", "/version")[0] == 405


def test_versions_that_are_not_spoken(daemon: Daemon) -> None:
    assert "too new" in daemon.request("GET", "/v1.51/version")[1]["message"]
    assert "too old" in daemon.request("GET", "/v1.39/version")[1]["message"]
    assert daemon.request("GET", "/v1.40/version")[0] == 200


def test_ping_has_the_headers_that_clients_negotiate_by(daemon: Daemon) -> None:
    with daemon.raw() as sock:
        sock.sendall(b"HEAD /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while data := sock.recv(4096):
            answer += data
    head = answer.lower()
    assert head.startswith(b"http/1.1 200")
    assert b"api-version: 1.50" in head
    assert answer.endswith(b"\r\n\r\n")


def test_one_instance_for_a_store(make_daemon: Make, space: Path, short: Path) -> None:
    daemon = make_daemon().start()
    done = cowfs("serve", "--root", str(daemon.root), "--run-dir", str(short), "-H", f"unix://{space}/other.sock")
    assert done.returncode == 5
    assert f"process {daemon.pid}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_door_that_somebody_has_is_not_taken(make_daemon: Make, space: Path, short: Path) -> None:
    daemon = make_daemon().start()
    done = cowfs("serve", "--root", str(space / "s2"), "--run-dir", str(short), "-H", f"unix://{daemon.socket}")
    assert done.returncode == 5
    assert "listens" in done.stderr
    assert daemon.request("GET", "/_ping")[0] == 200


def test_a_stale_socket_is_replaced_and_the_mode_is_closed(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    daemon.stop(signal.SIGKILL)
    assert daemon.socket.exists()
    daemon.start()
    assert daemon.request("GET", "/_ping")[0] == 200
    assert daemon.socket.stat().st_mode & 0o777 == 0o600
    daemon.stop()
    assert not daemon.socket.exists()


def test_a_group_may_use_the_socket(make_daemon: Make) -> None:
    daemon = make_daemon("--group", "12345").start()
    assert (daemon.socket.stat().st_mode & 0o777, daemon.socket.stat().st_gid) == (0o660, 12345)
    done = cowfs("serve", "--root", str(daemon.root) + "2", "--group", "no-such-group")
    assert done.returncode == 3
    assert "no such group" in done.stderr


def test_several_doors(make_daemon: Make, docker_command: str) -> None:
    daemon = make_daemon("-H", "tcp://127.0.0.1:0").start()
    assert daemon.out("version", "--format", "{{.Server.Version}}", host=f"tcp://{daemon.tcp()}")
    assert daemon.out("version", "--format", "{{.Server.Version}}")


@pytest.mark.parametrize("door", ["tcp://0.0.0.0:0", "tcp://[::]:0"])
def test_an_open_door_is_refused(space: Path, door: str, short: Path) -> None:
    done = cowfs("serve", "--root", str(space / "s"), "--run-dir", str(short), "-H", door)
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert "root on this machine" in done.stderr


def test_insecure_says_what_it_does(make_daemon: Make) -> None:
    daemon = make_daemon("-H", "tcp://0.0.0.0:0", "--insecure").start()
    assert "lets anybody" in daemon.log


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-H", "http://x"], "no such kind of door"),
        (["-H", "tcp://127.0.0.1:notaport"], "no such port"),
        (["-H", "unix://relative"], "not an absolute path"),
        (["-H", "fd://"], "no socket was passed"),
        (["--log-level", "loud"], "no log level"),
        (["--storage-opt", "size"], "not KEY=VALUE"),
        (["--storage-opt", "size=big"], "not a size"),
        (["--storage-opt", "colour=red"], "no option colour"),
        (["--storage-driver", "zfs9"], "zfs9"),
        (["--tlsverify"], "--tlscacert"),
        (["--config", "/no/such/file.toml"], "no such file"),
    ],
)
def test_bad_options_are_one_line(space: Path, arguments: list[str], told: str, short: Path) -> None:
    done = cowfs("serve", "--root", str(space / "s"), "--run-dir", str(short), *arguments)
    assert done.returncode not in (0, 1)
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_the_environment_and_flags(make_daemon: Make, space: Path) -> None:
    """A flag beats the environment, that the file; what the file prints it can read."""
    file = space / "serve.toml"
    file.write_text('label = ["from=file"]\nlog_format = "json"\nstorage_driver = "vfs"\n')
    daemon = make_daemon(
        "--config", str(file), "--storage-driver", "row", environment={"COWFS_SERVE_LABEL": "from=environment"}
    ).start()
    assert json.loads(daemon.log.splitlines()[0])["level"] == "info"
    info = daemon.request("GET", "/info")[1]
    assert (info["Labels"], info["Driver"]) == (["from=environment"], "row")
    done = cowfs("serve", "--config", str(file), "--print-config")
    again = space / "again.toml"
    again.write_text(done.stdout)
    assert cowfs("serve", "--config", str(again), "--print-config").stdout == done.stdout
    assert 'storage_driver = "vfs"' in done.stdout


@pytest.mark.parametrize("text", ["nonsense = 1", "debug = 3", "host = 'x'", "host = [1]", "debug = ", "\x00"])
def test_a_bad_file_is_one_line(space: Path, text: str) -> None:
    file = space / "serve.toml"
    file.write_text(text)
    done = cowfs("serve", "--config", str(file), "--print-config")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(file) in done.stderr


def test_reload_takes_what_can_change_and_says_what_cannot(make_daemon: Make, space: Path) -> None:
    file = space / "serve.toml"
    file.write_text("")
    daemon = make_daemon("--config", str(file)).start()
    file.write_text('label = ["a=b"]\nmax_connections = 77\n')
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: "max_connections takes effect" in daemon.log, "the reload")
    assert daemon.request("GET", "/info")[1]["Labels"] == ["a=b"]
    file.write_text("nonsense = 1")
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: "not reloaded" in daemon.log, "the refusal")
    assert daemon.request("GET", "/info")[1]["Labels"] == ["a=b"]


def test_debug_mode_by_signal(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    daemon.request("GET", "/_ping")
    assert "/_ping" not in daemon.log
    os.kill(daemon.pid, signal.SIGUSR2)
    wait_for(lambda: "debug mode on" in daemon.log, "debug mode")
    daemon.request("GET", "/_ping")
    wait_for(lambda: "GET /_ping -> 200" in daemon.log, "the line")
    os.kill(daemon.pid, signal.SIGUSR1)
    wait_for(lambda: "thread cowfs-doors" in daemon.log, "the dump")


def test_secrets_are_not_in_the_log(make_daemon: Make) -> None:
    daemon = make_daemon("-D").start()
    with daemon.raw() as sock:
        body = b'{"Env": ["PASSWORD=hunter2"]}'
        sock.sendall(
            b"POST /containers/create HTTP/1.1\r\nHost: x\r\nX-Registry-Auth: hunter2\r\nAuthorization: hunter2\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        sock.recv(4096)
    wait_for(lambda: "/containers/create ->" in daemon.log, "the line")
    assert "hunter2" not in daemon.log


def test_a_run_directory_of_others_is_refused(space: Path, short: Path) -> None:
    """Sockets and bundles in it are obeyed: nobody else may put any there."""
    short.mkdir()
    short.chmod(0o777)
    link = short.parent / f"{short.name}-link"
    link.symlink_to(short)
    for place in (short, link):
        done = cowfs("serve", "--root", str(space / "s"), "--run-dir", str(place))
        assert done.returncode == 2
        assert "--run-dir" in done.stderr
    short.chmod(0o755)
    os.chown(short, 4321, 4321)
    assert cowfs("serve", "--root", str(space / "s"), "--run-dir", str(short)).returncode == 2


def test_the_store_is_shared_with_the_command(daemon: Daemon) -> None:
    done = cowfs("prepare", "work", "--root", str(daemon.root))
    assert done.returncode == 0, done.stderr
    assert daemon.request("GET", "/info")[1]["DriverStatus"][5] == ["Snapshots", "1"]


def test_it_stops_at_once_while_clients_read_streams(make_daemon: Make, docker_command: str) -> None:
    """A follower of the events neither holds up the end nor meets a store that was closed beneath it."""
    daemon = make_daemon("-D").start()
    with daemon.raw() as sock, daemon.raw() as other:
        for each in (sock, other):
            each.sendall(b"GET /events?since=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert each.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert daemon.stop() == 0
        rest = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert not rest.endswith(b"0\r\n\r\n")  # cut, and not "that was all"
    assert "Traceback" not in daemon.log


def _ping(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(15)
        client.connect(path)
        client.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        try:
            return client.recv(100)
        except ConnectionResetError:
            return b""


def test_no_thread_can_be_started_for_a_while(make_daemon: Make) -> None:
    """Clients are turned away, and served again afterwards."""
    daemon = make_daemon().start()
    assert b" 200 " in _ping(str(daemon.socket))
    assert daemon.process is not None
    pid = daemon.process.pid
    subprocess.run(["prlimit", f"--pid={pid}", "--as=20000000:unlimited"], check=True)
    try:
        assert b" 200 " not in _ping(str(daemon.socket))
    finally:
        subprocess.run(["prlimit", f"--pid={pid}", "--as=unlimited:unlimited"], check=True)
    wait_for(lambda: b" 200 " in _ping(str(daemon.socket)), "the daemon to answer")
