"""An upper in memory: the kernel's overlayfs over a tmpfs of the limit's size, which goes with the mount; a server otherwise."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.users import command_as, hand_over

import cowfs
from cowfs.cli import main
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.mounting import client
from cowfs.mounting.kernel import KernelMount
from cowfs.sys import host
from cowfs.sys.mounts import mountinfo

MIB = 1 << 20
root = pytest.mark.skipif(
    os.geteuid() != 0 or not host.init_userns(), reason="mounts of the kernel: needs root of the host"
)


@pytest.fixture
def stack(tmp_path: Path, can_mount: None) -> Path:
    """Two layers and a mount point."""
    for name in ("layers/1", "layers/2", "mnt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "layers/1/file").write_text("lower")
    (tmp_path / "layers/1/gone").write_text("gone")
    (tmp_path / "layers/2").chmod(0o750)
    return tmp_path


def device(path: Path) -> str:
    """The type of what is mounted there, as mountinfo has it."""
    return [entry.fstype for entry in mountinfo() if os.fsdecode(entry.target) == str(path)][-1]


@root
def test_changes_are_in_memory_and_go_with_the_mount(stack: Path) -> None:
    before = sorted(path for path in stack.rglob("*"))
    mnt = stack / "mnt"
    with cowfs.mount(str(stack / "layers"), mnt, ephemeral=True, memory=True) as handle:
        assert isinstance(handle, KernelMount)
        assert device(mnt) == "overlay"
        assert mnt.stat().st_mode & 0o7777 == 0o750
        (mnt / "new").write_text("new")
        (mnt / "file").write_text("changed")
        (mnt / "gone").unlink()
        assert sorted(os.listdir(mnt)) == ["file", "new"]
        (status,) = (s for s in client.mounts() if s.mountpoint == str(mnt))
        assert status.details["engine"] == "kernel"
        with pytest.raises(FailedPrecondition, match="mounted by the kernel"):
            handle.limit(size="1G")
    assert sorted(path for path in stack.rglob("*")) == before
    assert (stack / "layers/1/file").read_text() == "lower"
    with cowfs.mount(str(stack / "layers"), mnt, ephemeral=True, memory=True):
        assert (mnt / "file").read_text() == "lower"


@root
@pytest.mark.parametrize("size", [MIB, 10 * MIB])
def test_a_limit_on_bytes_is_exact(stack: Path, size: int) -> None:
    mnt = stack / "mnt"
    with cowfs.mount(str(stack / "layers"), mnt, ephemeral=True, memory=True, size=size):
        told = os.statvfs(mnt)
        assert told.f_blocks * told.f_frsize == told.f_bavail * told.f_frsize == size
        done = 0
        with open(mnt / "big", "wb", buffering=0) as file, pytest.raises(OSError) as caught:
            while True:
                done += file.write(b"b" * 4096)
        assert caught.value.errno == errno.ENOSPC
        assert done == size
        (mnt / "big").unlink()
        assert os.statvfs(mnt).f_bavail == told.f_bavail


@root
@pytest.mark.parametrize("inodes", [1, 50])
def test_a_limit_on_inodes_holds(stack: Path, inodes: int) -> None:
    mnt = stack / "mnt"
    with cowfs.mount(str(stack / "layers"), mnt, ephemeral=True, memory=True, size=MIB, inodes=inodes):
        assert os.statvfs(mnt).f_favail == inodes
        for number in range(inodes):
            (mnt / f"f{number}").touch()
        with pytest.raises(OSError) as caught:
            (mnt / "more").touch()
        assert caught.value.errno == errno.ENOSPC


@root
def test_the_command(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mnt = str(stack / "mnt")
    assert (
        main(["mount", str(stack / "layers"), mnt, "--ephemeral", "--memory", "--size", "4M", "-o", "nodev,noexec"])
        == 0
    )
    flags = os.statvfs(mnt).f_flag
    assert flags & os.ST_NODEV
    assert flags & os.ST_NOEXEC
    assert main(["umount", mnt]) == 0
    assert not os.path.ismount(mnt)
    assert main(["mount", str(stack / "layers"), mnt, "--memory"]) == 2
    assert "--ephemeral --memory" in capsys.readouterr().err
    assert main(["mount", "--layer", str(stack / "nothing"), mnt, "--ephemeral", "--memory"]) == 3


@root
def test_what_the_kernel_cannot_do_is_the_servers(stack: Path) -> None:
    """An owner map, redirect files, an option of FUSE: the same mount, served, with its upper on a tmpfs."""
    mnt = stack / "mnt"
    wishes: tuple[dict[str, Any], ...] = ({"uid_map": ((0, 1000, 1),)}, {"row": "4k"}, {"options": "noatime"})
    for more in wishes:
        with cowfs.mount(str(stack / "layers"), mnt, ephemeral=True, memory=True, size=MIB, **more) as handle:
            assert not isinstance(handle, KernelMount)
            assert device(mnt) == "fuse.cowfs"
            upper = handle.status().upper
            assert upper is not None
            assert upper.startswith("/dev/shm/")
            (mnt / "file").write_text("changed")
        assert not os.path.exists(upper)


@root
def test_layers_that_are_not_there(stack: Path) -> None:
    with pytest.raises(NotFound):
        cowfs.mount([stack / "layers/1", stack / "layers/9"], stack / "mnt", ephemeral=True, memory=True)
    with pytest.raises((NotFound, Unsupported)):
        cowfs.mount([stack / "layers/1"], stack / "nowhere", ephemeral=True, memory=True)
    with pytest.raises(InvalidArgument):
        cowfs.mount([stack / "layers/1"], stack / "mnt", memory=True)
    assert not os.path.ismount(stack / "mnt")


def test_an_ordinary_user_gets_a_server(ordinary_user: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = hand_over(tmp_path_factory.mktemp("theirs"), ordinary_user)
    code = (
        "import sys, os, cowfs\ntop = sys.argv[1]\n"
        "for name in ('l', 'm'):\n    os.mkdir(top + '/' + name)\n"
        "with cowfs.mount([top + '/l'], top + '/m', ephemeral=True, memory=True, size='1M') as handle:\n"
        "    open(top + '/m/f', 'w').write('x')\n"
        "    print(handle.status().upper, os.statvfs(top + '/m').f_blocks * 4096)\n"
    )
    done = subprocess.run(
        command_as([sys.executable, "-c", code, str(place)]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/dev/shm/cowfs-ephemeral-")
    assert done.stdout.endswith(f" {MIB}\n")
