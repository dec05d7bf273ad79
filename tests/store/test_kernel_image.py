"""Kernel mounts through an image of a snapshot's metadata: the same tree as the FUSE mount, one lower layer whatever the chain."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import trees

from cowfs.cli import main
from cowfs.errors import Corrupt, FailedPrecondition, NotFound, Unsupported
from cowfs.mounting import client
from cowfs.mounting.kernel import KernelMount
from cowfs.store import Store, kernel_image
from cowfs.sys import loop, mounts
from cowfs.sys.mounts import mountinfo

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="kernel mounts: needs root")


@pytest.fixture(params=["overlay", "row"])
def store(request: pytest.FixtureRequest, tmp_path: Path, can_mount: None) -> Iterator[Store]:
    """A store on a file system that images can be mounted from (not tmpfs)."""
    for name in ("fuse", "kernel"):
        (tmp_path / name).mkdir()
    options = {"block": request.node.callspec.params.get("block", 4096)} if request.param == "row" else {}
    with Store.open(tmp_path / "store", driver=request.param, fsync=False, **options) as opened:
        yield opened


def place(store: Store, name: str) -> Path:
    return Path(store.root).parent / name


def step(rng: random.Random, top: Path) -> None:
    """One random change."""
    found = sorted(path for path in top.rglob("*"))
    dirs = [top, *[path for path in found if path.is_dir() and not path.is_symlink()]]
    files = [path for path in found if path.is_file() and not path.is_symlink()]
    new = rng.choice(dirs) / f"n{rng.randrange(40)}"
    what = rng.randrange(15)
    if what <= 2 and not os.path.lexists(new):
        new.write_bytes(rng.randbytes(rng.choice((0, 1, 5000, 200_000))))
        os.utime(new, ns=(0, rng.randrange(2**61)))
    elif what == 3 and not os.path.lexists(new):
        new.mkdir(mode=rng.choice((0o755, 0o2770, 0o1777)))
    elif what == 4 and not os.path.lexists(new):
        new.symlink_to("x/" * rng.randrange(1, 150))
    elif what == 5 and not os.path.lexists(new):
        os.mknod(new, rng.choice((0o010644, 0o020600, 0o060600)), os.makedev(7, 300))
    elif not files:
        return
    elif what == 6:
        rng.choice(files).unlink()
    elif what == 7 and not os.path.lexists(new):
        os.link(rng.choice(files), new)
    elif what == 8:
        os.chown(rng.choice(files), rng.randrange(70_000), 7)
    elif what == 9:
        chosen = rng.choice(files)
        os.setxattr(
            chosen, rng.choice(("user.a", "trusted.b", "trusted.overlay.metacopy", "security.x")), rng.randbytes(20)
        )
    elif what == 10:
        with open(rng.choice(files), "r+b") as file:
            file.write(b"changed")
    elif what in (12, 13):
        chosen = rng.choice(files)
        with open(chosen, "r+b") as file:
            for _ in range(rng.randrange(1, 5)):
                file.seek(rng.randrange(chosen.stat().st_size + 9000))
                file.write(rng.randbytes(rng.choice((1, 4096, 20_000))))
    elif what == 14:
        chosen = rng.choice(files)
        os.truncate(chosen, rng.randrange(chosen.stat().st_size + 9000))
    else:
        old = rng.choice(dirs[1:] or files)
        if not os.path.lexists(new) and not str(new).startswith(f"{old}/"):
            old.rename(new)


def both(store: Store, name: str) -> tuple[trees.Tree, trees.Tree]:
    """The trees of a committed snapshot in the FUSE mount and in the kernel's."""
    seen = []
    for kind in ("fuse", "kernel"):
        store.prepare(f"see-{kind}", name)
        with store.mount(f"see-{kind}", place(store, kind), mount_type=kind):
            if kind == "kernel":
                (entry,) = (e for e in mountinfo() if os.fsdecode(e.target) == str(place(store, kind)))
                assert entry.super_options.count(b"lowerdir+=") == 1, "the image was not used"
            seen.append(trees.snapshot(str(place(store, kind))))
        store.remove(f"see-{kind}")
    return seen[0], seen[1]


