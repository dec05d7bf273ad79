"""Mounting: as root, by fusermount3 as an ordinary user, and what is said when the host will not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowfs.errors import CowfsError, InvalidArgument, NotFound, Unsupported
from cowfs.fuse import device, mount_fuse
from cowfs.sys import mounts


@pytest.fixture
def target(tmp_path: Path, can_mount: None) -> Any:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    try:
        mounts.umount(path, mounts.MNT_DETACH | mounts.MNT_FORCE)
    except OSError:
        pass


def info(path: Path) -> mounts.MountInfo:
    found = [one for one in mounts.mountinfo() if one.target == bytes(path)]
    assert len(found) == 1
    return found[0]


def test_root_mounts_with_the_options_asked_for(target: Path) -> None:
    fd = mount_fuse(target, ["nodev", "nosuid", "noexec", "noatime", "ro", ""], source="my source", subtype="cowfs")
    found = info(target)
    assert found.fstype == "fuse.cowfs"
    assert found.source == b"my source"
    assert {"nodev", "nosuid", "noexec", "noatime", "ro"} <= set(found.options)
    assert b"default_permissions" in found.super_options
    assert b"allow_other" in found.super_options
    os.close(fd)


def test_the_last_of_contradicting_options_counts(target: Path) -> None:
    fd = mount_fuse(target, ["ro", "rw", "nodev", "dev"])
    assert {"ro", "nodev"}.isdisjoint(info(target).options)
    os.close(fd)


def test_allow_other_can_be_left_out(target: Path) -> None:
    fd = mount_fuse(target, allow_other=False)
    assert b"allow_other" not in info(target).super_options
    os.close(fd)


def test_the_descriptor_is_not_inherited(target: Path) -> None:
    fd = mount_fuse(target)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_dead_mount_is_cleared_first(target: Path) -> None:
    os.close(mount_fuse(target))
    with pytest.raises(OSError):
        os.stat(target)
    fd = mount_fuse(target)
    assert len([one for one in mounts.mountinfo() if one.target == bytes(target)]) == 1
    os.close(fd)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda p: p / "missing", NotFound, "no such mount point"),
        (lambda p: p / "file" / "below", NotFound, "no such mount point"),
        (lambda p: p / "file", InvalidArgument, "not a directory"),
    ],
    ids=["missing", "below a file", "a file"],
)
def test_a_mount_point_that_cannot_be_is_named(tmp_path: Path, make: Any, kind: type[CowfsError], words: str) -> None:
    (tmp_path / "file").touch()
    path = make(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        mount_fuse(path)
    assert str(path) in str(caught.value)


def test_an_unknown_option_is_named(target: Path) -> None:
    with pytest.raises(InvalidArgument, match="'fast' is not known"):
        mount_fuse(target, ["fast"])


def test_a_missing_device_has_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="modprobe fuse"):
        device.open_device(str(tmp_path / "fuse"))


def test_a_device_that_is_none_has_a_remedy(tmp_path: Path, can_mount: None) -> None:
    os.mknod(tmp_path / "fuse", 0o20666, os.makedev(10, 0xFFFF))
    with pytest.raises(Unsupported, match="modprobe fuse"):
        device.open_device(str(tmp_path / "fuse"))


def as_user(code: str, *, device_mode: str = "0666", uid: int = 1000) -> subprocess.CompletedProcess[str]:
    """Run Python as an ordinary user in a mount namespace of its own, with a FUSE device of that mode.

    The new device is a node of its own, bound over the host's, so the host's stays as it is; and so is an empty
    fuse.conf, whatever the host allows.
    """
    script = f"""
set -e
d=$(mktemp -d)
mount -t tmpfs -o mode=0755 none $d
mknod -m {device_mode} $d/fuse c 10 229
mount --bind $d/fuse /dev/fuse
if [ -e /etc/fuse.conf ]; then
  : >$d/fuse.conf
  mount --bind $d/fuse.conf /etc/fuse.conf
fi
if ! getent passwd {uid} >/dev/null; then  # fusermount3 wants a name
  (cat /etc/passwd; echo 'cowfs-test:x:{uid}:{uid}::/:/bin/sh') >$d/passwd
  mount --bind $d/passwd /etc/passwd
