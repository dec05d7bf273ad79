"""`cowfs podman install`: the files that it writes, and a service that systemd starts by its socket."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import environment, one_line, run_module
from support.layers import Layer


def install(home: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_module("cowfs", "podman", "install", *arguments, env={**environment(), "HOME": str(home)})
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("kind", ["c", "python"])
def test_the_program_mounts_without_a_service(space: Path, mnt: Path, run_directory: Path, kind: str) -> None:
    if kind == "c" and shutil.which("cc") is None:
        pytest.skip("no C compiler (cc)")
    program = space / "bin/cowfs-overlayfs"
    told = install(space, "--only", "program", "--kind", kind, "--program", program).stdout
    assert f'mount_program = "{program}"' in told
    assert (program.read_bytes()[:4] == b"\x7fELF") is (kind == "c")
    Layer(space / "base").file("who", b"base")
    done = subprocess.run(
        [program, "-o", f"lowerdir={space / 'base'}", mnt],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (mnt / "who").read_text() == "base"


def test_without_a_compiler_the_program_is_python(space: Path) -> None:
    (space / "bin").mkdir()
    more = {"env": {**environment(), "PATH": str(space / "bin")}}
    words = ("podman", "install", "--only", "program", "--program", space / "p")
    assert run_module("cowfs", *words, **more).returncode == 0
    assert (space / "p").read_bytes().startswith(b"#!")
    done = run_module("cowfs", *words, "--kind", "c", "--force", **more)
    assert done.returncode != 0
    assert "no C compiler" in one_line(done)


def test_files_with_something_else_in_them_are_kept(space: Path) -> None:
    words = ("--only", "hook", "--program", "/p", "--hooks-dir", space / "hooks")
    install(space, *words)
    install(space, *words)
    path = space / "hooks/cowfs-limit.json"
    hook = json.loads(path.read_text())
    assert (hook["hook"]["path"], hook["stages"]) == ("/p", ["createRuntime"])
    path.write_text("mine")
    assert "--force" in one_line(
        run_module("cowfs", "podman", "install", *words, env={**environment(), "HOME": str(space)})
    )
    assert path.read_text() == "mine"
    install(space, *words, "--force")
    assert json.loads(path.read_text()) == hook


def test_a_socket_that_systemd_passes_is_served(
    space: Path, mnt: Path, run_directory: Path, request: pytest.FixtureRequest
) -> None:
    """As sd_listen_fds(3): descriptor 3, and LISTEN_PID of the process itself."""
    Layer(space / "base").file("who", b"base")
    listener = socket.socket(socket.AF_UNIX)
    request.addfinalizer(listener.close)
    listener.bind("/run/cowfs/mounts.socket")
    listener.listen()
    start = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.executable, [sys.executable, '-m', 'cowfs', 'serve', '--mounts'])"
    with subprocess.Popen(
        [sys.executable, "-c", start, str(listener.fileno())], env=environment(), pass_fds=[listener.fileno()]
    ) as service:
        try:
            done = run_module("cowfs.cli.handover", "-o", f"lowerdir={space / 'base'}", mnt)
            assert (done.returncode, done.stderr) == (0, "")
            found = json.loads(run_module("cowfs", "mounts", "--json").stdout)
            (pid,) = (each["pid"] for each in found if each["mountpoint"] == str(mnt))
            assert int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1]) == service.pid
        finally:
            service.kill()
    listener.close()
    os.unlink("/run/cowfs/mounts.socket")
    assert (mnt / "who").read_text() == "base"


def test_a_second_service_is_told_about_the_first(run_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("/run/cowfs/mounts.socket")
        listener.listen()
        done = run_module("cowfs", "serve", "--mounts")
    os.unlink("/run/cowfs/mounts.socket")
    assert done.returncode != 0
    assert "another process listens" in one_line(done)


def test_units_are_what_systemd_takes(space: Path) -> None:
    """As root they would go to /etc: an ordinary user's place is taken, by the same text."""
    from cowfs.cli import podman

    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    (space / "cowfs-mounts.socket").write_text(podman.SOCKET.format(directory="/run"))
    (space / "cowfs-mounts.service").write_text(podman.SERVICE.format(command=sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *space.glob("*.s*")], capture_output=True, text=True, check=False
    )
    assert "cowfs-mounts" not in done.stderr, done.stderr