@pytest.mark.parametrize(("seed", "block"), [(0, 4096), (1, 65536), (2, 4096), (3, 1 << 20)])
def test_the_kernel_shows_what_the_fuse_mount_shows(store: Store, seed: int, block: int) -> None:
    """Names, types, modes, owners, times to the nanosecond, xattrs (escaped ones too), link counts and groups, content.

    Of redirected blocks, too: files of all layers' blocks, cut off within a block, and longer than what they stand on.
    """
    rng = random.Random(seed)
    parent = None
    for number in range(6):
        store.prepare("key", parent)
        with store.mount("key", place(store, "fuse")):
            for _ in range(60):
                step(rng, place(store, "fuse"))
        parent = f"c{number}"
        store.commit("key", parent)
        fuse, kernel = both(store, parent)
        assert trees.differences(fuse, kernel) == []


def test_changes_through_the_kernel_are_committed(store: Store) -> None:
    """Copied up, renamed, deleted beneath an image: the layer is an ordinary one, and the next snapshot shows it."""
    store.prepare("key")
    with store.mount("key", place(store, "fuse")):
        for name in ("changed", "removed", "chmodded"):
            (place(store, "fuse") / "dir").mkdir(exist_ok=True)
            (place(store, "fuse") / "dir" / name).write_text(name)
    store.commit("key", "base")
    store.prepare("key", "base")
    with store.mount("key", place(store, "kernel"), mount_type="kernel"):
        top = place(store, "kernel")
        with open(top / "dir" / "changed", "a") as file:
            file.write("!")
        (top / "dir" / "removed").unlink()
        (top / "dir" / "chmodded").chmod(0o600)
        (top / "dir").rename(top / "moved")
    store.commit("key", "next")
    assert store.check(content=True).damage == []
    fuse, kernel = both(store, "next")
    assert trees.differences(fuse, kernel) == []
    assert sorted(fuse) == sorted([".", "moved", "moved/changed", "moved/chmodded"]) or "moved/changed" in fuse


def test_names_of_a_metacopy_are_not_those_of_the_file_with_its_data(store: Store) -> None:
    """Links broken by the kernel when one name was changed, and a new name of that: two files, whose data is in one place."""
    top = place(store, "kernel")
    store.prepare("key")
    with store.mount("key", place(store, "fuse")):
        (place(store, "fuse") / "f").write_text("f")
        os.link(place(store, "fuse") / "f", place(store, "fuse") / "g")
    store.commit("key", "base")
    store.prepare("key", "base")
    with store.mount("key", top, mount_type="kernel"):
        (top / "f").chmod(0o600)
        os.link(top / "f", top / "h")
        seen = {name: (top / name).stat().st_mode & 0o777 for name in "fgh"}
    store.commit("key", "next")
    assert seen == {"f": 0o600, "g": 0o644, "h": 0o600}
    for tree in both(store, "next"):
        assert {name: tree[name].mode for name in "fgh"} == seen
        assert (tree["f"].same_as, tree["g"].same_as, tree["h"].same_as) == ("f", "", "f")


def test_a_view_needs_no_upper(store: Store) -> None:
    store.prepare("key")
    with store.mount("key", place(store, "fuse")):
        (place(store, "fuse") / "f").write_text("f")
    store.commit("key", "base")
    store.view("view", "base")
    handle = store.mount("view", place(store, "kernel"), mount_type="kernel")
    assert (place(store, "kernel") / "f").read_text() == "f"
    with pytest.raises(OSError):
        (place(store, "kernel") / "g").write_text("")
    assert store.mounted_at("view") == str(place(store, "kernel"))
    (status,) = (s for s in client.mounts() if s.mountpoint == str(place(store, "kernel")))
    assert status.details["engine"] == "kernel"
    store.unmount("view")
    assert store.mounted_at("view") is None
    with pytest.raises(NotFound):
        store.unmount("view")
    del handle


def test_the_command_knows_a_kernel_mount(store: Store) -> None:
    """cowfs umount takes it off like any other."""
    store.prepare("key")
    store.commit("key", "base")
    store.prepare("key", "base")
    store.mount("key", place(store, "kernel"), mount_type="kernel")
    client.umount(place(store, "kernel"))
    assert store.mounted_at("key") is None


