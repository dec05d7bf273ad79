"""Every example of every verb's --help is run as it is printed, in a prepared place, and does what it promises.

The place is a directory with layers, trees and archives of the names that examples use, a store with such snapshots, /srv and /mnt of its own, and
stand-ins for ssh (runs the line here) and podman (reads the archive). Lines that need more of a host are named with the tests that run them.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import environment
from support.sandboxes import tree

from cowfs.cli import VERBS, command_of
from cowfs.store import Store

ELSEWHERE = {
    "pull": "a registry: tests/images, tests/service",
    "push": "a registry: tests/images, tests/service",
    "serve": "a daemon: tests/service",
    "podman": "writes beside the host's podman: tests/cli/test_cli_podman.py",
    "unshare": "an ordinary user with ranges: tests/e2e/test_run_subids.py",
    "migrate": "file systems of other kinds: tests/store/test_migrate.py",
}
"""Verbs whose examples need another host, and where they are run."""
LINES_ELSEWHERE = {
    "skopeo copy docker-archive:x.tar oci:layout && cowfs import layout app": "skopeo: tests/store/test_store_images.py",
    "cowfs init --driver block --option filesystem=xfs --option size=100g": "loop devices: tests/drivers",
    "cowfs export vm vm.qcow2 --disk qcow2 --size 20G": "the driver block: tests/drivers",
    "cowfs top": "a terminal: tests/cli/test_cli_top.py",
    "cowfs top --sort requests": "a terminal: tests/cli/test_cli_top.py",
    "cowfs logs work --follow": "a log that grows: tests/store/test_keeping_house.py",
    "cowfs bench": "minutes: benchmarks/",
    "cowfs bench warm_read first_write --work /mnt/disk/bench": "minutes: benchmarks/",
    "cowfs bench --profile full --out report/": "minutes: benchmarks/",
}
ENDLESS = ("cowfs stats", "cowfs events")
"""Lines that are ended by Ctrl-C once they have told something."""

BEFORE = {
    "umount": "cowfs mount layers/ /mnt/rootfs",
    "rollback": "cowfs snapshot work before-upgrade",
    "squash": "cowfs snapshot work before-upgrade; cowfs commit work after",
    "receive": "cowfs send v2 --since v1 > v2.cowfs; cowfs send base app:1 | zstd -q > both.cowfs.zst",
    "mounts": "cowfs mount layers/ /mnt/rootfs",
    "compact": "rm -r store; cowfs init --driver row; cowfs import ./rootfs base; cowfs prepare work base",
    "init": "rm -r store",
    "stats": "cowfs mount --key web ./other",
    "completion": "mkdir -p ~/.zfunc ~/.config/fish/completions",
}
"""Typed before each line of a verb."""
BEFORE_LINE = {
    "cowfs prepare work debian": "cowfs rm work",
    "cowfs tag -d app:latest": "cowfs tag app:latest app-v2",
    "cowfs commit work v2 --label team=storage": "cowfs rm v2",
    "cowfs snapshot work v2 --label by=ci": "cowfs rm v2",
    "cowfs diff ./changes --layer base --layer python": "cowfs mount --layer base --layer python ./other --upper changes; cowfs umount ./other",
    "cowfs umount --all": "cowfs mount --key work ./other",
    "cowfs logs /mnt/rootfs -n 20": "cowfs mount layers/ /mnt/rootfs",
    "cowfs logs /mnt/rootfs": "cowfs mount layers/ /mnt/rootfs",
    "cowfs usage /mnt/rootfs": "cowfs mount layers/ /mnt/rootfs",
    "cowfs diff layers/.cowfs/upper --jsonl": "cowfs mount layers/ /mnt/rootfs; echo more > /mnt/rootfs/more",
    "cowfs diff /mnt/rootfs": "cowfs mount layers/ /mnt/rootfs; echo more > /mnt/rootfs/more",
    "cowfs diff /mnt/rootfs --stat": "cowfs mount layers/ /mnt/rootfs; echo more > /mnt/rootfs/more",
    "cowfs limit /mnt/rootfs": "cowfs mount layers/ /mnt/rootfs",
    "cowfs limit /mnt/rootfs --size 4G": "cowfs mount layers/ /mnt/rootfs",
    "cowfs limit /mnt/rootfs --inodes none": "cowfs mount layers/ /mnt/rootfs",
    "cowfs apply work changed.blocks --blocks": "cowfs export v2 changed.blocks --blocks --base v1; cowfs rm work; cowfs prepare work v1",
    "cowfs rollback work before-upgrade --keep failed-upgrade": "echo x | cowfs cp - work:/x 2>/dev/null || true",
}
PROMISES = {
    "cowfs mount layers/ /mnt/rootfs": "test -e /mnt/rootfs/bin/busybox",
    "cowfs mount layers/ /mnt/rootfs --size 2G --inodes 100k": "cowfs limit /mnt/rootfs | grep -q '2 GiB'",
    "cowfs mount layers/ /mnt/rootfs --read-only -o nodev,nosuid": "! touch /mnt/rootfs/x 2>/dev/null",
    "cowfs umount /mnt/rootfs": "! mountpoint -q /mnt/rootfs",
    "cowfs umount --all": "! mountpoint -q /mnt/rootfs",
    "cowfs limit /mnt/rootfs --size 4G": "cowfs limit /mnt/rootfs | grep -q '4 GiB'",
    "cowfs limit build --size 8G": "cowfs limit build | grep -q '8 GiB'",
    "cowfs import debian.tar debian:12": "cowfs cat debian:12:/etc/os-release >/dev/null",
    "cowfs import ./rootfs base": "cowfs images -q | grep -qx base",
    "cowfs prepare box base --size 2G --inodes 100k": "cowfs limit box | grep -q '2 GiB'",
    "cowfs commit work v2 --label team=storage": "cowfs stat v2 | grep -q team",
    "cowfs snapshot work before-upgrade": "cowfs log work | grep -q before-upgrade",
    "cowfs rollback work before-upgrade --keep failed-upgrade": "cowfs stat failed-upgrade >/dev/null",
    "cowfs squash before-upgrade": "! cowfs stat before-upgrade 2>/dev/null",
    "cowfs fork base sandbox-1 sandbox-2 sandbox-3 --size 1G": "cowfs ls -q kind==active | grep -c sandbox- | grep -qx 3",
    "cowfs rm work": "! cowfs stat work 2>/dev/null",
    "cowfs rm debian:12 --chain --dry-run": "cowfs stat debian:12 >/dev/null",
    "cowfs tag app:latest app-v2": "cowfs images -q | grep -qx app:latest",
    "cowfs rename work work-old": "cowfs stat work-old >/dev/null && ! cowfs stat work 2>/dev/null",
    "cowfs copy base --to /mnt/backup/store": "cowfs stat base --root /mnt/backup/store >/dev/null",
    "cowfs copy v2 --to ssh://backup/srv/store": "cowfs stat v2 --root /srv/store >/dev/null",
    "cowfs send v2 --since v1 > v2.cowfs": "test -s v2.cowfs",
    "cowfs export app app.tar": "tar -tf app.tar | grep -q index.json",
    "cowfs export work changes.tar --format layer": "tar -tf changes.tar >/dev/null",
    "cowfs cp base:/etc/os-release .": "test -s os-release",
    "cowfs cp ./site work:/srv/": "cowfs cat work:/srv/site/index.html | grep -q hello",
    "tar -c site | cowfs cp - work:/srv": "cowfs cat work:/srv/site/index.html | grep -q hello",
    "cowfs cp base:/etc/. ./etc-of-base": "test -s etc-of-base/os-release",
    "cowfs init /srv/store": "cowfs df --root /srv/store >/dev/null",
    "cowfs tls init certs": "test -s certs/ca.pem",
    "cowfs run debian:12 --network host --commit with-python -- apt-get install -y python3": "cowfs cat with-python:/installed >/dev/null",
    "cowfs run --rm --timeout 60 -v $PWD:/src:ro -w /src debian:12 sh -c 'make test'": "! cowfs ls -q | grep run-",
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the place, made once."""
    place = tmp_path_factory.mktemp("examples")
    root = place / "rootfs"
    tree(root)
    (root / "srv").mkdir()
    (root / "usr/share").mkdir(parents=True)
    (root / "usr/share/doc").write_text("text\n")
    (root / "etc/os-release").write_text("ID=debian\n")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    for name, line in (("apt-get", 'case "$1" in install) touch /installed;; esac'), ("make", ":")):
        (root / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (root / "bin" / name).chmod(0o755)
    for name in ("layers/1-base", "base"):
        shutil.copytree(root, place / name, symlinks=True)
    for name in ("layers/2-app", "python", "app", "other", "site", "changes"):
        (place / name).mkdir(parents=True)
    (place / "python/python").write_text("py")
    (place / "site/index.html").write_text("hello\n")
    subprocess.run(["tar", "-C", root, "-cf", place / "debian.tar", "."], check=True)
    subprocess.run(["tar", "-C", place / "site", "-czf", place / "layer.tar.gz", "."], check=True)
    subprocess.run(["sh", "-c", "zcat layer.tar.gz | zstd -q > layer.tar.zst"], cwd=place, check=True)
    programs = place / "programs"
    programs.mkdir()
    for name, line in (
        ("cowfs", f'exec {sys.executable} -m cowfs "$@"'),
        ("ssh", 'while case "$1" in -*) true;; *) false;; esac; do shift; done; shift; exec sh -c "$*"'),
        ("podman", "tar -t > /dev/null"),
        ("docker", "exit 0"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    with Store.open(place / "store", driver="overlay", fsync=False) as store:
        store.import_image(place / "rootfs", "debian:12")
        name = store.resolve("debian:12").name
        for tag in ("base", "debian"):
            store.tag(tag, name)
        for key, parent, made in (
            ("k1", "base", "v1"),
            ("k2", "v1", "v2"),
            ("k3", "base", "app-v1"),
            ("k4", "app-v1", "app-v2"),
        ):
            store.prepare(key, parent)
            with store.paths(key) as paths:
                paths.write_bytes(f"etc/{made}".encode(), made.encode() * 3000)
            store.commit(key, made)
        for tag, target in (("app", "app-v2"), ("app:1", "app-v2"), ("vm", "v1"), ("python", "app-v1")):
            store.tag(tag, target)
        for key in ("work", "build", "web"):
            store.prepare(key, "base")
    return place


@pytest.fixture
def mounts_of_our_own(can_mount: None) -> Iterator[None]:
    for path in ("/srv", "/mnt"):
        namespace.mount("tmpfs", path, "tmpfs")
    yield
    for path in ("/mnt", "/srv"):
        namespace.umount(path, namespace.MNT_DETACH)


def fresh(template: Path, place: Path) -> None:
    """A copy of the place, with nothing mounted in it."""
    if any(f" {where}" in Path("/proc/self/mountinfo").read_text() for where in ("/mnt/rootfs", place)):
        shell(template, "cowfs umount --all -q")
    subprocess.run(["sh", "-c", 'rm -rf "$2" /srv/* /mnt/*; cp -a "$1" "$2"', "sh", template, place], check=True)
    for path in ("/mnt/rootfs", "/mnt/backup", "/srv/debian/bin"):
        os.makedirs(path)


def happen(place: Path) -> None:
    """Something that events tell of."""
    with Store.open(place / "store", create=False, fsync=False) as store:
        store.prepare("more", "base")
        store.remove("more")


def shell(place: Path, line: str, *, endless: bool = False) -> tuple[int, str]:
    environ = {
        **environment(),
        "HOME": str(place),
        "LC_ALL": "C",
        "COWFS_FSYNC": "0",
        "COWFS_ROOT": str(place / "store"),
    }
    environ["PATH"] = f"{place}/programs:{os.environ['PATH']}"
    environ["SHELL"] = "/bin/sh"
    with subprocess.Popen(
        ["bash", "-c", f"exec {line}" if endless else line],
        cwd=place, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as running:  # fmt: skip
        said = ""
        if endless:
            assert running.stdout is not None
            while not select.select([running.stdout], [], [], 0.3)[0]:
                happen(place)
            said = running.stdout.readline()
            running.send_signal(signal.SIGINT)
        said += running.communicate(timeout=300)[0]
        return running.returncode, said


def statuses(line: str) -> tuple[int, ...]:
    """The exit statuses that a line may have: doctor tells by one that something is missing here."""
    return (0, 8) if line.startswith("cowfs doctor") else (0,)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ELSEWHERE])
def test_every_example_does_what_it_says(
    verb: str, template: Path, space: Path, run_directory: Path, mounts_of_our_own: None
) -> None:
    if verb == "tls":
        pytest.importorskip("cryptography")
    place = space / "place"
    try:
        for line in command_of(verb).examples:
            if line in LINES_ELSEWHERE:
                continue
            fresh(template, place)
            for before in (BEFORE.get(verb), BEFORE_LINE.get(line)):
                if before:
                    status, said = shell(place, before)
                    assert status == 0, f"{before}: {said}"
            endless = line in ENDLESS
            status, said = shell(place, line, endless=endless)
            assert status in ((0, 130) if endless else statuses(line)), f"$ {line}\nends with {status}: {said}"
            assert "Traceback" not in said
            if line in PROMISES:
                status, told = shell(place, PROMISES[line])
                assert status == 0, f"$ {line}\n{said}\ndoes not do it: {PROMISES[line]}: {told}"
    finally:
        shell(template, "cowfs umount --all -q")


def test_what_is_left_to_others_is_there() -> None:
    """No example is forgotten by a change of its words, or of a verb's name."""
    lines = {line for verb in VERBS for line in command_of(verb).examples}
    assert set(LINES_ELSEWHERE) | set(ENDLESS) | set(PROMISES) | set(BEFORE_LINE) <= lines
    assert set(ELSEWHERE) | set(BEFORE) <= set(VERBS)
