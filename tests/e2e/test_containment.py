"""Nothing inside the mounted tree makes the server touch anything outside its layers.

A canary tree lies beside the layers; whatever is done inside, its bytes, owners, modes and times stay.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import layers, mounts, trees
from support.posix import error_of, read, write


@pytest.fixture
def canary(space: Path) -> Iterator[Path]:
    """A tree outside, compared in the end."""
    outside = layers.Layer(space / "outside")
    outside.file("secret", b"secret", mode=0o600).file("dir/in", b"i").dir("empty")
    before = trees.snapshot(outside.path)
    yield outside.path
    trees.assert_same(before, trees.snapshot(outside.path), names=("before", "after"))


def test_absolute_links_of_a_layer_lead_nowhere_outside(space: Path, canary: Path) -> None:
    """The kernel resolves them in the caller's root; the server itself never follows one."""
    lower = layers.Layer(space / "lower").symlink("abs", str(canary)).symlink("up", "../../outside").dir("d")
    with mounts.mounted("kernel", [lower], space) as m:
        for name in ("abs", "up"):
            os.chown(m.path / name, 7, 7, follow_symlinks=False)
            os.rename(m.path / name, m.path / "d" / name)
            assert os.readlink(m.path / "d" / name) in (str(canary), "../../outside")
            os.link(m.path / "d" / name, m.path / name, follow_symlinks=False)
            os.unlink(m.path / "d" / name)
            os.utime(m.path / name, ns=(1, 2), follow_symlinks=False)


@pytest.mark.parametrize("redirect", ["/../outside", "../outside", "..", "/..", "/dir/../../outside", ".", "", "a/b"])
def test_redirects_that_lead_out_are_not_followed(space: Path, canary: Path, redirect: str) -> None:
    """A layer from a stranger: overlay.redirect with '..' in it shows nothing of the outside."""
    low = layers.Layer(space / "low").file("dir/in", b"i")
    top = layers.Layer(space / "top").dir("evil")
    os.setxattr(top.at("evil"), "trusted.overlay.redirect", redirect.encode())
    with mounts.mounted("kernel", [low, top], space) as m:
        listed = error_of(os.listdir, m.path / "evil")
        if not listed:
            assert not {"secret", "outside", "lower"} & set(os.listdir(m.path / "evil"))
        assert error_of(read, m.path / "evil" / "secret") != ""
        assert read(m.path / "dir" / "in") == b"i"


@pytest.mark.parametrize("redirect", ["/../outside/secret", "../outside/secret", "/etc/passwd"])
def test_metacopy_that_leads_out_gives_no_data(space: Path, canary: Path, redirect: str) -> None:
    low = layers.Layer(space / "low").file("f", b"f")
    top = layers.Layer(space / "top").metacopy("evil", 6, redirect=redirect)
    with mounts.mounted("kernel", [low, top], space) as m:
        assert error_of(read, m.path / "evil") != "" or read(m.path / "evil") == bytes(6)


def test_a_lower_layers_directory_link_is_no_directory(space: Path, canary: Path) -> None:
    """lower: d -> outside; upper layer has d/ as directory: they do not merge."""
    low = layers.Layer(space / "low").symlink("d", str(canary))
    top = layers.Layer(space / "top").file("d/mine", b"m")
    with mounts.mounted("kernel", [low, top], space) as m:
        assert os.listdir(m.path / "d") == ["mine"]
        write(m.path / "d" / "secret", b"inside")
        os.unlink(m.path / "d" / "secret")


SWAPPER = """
import os, sys
mount, rounds = sys.argv[1], int(sys.argv[2])
os.chdir(mount)
import ctypes
libc = ctypes.CDLL(None)
for _ in range(rounds):
    libc.renameat2(-100, b"a/victim", -100, b"a/link", 2)
"""


def test_swapping_a_directory_for_a_link_while_others_work_in_it(space: Path, canary: Path) -> None:
    """A directory and a link to the outside change places thousands of times under a load of changes."""
    lower = layers.Layer(space / "lower").symlink("a/link", str(canary))
    for i in range(50):
        lower.file(f"a/victim/f{i}", b"x" * 5000).file(f"a/victim/sub/g{i}", b"y")
    with mounts.mounted("kernel", [lower], space) as m:
        swapper = subprocess.Popen([sys.executable, "-c", SWAPPER, str(m.path), "2000"])
        problems: list[str] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            # relative to the directory itself: what is done can only ever be meant for the inside
            fd = os.open(m.path / "a" / "victim", os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                while swapper.poll() is None:
                    name = f"f{rng.randrange(50)}"
                    choice = rng.randrange(6)
                    try:
                        if choice == 0:
                            os.chmod(name, 0o600, dir_fd=fd)
                        elif choice == 1:
                            file = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=fd)
                            os.write(file, b"z")
                            os.close(file)
                        elif choice == 2:
                            os.unlink(name, dir_fd=fd)
                        elif choice == 3:
                            os.rename(name, "moved", src_dir_fd=fd, dst_dir_fd=fd)
                        elif choice == 4:
                            os.mkdir(f"d{rng.randrange(20)}", dir_fd=fd)
                        else:
                            os.listdir(fd)
                    except OSError as error:
                        if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                            problems.append(str(error))
            finally:
                os.close(fd)

        threads = [threading.Thread(target=guarded, args=(work, seed, problems)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert swapper.wait() == 0
        assert problems == []
        assert m.handle.counters()["RENAME2"] >= 2000


def guarded(work: Callable[[int], None], seed: int, problems: list[str]) -> None:
    """Run ``work``, again while the link is in the directory's place."""
    while True:
        try:
            work(seed)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                problems.append(repr(error))
                return
            time.sleep(0.001)
        except Exception as error:  # noqa: BLE001  (a thread's failure must reach the test)
            problems.append(repr(error))
            return


def test_upper_directories_swapped_behind_the_server(space: Path, canary: Path) -> None:
    """Somebody with access to the upper replaces a directory by a link: refused, never followed."""
    lower = layers.Layer(space / "lower").file("d/low", b"l")
    with mounts.mounted("kernel", [lower], space) as m:
        write(m.path / "d" / "new", b"n")
        # held, so that the kernel asks about names in this very directory: looked up anew, it would be the link,
        # which the caller himself would follow
        held = os.open(m.path / "d", os.O_RDONLY | os.O_DIRECTORY)
        mounts.drop_caches(2)
        (space / "upper" / "d").rename(space / "upper" / "hidden")
        (space / "upper" / "d").symlink_to(canary)
        for call in (
            lambda: os.close(os.open("secret", os.O_WRONLY | os.O_TRUNC, dir_fd=held)),
            lambda: os.unlink("secret", dir_fd=held),
            lambda: os.chmod("secret", 0o777, dir_fd=held),
            lambda: os.mkdir("made", dir_fd=held),
            lambda: os.rename("in", m.path / "stolen", src_dir_fd=held),
        ):
            error_of(call)
        os.close(held)
        assert not (m.path / "stolen").exists()


def test_the_server_creates_nothing_readable_by_others_beside_the_upper(space: Path) -> None:
    """Work directory and scratch upper are 0700 whatever the umask."""
    import cowfs

    lower = layers.Layer(space / "layers" / "00-base").file("f", b"x")
    (space / "mnt").mkdir()
    old = os.umask(0)
    try:
        with cowfs.mount(str(space / "layers"), str(space / "mnt")):
            hidden = space / "layers" / ".cowfs"
            assert hidden.stat().st_mode & 0o077 == 0
    finally:
        os.umask(old)
    assert lower.path.exists()