def test_images_are_made_anew_and_collected(store: Store) -> None:
    """Of other layers (squash) another image; gc removes what no snapshot has; a damaged one is found."""
    parent = None
    for number in range(3):
        store.prepare("key", parent)
        with store.mount("key", place(store, "fuse")):
            (place(store, "fuse") / f"f{number}").write_text("f" * number)
        parent = f"c{number}"
        store.commit("key", parent)
    both(store, "c2")
    folder = Path(store.root) / kernel_image.FOLDER
    (first,) = folder.iterdir()
    assert kernel_image.check(str(first)) is None
    store.squash("c1")
    fuse, kernel = both(store, "c2")
    assert trees.differences(fuse, kernel) == []
    assert len(list(folder.iterdir())) == 2
    assert store.gc().directories == (f"{kernel_image.FOLDER}/{first.name}",)
    (second,) = folder.iterdir()
    data = bytearray(second.read_bytes())
    data[1024:1040] = bytes(16)
    second.write_bytes(data)
    assert "not what its digest says" in (kernel_image.check(str(second)) or "")


def test_a_chain_of_many_layers_is_one(store: Store) -> None:
    parent = None
    for number in range(150):
        store.prepare("key", parent)
        with store.paths("key") as paths:
            paths.write_bytes(f"f{number}".encode(), b"%d" % number)
        parent = f"c{number}"
        store.commit("key", parent)
    store.prepare("key", parent)
    with store.mount("key", place(store, "kernel"), mount_type="kernel"):
        assert len(os.listdir(place(store, "kernel"))) == 150
        for number in range(0, 150, 10):
            assert (place(store, "kernel") / f"f{number}").read_text() == str(number)


def change_some(store: Store) -> None:
    """A snapshot "base" with a file "big", and "key" on it, which changed some of that."""
    store.prepare("key")
    with store.mount("key", place(store, "fuse")):
        (place(store, "fuse") / "big").write_bytes(b"b" * 100_000)
    store.commit("key", "base")
    store.prepare("key", "base")
    with store.mount("key", place(store, "fuse")), open(place(store, "fuse") / "big", "r+b") as file:
        file.write(b"changed")


def test_an_upper_with_redirected_blocks_is_refused(store: Store) -> None:
    """The kernel would show the sparse file; what compact makes of it, it can show."""
    if not store.driver.capabilities.row:
        pytest.skip("a driver without redirect files")
    change_some(store)
    with pytest.raises(FailedPrecondition, match="redirected blocks of 'big'"):
        store.mount("key", place(store, "kernel"), mount_type="kernel")
    assert store.mounted_at("key") is None
    store.compact("key", share=0)
    with store.mount("key", place(store, "kernel"), mount_type="kernel"):
        assert (place(store, "kernel") / "big").read_bytes() == b"changed" + b"b" * 99_993


def test_a_file_that_an_image_points_into_must_be_what_it_was(store: Store) -> None:
    """Cut short behind the store's back: the kernel would read errors in the middle; nothing is mounted, and it is told."""
    if not store.driver.capabilities.row:
        pytest.skip("a driver without redirect files")
    change_some(store)
    store.commit("key", "next")
    fuse, kernel = both(store, "next")
    assert trees.differences(fuse, kernel) == []
    layer = Path(store.driver.tree(store.index.get("base").id))
    os.truncate(layer / "big", 50_000)
    store.view("view", "next")
    with pytest.raises(Corrupt, match="not as large as it was"):
        store.mount("view", place(store, "kernel"), mount_type="kernel")
    (image,) = (Path(store.root) / kernel_image.FOLDER).iterdir()
    os.truncate(image, image.stat().st_size - 1)
    assert "not what its digest says" in (kernel_image.check(str(image)) or "")


