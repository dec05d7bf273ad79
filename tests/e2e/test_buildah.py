"""Debian's buildah with ``cowfs-overlayfs`` as its mount program: as root and as an ordinary user.

An image of three layers is built from a Debian root, packages installed in one of them; it is run,
pushed to an OCI layout, and read back there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hostfs, mounts, namespace, users

from cowfs.sys.mounts import mountinfo

pytestmark = pytest.mark.slow

UID = GID = 46_431
"""A user of this test's own: it gets a name and ranges of ids."""

CONTAINERFILE = """FROM scratch
ADD root.tar /
RUN apt-get -qq -o APT::Sandbox::User=root update && apt-get -qq -o APT::Sandbox::User=root -y --no-install-recommends install hello bc
RUN rm -rf /usr/share/doc && mkdir /usr/share/doc && echo kept >/usr/share/doc/note && mv /usr/share/perl5 /usr/share/perl5-moved && chmod 4755 /usr/bin/bc
"""


@pytest.fixture(scope="module")
def context(root_tar: Path, public_directory: Path) -> Iterator[Path]:
    """A build context: the root without devices (an ordinary user makes none), and the recipe."""
    if not any(mount.target == b"/" for mount in mountinfo()):
        pytest.skip("in a chroot: containers/storage must make / private, and the kernel makes no user namespace there")
    for program in ("buildah", "skopeo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    base = hostfs.make_tmpfs(public_directory, "6g", "buildah")
    unpacked = base / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-C", str(unpacked), "--exclude=./dev/*", "-xf", str(root_tar)], check=True)
    if Path("/etc/resolv.conf").exists():
        (unpacked / "etc/resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())
    (base / "context").mkdir()
    subprocess.run(["tar", "-C", str(unpacked), "-cf", str(base / "context" / "root.tar"), "."], check=True)
    shutil.rmtree(unpacked)
    (base / "context" / "Containerfile").write_text(CONTAINERFILE)
    (base / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    yield base
    mounts.umount_busy(str(base))


def mount_program(base: Path, python: str, path: str) -> Path:
    """The command ``cowfs-overlayfs`` of this tree, with a log of its calls."""
    program = base / f"cowfs-overlayfs-{os.urandom(2).hex()}"
    log = program.with_suffix(".log")
    log.touch()
    log.chmod(0o666)
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\nPYTHONPATH={shlex.quote(path)} exec {shlex.quote(python)} -m cowfs.cli.overlayfs "$@"\n'
    )
    program.chmod(0o755)
    return program


class Buildah:
    """Calls of buildah with a storage of its own."""

    def __init__(self, base: Path, name: str, program: Path, prefix: list[str], environment: dict[str, str]) -> None:
        self.store = base / name
        self.prefix, self.environment = prefix, environment
        self.options = [
            "--root", str(self.store / "root"), "--runroot", str(self.store / "run"), "--storage-driver", "overlay",
            "--storage-opt", f"overlay.mount_program={program}",
        ]  # fmt: skip
        self.policy = ["--signature-policy", str(base / "policy.json")]
        self.log = program.with_suffix(".log")

    def __call__(self, *arguments: str, check: bool = True) -> str:
        verb, rest = arguments[0], arguments[1:]
        done = subprocess.run(
            [*self.prefix, "buildah", *self.options, verb, *rest],
            env=self.environment, cwd="/", capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        output = done.stdout + done.stderr
        if any(
            word in output for word in ("Temporary failure resolving", "Could not connect to", "Unable to connect to")
        ):
            pytest.skip(f"no package mirror: {output.strip().splitlines()[-1]}")
        assert done.returncode == 0 or not check, f"buildah {' '.join(arguments)}\n{output[-3000:]}"
        return done.stdout


def build_run_push(buildah: Buildah, base: Path, layout: Path) -> None:
    """The whole life of an image."""
    buildah("bud", *buildah.policy, "--isolation", "chroot", "--layers", "-t", "three", str(base / "context"))
    container = buildah("from", *buildah.policy, "--pull-never", "three").strip()
    assert buildah("run", "--isolation", "chroot", container, "--", "hello") == "Hello, world!\n"
    assert buildah("run", "--isolation", "chroot", container, "--", "sh", "-c", "echo 6*7 | bc") == "42\n"
    assert buildah("run", "--isolation", "chroot", container, "--", "cat", "/usr/share/doc/note") == "kept\n"
    assert buildah("run", "--isolation", "chroot", container, "--", "ls", "/usr/share/doc") == "note\n"
    assert buildah("run", "--isolation", "chroot", container, "--", "stat", "-c", "%a", "/usr/bin/bc") == "4755\n"
    buildah(
        "run",
        "--isolation",
        "chroot",
        container,
        "--",
        "sh",
        "-c",
        "rm -rf /usr/share/doc; ln -s /etc /usr/share/doc; touch /new",
    )
    assert "new" in buildah("run", "--isolation", "chroot", container, "--", "ls", "/")
    buildah("commit", *buildah.policy, "--rm", container, "four")
    buildah("push", *buildah.policy, "four", f"oci:{layout}:four")
    inspected = json.loads(
        subprocess.run(["skopeo", "inspect", f"oci:{layout}:four"], check=True, capture_output=True, text=True).stdout
    )
    assert len(inspected["Layers"]) == 4
    last = (
        inspected["LayersData"][-1]["Digest"].removeprefix("sha256:")
        if "LayersData" in inspected
        else inspected["Layers"][-1][7:]
    )
    listed = subprocess.run(
        ["tar", "tzf", str(layout / "blobs" / "sha256" / last)], check=True, capture_output=True, text=True
    ).stdout
    assert {"new", "usr/share/doc"} <= {line.strip("/") for line in listed.splitlines()}
    calls = buildah.log.read_text()
    assert "lowerdir=" in calls
    assert "upperdir=" in calls


def test_as_root(context: Path) -> None:
    program = mount_program(context, sys.executable, os.pathsep.join(p for p in sys.path if p))
    buildah = Buildah(context, "store-root", program, [], dict(os.environ))
    build_run_push(buildah, context, context / "oci-root")
    assert mounted_below(buildah.store) == []


@pytest.fixture
def named_user(ordinary_user: int, context: Path) -> Iterator[Path]:
    """The ordinary user gets a name, a home and ranges of ids, in this mount namespace only."""
    for program in ("newuidmap", "newgidmap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    home = context / "home"
    home.mkdir()
    os.chown(home, UID, GID)
    # a copy of the whole directory: a file bound over one that somebody replaces meanwhile would be gone
    etc = context / "etc"
    subprocess.run(["cp", "-a", "/etc", str(etc)], check=True)
    for name, line in {
        "passwd": f"cowfs-buildah:x:{UID}:{GID}::{home}:/bin/sh\n",
        "group": f"cowfs-buildah:x:{GID}:\n",
        "subuid": "cowfs-buildah:300000:65536\n",
        "subgid": "cowfs-buildah:300000:65536\n",
    }.items():
        with (etc / name).open("a") as file:
            file.write(line)
    namespace.bind(str(etc), "/etc")
    yield home
    mounts.umount_busy("/etc")


def test_as_an_ordinary_user(context: Path, named_user: Path) -> None:
    python, environment = users.interpreter()
    program = mount_program(context, python, environment["PYTHONPATH"])
    runtime = named_user / "run"
    runtime.mkdir(mode=0o700)
    os.chown(runtime, UID, GID)
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(named_user),
        "XDG_RUNTIME_DIR": str(runtime),
        "TMPDIR": str(named_user),
    }
    store = context / "store-user"
    layout = context / "oci-user"
    for path in (store, layout):
        path.mkdir()
        os.chown(path, UID, GID)
    buildah = Buildah(context, "store-user", program, users.command_as([], UID, GID), environment)
    build_run_push(buildah, context, layout)


def mounted_below(path: Path, seconds: float = 5.0) -> list[str]:
    """Mount points below ``path`` that do not go away (buildah may keep its own bind of the storage)."""
    end = time.monotonic() + seconds
    while True:
        left = [
            point for point in namespace.mount_points() if point.startswith(f"{path}/") and point.endswith("/merged")
        ]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)