fi
exec setpriv --reuid {uid} --regid {uid} --clear-groups {sys.executable} -c "$1"
"""
    return subprocess.run(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", script, "sh", code],
        capture_output=True, text=True, timeout=30, check=False, cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in [str(Path(__file__).parents[2]), *sys.path] if path)},
    )  # fmt: skip


SERVE = """
import os, sys, tempfile, threading
sys.path.insert(0, {here!r})
from support.memory_view import MemoryView
from cowfs.fuse import Session, mount_fuse
from cowfs.sys import mounts
path = tempfile.mkdtemp()
session = Session(mount_fuse(path, ["noatime", "nodev"]), MemoryView())
thread = threading.Thread(target=session.run)
thread.start()
os.mkdir(path + "/d")
print(os.listdir(path), os.stat(path + "/d").st_uid)
found = [one for one in mounts.mountinfo() if one.target == path.encode()][0]
print(found.fstype, sorted(set(found.options) & {{"nodev", "nosuid", "noatime"}}))
print(b"default_permissions" in found.super_options, b"allow_other" in found.super_options)
import subprocess
subprocess.run(["fusermount3", "-u", path], check=True)
thread.join(10)
print(thread.is_alive())
os.rmdir(path)
"""


def test_an_ordinary_user_mounts_by_fusermount3(can_mount: None) -> None:
    if not Path("/usr/bin/fusermount3").exists():
        pytest.skip("no fusermount3 (package fuse3)")
    done = as_user(SERVE.format(here=str(Path(__file__).parents[1])))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['d'] 1000",
        "fuse.cowfs ['noatime', 'nodev', 'nosuid']",
        "True False",
        "False",
    ]


def test_a_user_namespace_s_root_mounts_directly(can_mount: None) -> None:
    code = SERVE.format(here=str(Path(__file__).parents[1])).replace(
        'subprocess.run(["fusermount3", "-u", path], check=True)', "mounts.umount(path)"
    )
    # The interpreter of the tests may lie where a user namespace's root, who is nobody outside, cannot reach it.
    shell = 'for p in "$0" /usr/bin/python3; do [ -x "$p" ] && exec "$p" -c "$1"; done; exit 126'
    inner = (
        "import os, sys\n"
        f"os.execvp('unshare', ['unshare', '-Urm', 'sh', '-c', {shell!r}, os.readlink('/proc/self/exe'), {code!r}])"
    )
    done = as_user(inner)
    if "unshare" in done.stderr or done.returncode == 126:
        pytest.skip(f"no user namespaces for ordinary users: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "['d'] 0"
    assert lines[2:] == ["True True", "False"]


def test_a_device_that_is_not_ours_has_a_remedy(can_mount: None) -> None:
    code = "from cowfs.fuse import mount_fuse\nimport tempfile\ntry: mount_fuse(tempfile.mkdtemp())\nexcept Exception as e: print(type(e).__name__, e)"
    done = as_user(code, device_mode="0600")
    assert done.stdout.startswith("Unsupported /dev/fuse: not permitted (")
    assert "chmod 0666" in done.stdout


def test_allow_other_that_is_not_configured_has_a_remedy(can_mount: None) -> None:
    if not Path("/usr/bin/fusermount3").exists():
        pytest.skip("no fusermount3 (package fuse3)")
    code = "from cowfs.fuse import mount_fuse\nimport tempfile\ntry: mount_fuse(tempfile.mkdtemp(), allow_other=True)\nexcept Exception as e: print(type(e).__name__, e)"
    done = as_user(code)
    assert done.stdout.startswith("FailedPrecondition "), done.stderr
    assert "user_allow_other" in done.stdout


def test_a_failed_mount_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CowfsError):
        mount_fuse(tmp_path / "missing")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_without_fusermount3_an_ordinary_user_is_told_the_package(can_mount: None) -> None:
    code = "import os; os.environ['PATH'] = '/nonexistent'\nfrom cowfs.fuse import mount_fuse\nimport tempfile\ntry: mount_fuse(tempfile.mkdtemp())\nexcept Exception as e: print(type(e).__name__, e)"
    done = as_user(code)
    assert done.stdout.startswith("Unsupported ")
    assert "apt-get install fuse3" in done.stdout