def test_where_no_file_backs_an_image_a_loop_device_does(space: Path, can_mount: None, store: Store) -> None:
    """A store on tmpfs: the image through a loop device that goes with the mount. Not one that points into files: the kernel reads those wrong."""
    with Store.open(space / "store", driver=store.driver.name, fsync=False) as other:
        for name in ("base", "next"):
            other.prepare("key", "base" if name == "next" else None)
            with other.mount("key", place(store, "fuse")):
                with open(place(store, "fuse") / "big", "a+b" if name == "base" else "r+b") as file:
                    file.write(b"b" * 100_001 if name == "base" else b"changed")
                (place(store, "fuse") / name).touch()
            other.commit("key", name)
        other.prepare("key", "next")
        if store.driver.name == "row":
            assert "from files of tmpfs" in other.describe()["kernel mounts"]
            with pytest.raises(Unsupported, match="cannot read redirect files"):
                other.mount("key", place(store, "kernel"), mount_type="kernel")
            return
        assert "EROFS image" in other.describe()["kernel mounts"]
        with other.mount("key", place(store, "kernel"), mount_type="kernel"):
            assert (place(store, "kernel") / "big").read_bytes() == b"changed" + b"b" * 99_994
            (place(store, "kernel") / "new").touch()
        for device in os.listdir("/sys/block"):
            backing = Path(f"/sys/block/{device}/loop/backing_file")
            assert not backing.exists() or other.root not in backing.read_text()


def test_where_images_cannot_be_the_reason_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No EROFS in the kernel: info says so, overlay takes all layers, and row says why it cannot."""

    def without(*arguments: object) -> int:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    store.prepare("key")
    store.commit("key", "base")
    store.prepare("key", "base")
    assert "EROFS image" in store.describe()["kernel mounts"]
    assert "an EROFS image" in store.describe()["engines"]
    monkeypatch.setattr(mounts, "image_mount", without)
    monkeypatch.setattr(loop, "why_no_images", lambda place, devices=False: "this kernel has no EROFS")
    assert "this kernel has no EROFS" in store.describe()["kernel mounts"]
    assert "this kernel has no EROFS" in store.describe()["engines"]
    if store.driver.name == "row":
        with pytest.raises(Unsupported, match=r"cannot read redirect files.*No such device"):
            store.mount("key", place(store, "kernel"), mount_type="kernel")
        assert not os.path.ismount(place(store, "kernel"))
    else:
        with store.mount("key", place(store, "kernel"), mount_type="kernel"):
            assert os.path.ismount(place(store, "kernel"))
    with store.mount("key", place(store, "kernel"), limit_engine="auto") as handle:
        assert isinstance(handle, KernelMount) == (store.driver.name == "overlay")


def test_options_of_a_mount_are_kept_or_refused(store: Store) -> None:
    """nodev and the like hold in a mount of the kernel; what only a server does is no mount of the kernel."""
    store.prepare("key")
    store.commit("key", "base")
    store.prepare("key", "base")
    store.view("view", "base")
    top = place(store, "kernel")
    with store.mount("key", top, mount_type="kernel", options="nodev,nosuid,noexec"):
        flags = os.statvfs(top).f_flag
        assert flags & os.ST_NODEV
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NOEXEC
        (top / "f").touch()
    with store.mount("view", top, mount_type="kernel", options=["ro"]):
        assert os.statvfs(top).f_flag & os.ST_RDONLY
    for more in (
        {"volatile": True},
        {"uid_map": ((0, 1, 1),)},
        {"io": "passthrough"},
        {"options": "noatime"},
        {"options": "ro"},
    ):
        with pytest.raises(Unsupported):
            store.mount("key", top, mount_type="kernel", **more)
        assert not os.path.ismount(top)
    with store.mount("key", top, limit_engine="auto", uid_map=((0, 1000, 10),)) as handle:
        assert not isinstance(handle, KernelMount)


def test_an_image_is_made_at_commit_where_that_is_asked_for(store: Store, space: Path) -> None:
    """And the mount that comes takes it; where the kernel mounts none, nothing is committed."""
    store.prepare("key")
    with store.mount("key", place(store, "fuse")):
        (place(store, "fuse") / "f").write_text("f")
    store.commit("key", "base", kernel_image=True)
    (image,) = (Path(store.root) / kernel_image.FOLDER).iterdir()
    made = image.stat()
    store.prepare("key", "base")
    with store.mount("key", place(store, "kernel"), mount_type="kernel"):
        assert (place(store, "kernel") / "f").read_text() == "f"
    assert image.stat() == made
    assert main(["commit", "--root", store.root, "key", "next", "--kernel-image"]) == 0
    assert len(list((Path(store.root) / kernel_image.FOLDER).iterdir())) == 2
    with Store.open(space / "store", driver="vfs", fsync=False) as other:
        other.prepare("key")
        with pytest.raises(Unsupported, match="whole tree"):
            other.commit("key", "base", kernel_image=True)
        assert other.stat("key").kind.value == "active"
