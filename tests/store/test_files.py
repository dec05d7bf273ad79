"""Files of snapshots without a mount: random trees and random file work against a plain directory, for each way a tree is reached."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest
from support.trees import assert_same, snapshot

from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.store import Store

ROOT = os.geteuid() == 0
HOW = [
    "paths",
    pytest.param(
        "mounted",
        marks=pytest.mark.skipif(not (ROOT and os.path.exists("/dev/fuse")), reason="needs root and /dev/fuse"),
    ),
]


@pytest.fixture(params=["overlay", "row", "vfs"])
def store(space: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    with Store.open(space / "store", driver=request.param, fsync=False) as opened:
        yield opened


@pytest.fixture(params=HOW)
def key(store: Store, space: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """An active snapshot on a committed one, mounted or not."""
    store.prepare("seed")
    with store.paths("seed") as paths:
        paths.makedirs("old/deep")
        paths.write_bytes("old/deep/file", b"lower" * 50_000)
        paths.write_bytes("old/gone", b"x")
    store.commit("seed", "base")
    store.prepare("work", "base", size="512M")
    with ExitStack() as held:
        if request.param == "mounted":
            (space / "mnt").mkdir()
            held.enter_context(store.mount("work", space / "mnt"))
        yield "work"


NAMES = [
    "a",
    "b",
    "two words",
    "-dash",
    "ünï",
    "line\nbreak",
    "...",
    ".wh.a",
    b"\xff\xfe".decode("utf-8", "surrogateescape"),
    "n" * 255,
]


def random_tree(top: Path, rng: random.Random, count: int = 60) -> None:
    """Directories, files with and without holes, links of both kinds, FIFOs, modes, times and attributes."""
    directories: list[Path] = [top]
    files: list[Path] = []
    for number in range(count):
        where = rng.choice(directories) / (rng.choice(NAMES) if rng.random() < 0.4 else f"n{number}")
        if os.path.lexists(where) or len(os.fsencode(where)) > 3500:
            continue
        kind = rng.choice("ddffffffshp")
        if kind == "d":
            where.mkdir()
            directories.append(where)
        elif kind == "s":
            where.symlink_to(rng.choice(["/etc/passwd", "../..", "n1", "x" * 300, "loop"]))
        elif kind == "p":
            os.mkfifo(where)
        elif kind == "h" and files:
            os.link(rng.choice(files), where)
        else:
            write_some(where, rng)
            files.append(where)
        if rng.random() < 0.3 and kind != "s":
            os.chmod(where, rng.choice([0o755, 0o700, 0o640, 0o1777 if kind == "d" else 0o600]))
        if rng.random() < 0.2 and kind in "df" and where.exists():
            os.setxattr(where, "user.note", rng.randbytes(rng.choice([0, 5, 300])))
        os.utime(where, ns=(1, rng.choice([0, 1_700_000_000_123_456_789, 5])), follow_symlinks=False)


def write_some(path: Path, rng: random.Random) -> None:
    with path.open("wb") as file:
        for _ in range(rng.randrange(4)):
            file.seek(rng.choice([0, 1, 4096, 70_000, 3 << 20]), os.SEEK_CUR)
            file.write(rng.randbytes(rng.choice([1, 4096, 100_000])))
        if rng.random() < 0.3:
            file.truncate(rng.choice([0, 10, 5 << 20]))


def same(a: Path, b: Path) -> None:
    assert_same(snapshot(a), snapshot(b))


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_copied_in_and_out_is_the_same(store: Store, key: str, space: Path, seed: int) -> None:
    rng = random.Random(seed)
    (space / "plain").mkdir()
    random_tree(space / "plain", rng)
    store.copy_in(key, space / "plain", "/new")
    store.copy_out(key, "new", space / "live")
    same(space / "plain", space / "live")
    if key == "work" and (space / "mnt").exists():
        store.unmount(key)
    store.commit(key, "done")
    store.view("look", "done")
    for name in ("done", "look"):
        copied = store.copy_out(name, "new", space / name)
        same(space / "plain", space / name)
        assert copied.objects == sum(1 for _ in store.walk_files(name, "new"))
    found = {entry.path.removeprefix(b"new").lstrip(b"/"): entry for entry in store.walk_files("done", "/new")}
    walked = {b""}
    for at, directories, files in os.walk(os.fsencode(space / "plain")):
        walked |= {
            os.path.relpath(os.path.join(at, each), os.fsencode(space / "plain")) for each in directories + files
        }
    assert set(found) == walked
    for path, entry in found.items():
        st = os.lstat(os.path.join(os.fsencode(space / "plain"), path))
        assert (entry.mode, entry.mtime) == (stat.S_IMODE(st.st_mode), st.st_mtime_ns)
        assert entry.size == (st.st_size if stat.S_ISREG(st.st_mode) else 0)


@pytest.mark.parametrize("seed", range(3))
def test_file_objects_do_what_those_of_open_do(store: Store, key: str, space: Path, seed: int) -> None:
    """The same random calls on a file of the snapshot and on a plain one, one file of the lower layer among them."""
    rng = random.Random(seed)
    plain = space / "plain"
    plain.mkdir()
    (plain / "lower").write_bytes(b"lower" * 50_000)
    inside = {"lower": "old/deep/file", "one": "one", "two": "old/two"}
    for _ in range(25):
        which = rng.choice(list(inside))
        mode = rng.choice(["rb", "r+b", "wb", "w+b", "ab", "a+b", "xb"])
        try:
            ours = store.open_file(key, inside[which], mode)
        except OSError as error:
            with pytest.raises(type(error)):
                open(plain / which, mode)  # noqa: SIM115  it is not opened
            continue
        with ours, open(plain / which, mode) as theirs:
            for _ in range(rng.randrange(8)):
                steps(ours, theirs, rng, mode)
        with store.open_file(key, inside[which]) as file:
            assert file.read() == (plain / which).read_bytes()


def steps(ours: IO[Any], theirs: IO[Any], rng: random.Random, mode: str) -> None:
    offset, length = rng.choice([0, 1, 4095, 100_000, 300_000]), rng.choice([0, 1, 5000, 200_000])
    step = rng.choice(["seek", "read", "write", "truncate", "end", "flush"])
    data = rng.randbytes(length)
    calls = {
        "seek": lambda file: file.seek(offset),
        "end": lambda file: file.seek(0, os.SEEK_END),
        "read": lambda file: file.read(length),
        "write": lambda file: file.write(data),
        "truncate": lambda file: file.truncate(offset),
        "flush": lambda file: file.flush(),
    }
    results = []
    for file in (ours, theirs):
        try:
            results.append(calls[step](file))
        except io.UnsupportedOperation:
            results.append("unsupported")
    assert results[0] == results[1], (step, mode)
    assert ours.tell() == theirs.tell()


def test_text_modes_decode_and_refuse_what_open_refuses(store: Store, key: str) -> None:
    with store.open_file(key, "words", "w", newline="\r\n") as file:
        assert file.write("ä\nb\n") == 4
    with store.open_file(key, "words", "rt") as file:
        assert list(file) == ["ä\n", "b\n"]
    with store.open_file(key, "words") as file:
        assert file.read() == "ä\r\nb\r\n".encode()
    for wrong in ("", "q", "rw", "rbt", "bb+r+"):
        with pytest.raises(ValueError, match="mode"):
            store.open_file(key, "words", wrong)
    with pytest.raises(ValueError, match="encoding"):
        store.open_file(key, "words", "rb", encoding="ascii")


def test_links_are_followed_inside_the_snapshot_and_lead_nowhere_else(store: Store, key: str, space: Path) -> None:
    (space / "up").mkdir()
    (space / "up/etc").mkdir()
    (space / "up/etc/passwd").write_text("inside")
    (space / "up/absolute").symlink_to("/up/etc/passwd")
    (space / "up/climbs").symlink_to("../../../../../../../../up/etc/passwd")
    (space / "up/dir").symlink_to("etc")
    (space / "up/host").symlink_to("/etc/hostname")
    (space / "up/loop").symlink_to("loop")
    (space / "up/made").symlink_to("etc/made")
    store.copy_in(key, space / "up", "up")
    for path in ("up/absolute", "/up/climbs", "up/dir/passwd", "../../up/etc/./passwd", "up//etc/passwd"):
        with store.open_file(key, path, "r") as file:
            assert file.read() == "inside"
    for path, kind in (
        ("up/host", FileNotFoundError),
        ("up/loop", OSError),
        ("up/etc/passwd/x", NotADirectoryError),
        ("up/dir", IsADirectoryError),
        ("up/no", FileNotFoundError),
    ):
        with pytest.raises(kind):
            store.open_file(key, path)
    with store.open_file(key, "up/made", "w") as file:  # through a link that leads to nothing yet
        file.write("made")
    with store.open_file(key, "up/etc/made", "r") as file:
        assert file.read() == "made"
    assert store.stat_file(key, "up/dir").type == "dir"
    assert store.stat_file(key, "up/dir", follow=False).target == b"etc"
    assert not (space / "etc").exists()


def test_what_is_written_counts_for_the_limit_and_leaves_no_half_file(store: Store, space: Path) -> None:
    store.prepare("small", size="1M")
    (space / "big").write_bytes(os.urandom(3 << 20))
    with pytest.raises(OSError, match="No space"):
        store.copy_in("small", space / "big", "big")
    assert [entry.path for entry in store.walk_files("small")] == [b""]
    with store.open_file("small", "ok", "wb") as file:
        file.write(bytes(1000))
    with pytest.raises(OSError, match="No space"), store.open_file("small", "two", "wb") as file:
        file.write(os.urandom(2 << 20))
    assert store.usage("small").bytes <= 1 << 20


def test_what_is_committed_is_read_only_and_no_file_keeps_a_key_in_use(store: Store, space: Path) -> None:
    store.prepare("k")
    with store.open_file("k", "f", "w") as file:
        file.write("1")
        with pytest.raises(FailedPrecondition):
            store.commit("k", "c")
        with pytest.raises(FailedPrecondition):
            store.open_file("k", "f", "w")
    store.commit("k", "c")
    for mode in ("w", "a", "r+", "x"):
        with pytest.raises(FailedPrecondition):
            store.open_file("c", "f", mode)
    with pytest.raises(FailedPrecondition):
        store.copy_in("c", space, "x")
    with pytest.raises(NotFound):
        store.open_file("nothing", "f")
    with pytest.raises(NotFound):
        store.copy_in("nothing", space, "f")
    with pytest.raises(FileNotFoundError):
        store.copy_out("c", "nothing", space / "x")
    assert not (space / "x").exists()
    with store.open_file("c", "f", "r") as file:
        assert file.read() == "1"
        store.remove("c")  # a committed snapshot is not held; its open files go on
        assert file.read() == ""


def test_a_key_that_another_verb_uses_is_read_all_the_same(store: Store) -> None:
    store.prepare("k")
    with store.paths("k") as paths:
        paths.write_bytes("f", b"now")
        with store.open_file("k", "f") as file:
            assert file.read() == b"now"


def test_kinds_that_collide_are_errors_and_nothing_is_lost(store: Store, key: str, space: Path) -> None:
    (space / "file").write_text("f")
    (space / "dir").mkdir()
    (space / "dir/gone").mkdir()
    (space / "dir/gone/x").write_text("x")
    with pytest.raises(IsADirectoryError):
        store.copy_in(key, space / "file", "old/deep")
    with pytest.raises(NotADirectoryError):
        store.copy_in(key, space / "dir", "old")
    with pytest.raises(FileNotFoundError):
        store.copy_in(key, space / "file", "no/such/place")
    assert {entry.path for entry in store.walk_files(key, "old")} >= {b"old/deep/file", b"old/gone"}
    with store.open_file(key, "old/deep/file") as file:
        assert file.read() == b"lower" * 50_000


@pytest.mark.parametrize("seed", range(3))
def test_a_tar_out_and_in_is_the_same_tree(store: Store, key: str, space: Path, seed: int) -> None:
    """By our own tar and by tar(1)'s, in both directions."""
    (space / "plain").mkdir()
    random_tree(space / "plain", random.Random(100 + seed))
    store.copy_in(key, space / "plain", "one")
    with (space / "out.tar").open("wb") as out:
        store.copy_out_tar(key, "/one", out)
    with (space / "out.tar").open("rb") as stream, store.writable_tree(key) as tree:
        tree.mkdir(b"two")
    with (space / "out.tar").open("rb") as stream:
        store.copy_in_tar(key, stream, "two", owners=ROOT)
    store.copy_out(key, "two/one", space / "back")
    same(space / "plain", space / "back")
    (space / "by-tar").mkdir()
    subprocess.run(["tar", "-xpf", space / "out.tar", "--xattrs", "-C", space / "by-tar"], check=True)
    same(space / "plain", space / "by-tar/one")
    subprocess.run(["tar", "--posix", "--xattrs", "-Sczf", space / "in.tar.gz", "-C", space, "plain"], check=True)
    with (space / "in.tar.gz").open("rb") as stream:
        store.copy_in_tar(key, stream, "/", owners=ROOT)
    store.copy_out(key, "plain", space / "again")
    same(space / "plain", space / "again")


