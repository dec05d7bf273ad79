"""docs/howto/boot.md: each file is used as it stands, with other paths."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import ROOT, environment, run_module
from support.daemon import Daemon, busybox_tar, clean_up

PAGE = ROOT / "docs/howto/boot.md"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts at boot are root's")


def block(language: str, number: int = 0) -> str:
    """A file of the page."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return found[number]


@pytest.fixture
def place(space: Path, can_mount: None) -> Iterator[Path]:
    """The directories that the page names, below one of our own, and the commands."""
    for name in ("layers/00-base/etc", "layers/10-python/bin", "upper", "work", "rootfs", "bin"):
        (space / name).mkdir(parents=True)
    (space / "layers/00-base/etc/issue").write_text("base")
    for name, module in (("cowfs", "cowfs"), ("cowfs-overlayfs", "cowfs.cli.overlayfs")):
        (space / "bin" / name).write_text(
            f'#!/bin/sh\nPYTHONPATH={ROOT} exec {shlex.quote(sys.executable)} -m {module} "$@"\n'
        )
        (space / "bin" / name).chmod(0o755)
    namespace.bind(str(space / "bin"), "/usr/local/sbin")  # mount(8) looks in the system's directories only
    yield space
    run_module("cowfs", "umount", "--all")
    namespace.umount("/usr/local/sbin")


def here(text: str, place: Path) -> str:
    return text.replace("/usr/local/bin/", f"{place}/bin/").replace("/srv/", f"{place}/")


def in_path(place: Path) -> dict[str, str]:
    return {**environment(), "PATH": f"{place}/bin:{os.environ['PATH']}", "COWFS_FSYNC": "0"}


def check_mounted(place: Path) -> None:
    root = place / "rootfs"
    assert (root / "etc/issue").read_text() == "base"
    status = os.statvfs(root)
    assert status.f_blocks * status.f_frsize == 2 << 30
    (root / "etc/issue").write_text("changed")
    assert (place / "upper/etc/issue").read_text() == "changed"


def test_fstab(place: Path) -> None:
    if not shutil.which("mount.fuse3"):
        pytest.skip("mount.fuse3 is not installed (fuse3)")
    (place / "fstab").write_text(here(block("fstab"), place))
    subprocess.run(["mount", "-T", place / "fstab", place / "rootfs"], env=in_path(place), check=True)
    check_mounted(place)
    subprocess.run(["umount", place / "rootfs"], check=True)


def unit(text: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(text)
    return parsed


def verified(text: str, path: Path) -> None:
    """systemd itself reads it, where there is one."""
    path.write_text(text)
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
        )
        bad = [line for line in done.stderr.splitlines() if path.name in line]
        assert not bad, done.stderr


def test_a_mount_unit(place: Path) -> None:
    if not shutil.which("mount.fuse3"):
        pytest.skip("mount.fuse3 is not installed (fuse3)")
    text = here(block("systemd", 0), place)
    escaped = str(place / "rootfs").strip("/").replace("-", "\\x2d").replace("/", "-")
    verified(text, place / f"{escaped}.mount")
    mount = unit(text)["Mount"]
    command = ["mount", mount["What"], mount["Where"], "-t", mount["Type"], "-o", mount["Options"]]  # systemd.mount(5)
    subprocess.run(command, env=in_path(place), check=True)
    check_mounted(place)
    subprocess.run(["umount", mount["Where"]], check=True)


def test_a_service_for_a_snapshot(place: Path) -> None:
    text = here(block("systemd", 1), place)
    verified(text, place / "box.service")
    service = unit(text)["Service"]
    name, root = service["Environment"].split("=")
    env = {**in_path(place), name: root}
    for arguments in (["import", place / "layers/00-base", "base"], ["prepare", "box", "base"]):
        subprocess.run([place / "bin/cowfs", *arguments], env=env, check=True, capture_output=True)
    subprocess.run(service["ExecStart"].split(), env=env, check=True)
    assert (place / "rootfs/etc/issue").read_text() == "base"
    subprocess.run(service["ExecStop"].split(), env=env, check=True)
    assert not os.path.ismount(place / "rootfs")


def test_storage_conf(place: Path, public_directory: Path) -> None:
    if not shutil.which("buildah"):
        pytest.skip("buildah is not installed")
    text = here(block("toml"), place).replace("/run/containers/storage", f"{place}/run")
    (place / "storage.conf").write_text(text)
    env = {**in_path(place), "CONTAINERS_STORAGE_CONF": str(place / "storage.conf")}

    def buildah(*arguments: object) -> str:
        done = subprocess.run(
            ["buildah", *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120, check=False
        )
        if "operation not permitted" in done.stderr or "make / private" in done.stderr:
            pytest.skip(f"containers/storage cannot work here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    box = buildah("from", "scratch")
    try:
        status = os.statvfs(buildah("mount", box))
        assert status.f_blocks * status.f_frsize == 2 << 30
        assert status.f_files == 200_000
    finally:
        buildah("umount", box)
        buildah("rm", box)


def test_compose(place: Path, scratch: Path) -> None:
    pytest.importorskip("h11")
    compose = shutil.which("docker-compose")
    if compose is None or not (shutil.which("runc") or shutil.which("crun")) or not shutil.which("docker"):
        pytest.skip("docker-compose, docker or an OCI runtime is not installed")
    daemon = Daemon(scratch / "compose")
    try:
        daemon.start()
        daemon.docker("import", "-c", 'CMD ["sh"]', "-", "app:1", input=busybox_tar())
        (place / "compose.yaml").write_text(block("yaml"))
        env = {**os.environ, "DOCKER_HOST": f"unix://{daemon.socket}", "HOME": str(place)}
        done = subprocess.run(
            [compose, "-f", place / "compose.yaml", "-p", "boot", "up", "--abort-on-container-exit"],
            env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"\b65536\b", done.stdout), done.stdout
    finally:
        clean_up(daemon)
