"""Images of snapshots as files: whole or missing, made once, compared with their digest; whatever happens to their makers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hostfs, namespace

from cowfs.store import Store, image_files, kernel_image
from cowfs.sys import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="kernel mounts: needs root")


@pytest.fixture
def store(tmp_path: Path, can_mount: None) -> Iterator[Store]:
    """base < key; 300 files. Not on tmpfs, where images are not mounted from files."""
    (tmp_path / "mnt").mkdir()
    with Store.open(tmp_path / "store", driver="overlay", fsync=False) as made:
        fill(made)
        yield made


def fill(store: Store) -> None:
    store.prepare("key")
    with store.paths("key") as paths:
        for number in range(300):
            paths.write_bytes(b"f%d" % number, b"%d" % number)
    store.commit("key", "base")
    store.prepare("key", "base")


def build(store: Store) -> Path:
    return Path(kernel_image.build(store.driver, store.index, store.index.get("base")))


def names(store: Store) -> list[str]:
    return sorted(os.listdir(Path(store.root) / kernel_image.FOLDER))


def lowers(place: Path) -> int:
    """The number of lower layers of the kernel's mount there, data-only ones left out."""
    (entry,) = (each for each in mounts.mountinfo() if os.fsdecode(each.target) == str(place))
    return entry.super_options.count(b"lowerdir+=")


def test_threads_and_processes_at_once_make_one(store: Store) -> None:
    """Each gets the whole image; a second thread of one process, too, whose temporary file would have the same name."""
    code = "import sys\nfrom cowfs.store import Store, kernel_image\nwith Store.open(sys.argv[1]) as s: print(kernel_image.build(s.driver, s.index, s.index.get('base')))"
    found: list[object] = []

    def one() -> None:
        try:
            with Store.open(store.root, fsync=False) as own:
                found.append(kernel_image.check(str(build(own))))
        except BaseException as error:  # noqa: BLE001  told to the test
            found.append(error)

    others = [subprocess.Popen([sys.executable, "-c", code, store.root], stdout=subprocess.PIPE) for _ in range(2)]
    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 6
    for other in others:
        assert other.communicate()[0].strip() == os.fsencode(build(store))
        assert other.returncode == 0
    assert len(names(store)) == 1


def test_a_second_maker_waits_and_makes_none(store: Store) -> None:
    made: list[Path] = []
    image = build(store)
    image.unlink()
    with image_files.locked(str(image.parent), wait=True) as free:
        assert free
        thread = threading.Thread(target=lambda: made.append(build_of(store.root)))
        thread.start()
        (image.parent / (image.name + image_files.UNFINISHED)).write_bytes(b"being made")
        assert store.gc().directories == ()  # not garbage while its maker has the lock
        assert not made
    thread.join()
    assert made == [image]
    assert names(store) == [image.name]


def build_of(root: str) -> Path:
    with Store.open(root, fsync=False) as own:
        return build(own)


KILLED = """
import os, sys
from cowfs.erofs import writer
from cowfs.store import Store, kernel_image
count = 0
leaf = writer._Writer._leaf
def killed(self, inode):
    global count
    count += 1
    if count == 200: os.kill(os.getpid(), 9)
    return leaf(self, inode)
writer._Writer._leaf = killed
with Store.open(sys.argv[1]) as s: kernel_image.build(s.driver, s.index, s.index.get("base"))
"""


def test_what_a_killed_maker_left_is_garbage(store: Store, tmp_path: Path) -> None:
    for collect in (True, False):
        assert subprocess.run([sys.executable, "-c", KILLED, store.root], check=False).returncode == -9
        (left,) = names(store)
        assert left.endswith(image_files.UNFINISHED)
        if collect:
            assert store.gc().directories == (f"{kernel_image.FOLDER}/{left}",)
            assert names(store) == []
    with store.mount("key", tmp_path / "mnt", mount_type="kernel"):
        assert lowers(tmp_path / "mnt") == 1
        assert (tmp_path / "mnt" / "f7").read_text() == "7"
    assert names(store) == [left.removesuffix(image_files.UNFINISHED)]


@pytest.mark.parametrize("at", [0, 1024, 5000, -40, -1])
def test_a_damaged_image_is_made_again_by_the_next_mount(store: Store, tmp_path: Path, at: int) -> None:
    """One byte, wherever: of the metadata, of the seal."""
    image = build(store)
    whole = image.read_bytes()
    data = bytearray(whole)
    data[at] ^= 1
    image.write_bytes(data)
    assert kernel_image.check(str(image)) == "it is not what its digest says"
    assert [problem.kind for problem in store.check(content=True).problems] == ["image"]
    with store.mount("key", tmp_path / "mnt", mount_type="kernel"):
        assert lowers(tmp_path / "mnt") == 1
        assert sorted(os.listdir(tmp_path / "mnt")) == sorted(f"f{number}" for number in range(300))
    assert image.read_bytes() == whole
    assert store.check(content=True).problems == []


@pytest.mark.parametrize("size", [0, 10, 32, 4096])
def test_a_short_image_is_made_again(store: Store, tmp_path: Path, size: int) -> None:
    image = build(store)
    os.truncate(image, size)
    with store.mount("key", tmp_path / "mnt", mount_type="kernel"):
        assert (tmp_path / "mnt" / "f7").read_text() == "7"
    assert kernel_image.check(str(image)) is None


def test_a_copied_image_is_compared_again(store: Store) -> None:
    """The mark is of one file, unchanged, in one boot: a copy with all its xattrs and times is another file."""
    image = build(store)
    assert image_files.is_sound(str(image))
    other = image.with_name("other")
    subprocess.run(["cp", "-a", "--preserve=all", image, other], check=True)
    times = (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    with other.open("r+b") as file:
        file.seek(2000)
        file.write(b"other")
    os.utime(other, ns=times)
    other.rename(image)
    assert os.getxattr(image, "user.cowfs.seen")
    assert not image_files.is_sound(str(image))


def test_on_a_full_disk_nothing_is_left_and_all_layers_are_mounted(tmp_path: Path, can_mount: None) -> None:
    (tmp_path / "mnt").mkdir()
    small = hostfs.make_tmpfs(tmp_path, "24m")
    try:
        with Store.open(small / "store", driver="overlay", fsync=False) as store:
            fill(store)
            Path(store.root, kernel_image.FOLDER).mkdir()
            filler = small / "filler"
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
            with store.mount("key", tmp_path / "mnt", mount_type="kernel"):
                assert (tmp_path / "mnt" / "f7").read_text() == "7"
            assert names(store) == []
            filler.unlink()
            with store.mount("key", tmp_path / "mnt", mount_type="kernel"):
                assert (tmp_path / "mnt" / "f7").read_text() == "7"
            assert len(names(store)) == 1
    finally:
        hostfs.unmount_below(tmp_path)


@pytest.mark.parametrize("made", [True, False])
def test_a_view_in_a_read_only_store_is_mounted(store: Store, tmp_path: Path, made: bool) -> None:
    """Through the image that is there; through the layers where none is."""
    store.view("view", "base")
    if made:
        build(store)
    namespace.mount(str(store.root), str(store.root), "", mounts.MS_BIND)
    try:
        mounts.remount_bind(str(store.root), mounts.MS_RDONLY)
        with Store.open(store.root) as other, other.mount("view", tmp_path / "mnt", mount_type="kernel"):
            assert (tmp_path / "mnt" / "f7").read_text() == "7"
            assert not made or lowers(tmp_path / "mnt") == 1
    finally:
        mounts.umount(store.root, mounts.MNT_DETACH)