def test_a_hostile_tar_stays_inside(store: Store, key: str, space: Path) -> None:
    """Links in the archive lead inside the snapshot's root; names that climb, and links to what is not there, are refused."""

    def tar(*members: tuple[str, bytes, str]) -> io.BytesIO:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as made:
            for name, kind, link in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = kind, link, 0 if link or kind == tarfile.DIRTYPE else 4
                made.addfile(info, io.BytesIO(b"data"))
        out.seek(0)
        return out

    store.copy_in_tar(
        key,
        tar(
            ("out", tarfile.SYMTYPE, "/../../../tmp/x"), ("tmp/x", tarfile.DIRTYPE, ""), ("out/f", tarfile.REGTYPE, "")
        ),
        "/",
    )
    with store.open_file(key, "tmp/x/f") as file:
        assert file.read() == b"data"
    for bad in (
        [("../up", tarfile.REGTYPE, "")],
        [("a/../../up", tarfile.REGTYPE, "")],
        [("link", tarfile.LNKTYPE, "../../etc/passwd")],
        [("link", tarfile.LNKTYPE, "etc/nothing")],
        [("old", tarfile.REGTYPE, "")],
        [("old/gone/below", tarfile.REGTYPE, "")],
    ):
        with pytest.raises(InvalidArgument):
            store.copy_in_tar(key, tar(*bad), "/")
    with pytest.raises(InvalidArgument):
        store.copy_in_tar(key, io.BytesIO(b"not a tar" * 100), "/")
    with pytest.raises(NotADirectoryError):
        store.copy_in_tar(key, tar(("f", tarfile.REGTYPE, "")), "old/gone")
    with pytest.raises(FileNotFoundError):
        store.copy_in_tar(key, tar(("f", tarfile.REGTYPE, "")), "nowhere")
    with store.open_file(key, "old/gone") as file:
        assert file.read() == b"x"


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_owners_and_set_id_bits_are_kept_only_on_request(store: Store, key: str, space: Path) -> None:
    (space / "tool").write_text("t")
    os.chown(space / "tool", 1234, 4321)
    os.chmod(space / "tool", 0o4755)
    os.setxattr(space / "tool", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    store.copy_in(key, space / "tool", "plain")
    store.copy_in(key, space / "tool", "kept", owners=True)
    plain, kept = store.stat_file(key, "plain"), store.stat_file(key, "kept")
    assert (plain.uid, plain.gid, plain.mode) == (0, 0, 0o755)
    assert (kept.uid, kept.gid, kept.mode) == (1234, 4321, 0o4755)
    store.copy_out(key, "kept", space / "out", owners=True)
    assert os.getxattr(space / "out", "security.capability")
    store.copy_out(key, "kept", space / "mine")
    assert os.stat(space / "mine").st_uid == 0
    assert os.listxattr(space / "mine") == []


def test_a_tree_a_thousand_deep_goes_in_and_out(store: Store, key: str) -> None:
    with store.writable_tree(key) as tree:
        path = b""
        for _ in range(1000):
            path = path + b"/d" if path else b"d"
            tree.mkdir(path)
    assert sum(1 for _ in store.walk_files(key, "d")) == 1000
