"""`cowfs-overlayfs`: fuse-overlayfs's command line, as container engines and mount(8) use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import namespace
from support.command import environment, one_line, run_module
from support.layers import Layer

from cowfs.cli import overlayfs
from cowfs.errors import CowfsError
from cowfs.format.mount_options import split_options


def run(*arguments: object, code: int = 0, **more: object) -> subprocess.CompletedProcess[str]:
    done = run_module("cowfs.cli.overlayfs", *arguments, **more)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def tree(space: Path, mnt: Path, run_directory: Path) -> Path:
    """Two layers, an upper and a work directory."""
    Layer(space / "base").file("who", b"base").file("old", b"old")
    Layer(space / "top").file("who", b"top")
    (space / "up").mkdir()
    (space / "work").mkdir()
    return space


def test_as_podman_calls_it(tree: Path, mnt: Path) -> None:
    """Relative layers through symbolic links, a trailing comma, then more options; topmost layer first."""
    (tree / "l").mkdir()
    (tree / "l/TOP").symlink_to("../top")
    (tree / "l/BASE").symlink_to("../base")
    options = "lowerdir=l/TOP:l/BASE,upperdir=up,workdir=work,,volatile,private,metacopy=on,noxattrs=0,"
    done = run("-o", options, mnt, cwd=tree, stdin=subprocess.DEVNULL)
    assert done.stderr == ""
    assert (mnt / "who").read_text() == "top"
    (mnt / "old").unlink()
    with open("/proc/self/mountinfo", encoding="utf-8") as info:
        assert any(f" {mnt} " in line and " fuse.cowfs-overlayfs " in line for line in info)
    subprocess.run(["fusermount3", "-u", mnt], check=True)
    assert sorted(os.listdir(tree / "up")) == ["old"]
    assert sorted(os.listdir(tree / "work")) == ["work"]


def test_without_upperdir_it_is_read_only(tree: Path, mnt: Path) -> None:
    run("-o", f"lowerdir={tree / 'top'}:{tree / 'base'}", mnt)
    assert os.statvfs(mnt).f_flag & os.ST_RDONLY
    with pytest.raises(OSError):
        (mnt / "x").write_text("")


def test_as_mount_helpers_call_it(tree: Path, mnt: Path) -> None:
    """SOURCE TARGET -o OPTIONS, with the words that mount(8) and containerd add."""
    options = f"rw,lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'},dev,suid"
    run("none", mnt, "-o", options)
    (mnt / "new").write_text("1")
    assert (tree / "up/new").exists()


def test_remount_changes_the_flags_of_a_mount(tree: Path, mnt: Path) -> None:
    """As mount(8) hands `mount -o remount,ro MNT` to the helper of the type."""
    run("-o", f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'}", mnt)
    run("cowfs-overlayfs", mnt, "-o", "ro,nosuid,remount")
    assert os.statvfs(mnt).f_flag & (os.ST_RDONLY | os.ST_NOSUID) == os.ST_RDONLY | os.ST_NOSUID
    with pytest.raises(OSError, match="Read-only"):
        (mnt / "new").write_text("1")
    run("cowfs-overlayfs", mnt, "-o", "rw,remount")
    (mnt / "new").write_text("1")


def test_remount_of_nothing_is_refused(tree: Path, mnt: Path) -> None:
    one_line(run("none", mnt, "-o", "remount,ro", code=2))


def test_mount_by_type(tree: Path, mnt: Path, tmp_path: Path) -> None:
    """`mount -t fuse.cowfs-overlayfs none MNT -o ...` finds the program by its name, in the PATH that mount(8) sets."""
    program = tmp_path / "cowfs-overlayfs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cowfs.cli.overlayfs "$@"\n')
    program.chmod(0o755)
    if not any(os.path.exists(f"/sbin/mount.{name}") for name in ("fuse", "fuse3")):
        pytest.skip("no /sbin/mount.fuse here (package fuse3)")
    command = ["mount", "-t", "fuse.cowfs-overlayfs", "none", str(mnt), "-o", f"lowerdir={tree / 'base'}"]
    namespace.bind(str(tmp_path), "/usr/local/sbin")
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    finally:
        namespace.umount("/usr/local/sbin")
    assert done.returncode == 0, done.stderr
    assert (mnt / "who").read_text() == "base"


def test_limit_of_our_own(tree: Path, mnt: Path) -> None:
    options = f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'},size=1M,inodes=7"
    run("-o", options, mnt)
    fs = os.statvfs(mnt)
    assert (fs.f_blocks * fs.f_frsize, fs.f_files) == (1 << 20, 7)


def test_awkward_paths(space: Path, mnt: Path, run_directory: Path) -> None:
    """Colons, commas and backslashes in paths, escaped."""
    odd = space / "a:b,c\\d"
    Layer(odd).file("odd", b"1")
    for name in ("u,p", "w:k"):
        (space / name).mkdir()
    escaped = str(odd).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    run("-o", f"lowerdir={escaped},upperdir={space}/u\\,p,workdir={space}/w\\:k", mnt)
    assert (mnt / "odd").read_text() == "1"
    (mnt / "new").write_text("")
    assert (space / "u,p/new").exists()


def test_mappings_and_squashing(tree: Path, mnt: Path) -> None:
    """uidmapping=:0:1000:1... as podman writes it; squash_to_uid wins over the owner on disk."""
    os.chown(tree / "base/old", 1, 1)
    options = f"lowerdir={tree / 'base'},uidmapping=:0:1000:1:1:110000:65536,gidmapping=:0:2000:1:1:120000:65536"
    run("-o", options, mnt)
    assert [(os.stat(mnt / n).st_uid, os.stat(mnt / n).st_gid) for n in ("who", "old")] == [
        (1000, 2000),
        (110000, 120000),
    ]
    subprocess.run(["umount", mnt], check=True)
    run("-o", f"lowerdir={tree / 'base'},squash_to_uid=77,squash_to_gid=78", mnt)
    assert [(os.stat(mnt / n).st_uid, os.stat(mnt / n).st_gid) for n in ("who", "old")] == [(77, 78)] * 2


def test_permissions_in_an_xattr(tree: Path, mnt: Path) -> None:
    """xattr_permissions=2: owner and mode go to user.containers.override_stat, and are read from it."""
    options = f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'},xattr_permissions=2"
    run("-o", options, mnt)
    (mnt / "new").write_text("1")
    os.chown(mnt / "new", 5, 6)
    os.chmod(mnt / "new", 0o4711)
    shown = os.stat(mnt / "new")
    assert (shown.st_uid, shown.st_gid, shown.st_mode & 0o7777) == (5, 6, 0o4711)
    value = os.getxattr(tree / "up/new", "user.containers.override_stat").decode()
    assert value.split(":")[:2] == ["5", "6"]
    assert int(value.split(":")[2], 8) & 0o7777 == 0o4711
    assert os.stat(tree / "up/new").st_uid == 0


def test_whiteouts_of_archives_are_read_as_containers_storage_unpacks_them(tree: Path, mnt: Path) -> None:
    (tree / "top/.wh.old").write_text("")
    run("-o", f"lowerdir={tree / 'top'}:{tree / 'base'}", mnt)
    assert sorted(os.listdir(mnt)) == ["who"]
    subprocess.run(["umount", mnt], check=True)
    run("-o", f"lowerdir={tree / 'top'}:{tree / 'base'},dotwh=0", mnt)
    assert sorted(os.listdir(mnt)) == [".wh.old", "old", "who"]


def test_over_one_of_its_own_layers(tree: Path, mnt: Path) -> None:
    """fuse-overlayfs is used so: the layer is held open, and seen through the mount from then on."""
    try:
        run("-o", f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'}", tree / "base")
        (tree / "base/new").write_text("1")
        assert (tree / "up/new").read_text() == "1"
    finally:
        run_module("cowfs", "umount", tree / "base")
    assert sorted(os.listdir(tree / "base")) == ["old", "who"]


def test_nothing_is_recorded_beside_the_upper(tree: Path, mnt: Path) -> None:
    """An engine keeps its own records; other layers next time are its business."""
    before = sorted(os.listdir(tree))
    for lower in ("base", "top"):
        run("-o", f"lowerdir={tree / lower},upperdir={tree / 'up'},workdir={tree / 'work'}", mnt)
        subprocess.run(["umount", mnt], check=True)
    assert sorted(os.listdir(tree)) == before


def test_unmounted_and_mounted_again_at_once(tree: Path, mnt: Path) -> None:
    """Engines do not wait for the old server to end: the next mount of the upper waits for its lock."""
    for number in range(5):
        run("-o", f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'}", mnt)
        (mnt / str(number)).write_text("")
        subprocess.run(["umount", mnt], check=True)
    assert sorted(os.listdir(tree / "up")) == ["0", "1", "2", "3", "4"]


def test_ignored_options_are_named_and_do_no_harm(tree: Path, mnt: Path) -> None:
    done = run("-o", f"lowerdir={tree / 'base'},lazytime,frobnicate=3", "--frob", mnt)
    assert done.stderr.splitlines() == [
        "cowfs-overlayfs: ignored: --frob",
        "cowfs-overlayfs: ignored: lazytime",
        "cowfs-overlayfs: ignored: frobnicate=3",
    ]
    assert (mnt / "who").exists()


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    from cowfs import __version__

    assert run(flag).stdout.startswith(f"cowfs-overlayfs: version {__version__}")


def test_help() -> None:
    assert "lowerdir" in run("--help").stdout


BAD: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "mount point"),
    "no lowerdir": (["-o", "upperdir=up,workdir=work", "MNT"], "lowerdir"),
    "no workdir": (["-o", "lowerdir=base,upperdir=up", "MNT"], "workdir"),
    "no value for -o": (["MNT", "-o"], "-o"),
    "layer missing": (["-o", "lowerdir=base:nowhere", "MNT"], "nowhere"),
    "upper missing's parent": (["-o", "lowerdir=base,upperdir=/proc/1/x/up,workdir=work", "MNT"], "/proc/1/x"),
    "target missing": (["-o", "lowerdir=base", "nowhere"], "nowhere"),
    "too many": (["-o", "lowerdir=base", "a", "b", "MNT"], "too many"),
    "mapping": (["-o", "lowerdir=base,uidmapping=0:1", "MNT"], "0:1"),
    "squash": (["-o", "lowerdir=base,squash_to_uid=me", "MNT"], "squash_to_uid"),
    "permissions": (["-o", "lowerdir=base,xattr_permissions=9", "MNT"], "xattr_permissions"),
    "size": (["-o", "lowerdir=base,upperdir=up,workdir=work,size=lots", "MNT"], "lots"),
    "plugin": (["-o", "lowerdir=//plugin/data/x", "MNT"], "plugin"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tree: Path, mnt: Path, case: str) -> None:
    arguments, word = BAD[case]
    done = run_module("cowfs.cli.overlayfs", *(str(mnt) if a == "MNT" else a for a in arguments), cwd=tree)
    assert done.returncode != 0
    assert word in one_line(done)
    assert not os.path.ismount(mnt)


def parsed(text: str) -> dict[str, Any]:
    return overlayfs.parse(["-o", text, "/mnt"])


def test_parse_is_total_over_what_engines_send() -> None:
    """Options that fuse-overlayfs knows are all understood or ignored in silence."""
    words = (
        'lowerdir=/a:/b,upperdir=/u,workdir=/w,context="system_u:object_r:container_file_t:s0:c1,c2",redirect_dir=off,'
        "fast_ino=1,threaded=0,timeout=3,writeback=1,plugins=,static_nlink,noacl,xino=auto,index=off,nfs_export=off,"
        "userxattr,default_permissions,allow_other,fsname=x,subtype=y,max_write=4096,x-systemd.automount,user,private"
    )
    found = parsed(words)
    assert found["lowers"] == ["/a", "/b"]
    assert (found["upper"], found["work"]) == ("/u", "/w")
    assert found["allow_other"] is True
    assert found["words"] == []


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("fsync=0", "fsync", False),
        ("volatile", "volatile", True),
        ("ro", "readonly", True),
        ("noxattrs=1", "noxattrs", True),
        ("noxattrs", "noxattrs", True),
        ("xattr_permissions=1", "override_xattr", "security.fuseoverlayfs.override_stat"),
        ("squash_to_root", "squash_to_root", True),
        ("uidmapping=:0:5:1", "uid_map", ((0, 5, 1),)),
        ("nodev", "words", ["nodev"]),
        ("size=2G", "size", 2 << 30),
        ("inodes=1k", "inodes", 1000),
    ],
)
def test_parse_meaning(text: str, field: str, value: object) -> None:
    assert parsed(text)[field] == value


def test_later_options_win() -> None:
    assert overlayfs.parse(["-o", "lowerdir=/a", "-olowerdir=/b,ro", "/mnt"])["lowers"] == ["/b"]


@pytest.mark.parametrize("text", ["a\\", "\\", "a,\\,b", ",,,", "lowerdir=", 'context="'])
def test_split_never_fails(text: str) -> None:
    """Any text splits into options that hold no free comma."""
    for option in split_options(text):
        assert option
        assert "," not in option.replace("\\,", "")


def test_spec_needs_arguments() -> None:
    with pytest.raises(CowfsError):
        overlayfs.spec_of(["-o", "lowerdir=/a"])
