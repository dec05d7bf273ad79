"""The writes that an archive causes are bounded, whatever its own size; names of attributes and times survive or are refused."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support import hostfs
from support.archives import apply, directory, hardlink, member, symlink, tar

from cowfs.archive import DirTree, apply_layer, export_layer, header
from cowfs.archive.options import ApplyOptions
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded
from cowfs.sys import xattr

pytestmark = pytest.mark.root
GIB = 1 << 30


def sparse(name: str, size: int, *segments: tuple[int, bytes]) -> bytes:
    """A sparse file, PAX 1.0."""
    listed = header.sparse_map([*((offset, len(data)) for offset, data in segments), (size, 0)])
    body = listed + b"".join(data for _, data in segments)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(size)}
    return member(f"GNUSparseFile.0/{name}", body, pax=pax)


def used(path: Path) -> int:
    """Bytes on the disk."""
    return sum(
        os.lstat(os.path.join(where, name)).st_blocks * 512 for where, _, names in os.walk(path) for name in names
    )


def over(lower: Path, upper: Path, data: bytes, **options: Any) -> None:
    fd = os.open(lower, os.O_RDONLY | os.O_DIRECTORY)
    try:
        upper.mkdir()
        apply_layer(io.BytesIO(data), str(upper), lower=DirTree(fd), options=ApplyOptions(**options))
    finally:
        os.close(fd)


def test_a_hard_link_to_a_sparse_file_of_a_lower_layer_keeps_its_holes(space: Path) -> None:
    apply(tar(sparse("big", GIB, (0, b"head"), (GIB // 2, b"middle"), (GIB - 4, b"tail"))), space / "lower")
    over(space / "lower", space / "upper", tar(hardlink("link", "big")), max_bytes=1 << 20)
    made = space / "upper" / "link"
    assert made.stat().st_size == GIB
    assert used(space / "upper") < 1 << 20
    with open(made, "rb") as file:
        for offset, data in ((0, b"head"), (GIB // 2, b"middle"), (GIB - 4, b"tail")):
            file.seek(offset)
            assert file.read(len(data)) == data
    assert os.path.samefile(made, space / "upper" / "big")


def test_what_a_hard_link_brings_along_counts_for_the_bound(space: Path) -> None:
    apply(tar(member("big", os.urandom(3 << 20))), space / "lower")
    over(space / "lower", space / "enough", tar(hardlink("link", "big")), max_bytes=4 << 20)
    with pytest.raises(LimitExceeded, match="max-size"):
        over(space / "lower", space / "less", tar(hardlink("link", "big")), max_bytes=2 << 20)
    assert used(space / "less") <= 2 << 20


def test_all_the_hard_links_together_count(space: Path) -> None:
    apply(tar(*(member(f"f{number}", os.urandom(1 << 20)) for number in range(4))), space / "lower")
    links = tar(*(hardlink(f"l{number}", f"f{number}") for number in range(4)))
    with pytest.raises(LimitExceeded):
        over(space / "lower", space / "upper", links, max_bytes=3 << 20)


@pytest.mark.parametrize(
    ("bound", "message"), [({"max_bytes": 1 << 20}, "max-size"), ({"max_entries": 1000}, "max-entries")]
)
def test_directories_that_are_not_listed_count(space: Path, bound: dict[str, Any], message: str) -> None:
    """1.5 KiB of archive would make 500 directories, 2 MiB."""
    names = ["/".join([f"{number}", *["d"] * 500]) for number in range(10)]
    data = tar(*(member(name) for name in names))
    with pytest.raises(LimitExceeded, match=message):
        apply(data, space / "layer", options=ApplyOptions(**bound))


def test_pieces_of_sparse_files_count_as_what_they_take(space: Path) -> None:
    pieces = [(number * 8192, b"x") for number in range(2000)]
    data = tar(sparse("scattered", 2000 * 8192, *pieces))
    assert len(data) < 1 << 16
    with pytest.raises(LimitExceeded, match="max-size"):
        apply(data, space / "less", options=ApplyOptions(max_bytes=1 << 20))
    assert used(space / "less") <= 1 << 20
    apply(data, space / "enough", options=ApplyOptions(max_bytes=16 << 20))


def test_holes_that_are_written_over_do_not_fill_the_log(space: Path) -> None:
    """The data of a file that its own archive replaces is kept for reproducing it; holes of many files are not."""
    data = tar(*(sparse("again", (64 << 20) - 1, (0, b"x")) for _ in range(40)))
    log = io.BytesIO()
    apply(data, space / "layer", log=log)
    assert log.tell() < 2 << 20


def test_bytes_behind_the_end_are_bounded(monkeypatch: pytest.MonkeyPatch, space: Path) -> None:
    monkeypatch.setattr("cowfs.archive.reader._MAX_TRAILER", 1 << 20)
    apply(tar(member("f", b"x")) + bytes(1 << 19), space / "some")
    with pytest.raises(LimitExceeded, match="behind the end"):
        apply(tar(member("f", b"x")) + bytes(2 << 20), space / "more")


# Names of extended attributes ----------------------------------------------------------------------


NAMES = (
    "user.a=b",
    "user.p%q",
    "user.p%3Dq",
    "user.p%25q",
    "user.%",
    "user.=",
    "user.%%==%3d",
    "user.plain",
    "user.\u00fc=\u00fc",
)


def gnu_tar(*arguments: object) -> None:
    subprocess.run(["tar", "--xattrs", "--xattrs-include=*", *map(str, arguments)], check=True)


def attributes(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if name.startswith("user.")}


def test_names_of_attributes_go_both_ways_with_gnu_tar(space: Path) -> None:
    (space / "a").mkdir()
    file = space / "a" / "f"
    file.write_bytes(b"x")
    for name in NAMES:
        os.setxattr(file, name, b"value of " + name.encode())
    there = attributes(file)
    gnu_tar("--format=pax", "-cf", space / "gnu.tar", "-C", space / "a", ".")
    apply((space / "gnu.tar").read_bytes(), space / "ours")
    assert attributes(space / "ours" / "f") == there
    with open(space / "ours.tar", "wb") as out:
        export_layer(str(space / "a"), out, form="plain")
    (space / "theirs").mkdir()
    gnu_tar("-xf", space / "ours.tar", "-C", space / "theirs")
    assert attributes(space / "theirs" / "f") == there


@given(st.binary(min_size=1, max_size=60).filter(lambda name: b"\0" not in name))
@settings(deadline=None)
def test_any_name_of_an_attribute_is_read_back(name: bytes) -> None:
    key = header.xattr_pax(name)
    assert b"=" not in key
    assert header.pax_xattr(key) == name


@pytest.mark.parametrize("name", [b"user.100%", b"user.%2", b"user.%41", b"user.%zz"])
def test_what_other_writers_do_not_escape_is_as_it_is(name: bytes) -> None:
    assert header.pax_xattr(b"SCHILY.xattr." + name) == name
    assert header.pax_xattr(b"path") is None


def test_overlays_own_attributes_are_not_smuggled_in_escaped(space: Path) -> None:
    data = tar(
        member(
            "f",
            b"x",
            pax={"SCHILY.xattr.trusted.overlay.redirect%3D": "/x", "SCHILY.xattr.trusted%2Eoverlay.opaque": "y"},
        )
    )
    try:
        apply(data, space / "layer")
    except CowfsError:
        return
    assert not [
        name
        for name in xattr.read_all(os.open(space / "layer", os.O_RDONLY), b"f")
        if name.startswith(b"trusted.overlay.")
    ]


# Times ---------------------------------------------------------------------------------------------


@pytest.fixture
def whole_seconds(tmp_path: Path, can_mount: None) -> Iterator[Path]:
    """ext4 with inodes of 128 bytes: it keeps whole seconds, to 2038."""
    image, where = tmp_path / "image", tmp_path / "mnt"
    where.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-I", "128", image], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


FRACTION = {"mtime": "1600000000.5"}
LATE = [
    member("f", b"x", pax=FRACTION), directory("d", pax=FRACTION), symlink("l", "x", pax=FRACTION),
    member("p", type=b"6", pax=FRACTION), directory("./", pax=FRACTION),
]  # fmt: skip


@pytest.mark.parametrize("data", LATE, ids=["file", "directory", "link", "fifo", "root"])
def test_a_fraction_of_a_second_that_the_host_would_cut_is_an_error(whole_seconds: Path, data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="fraction"):
        apply(tar(data), whole_seconds / "layer")


def test_whole_seconds_are_fine_there(whole_seconds: Path) -> None:
    apply(tar(directory("./", mtime=5), member("f", b"x", mtime=1_600_000_000)), whole_seconds / "layer")
    assert os.stat(whole_seconds / "layer" / "f").st_mtime == 1_600_000_000


def test_fractions_are_kept_where_they_can_be(fs: hostfs.HostFs) -> None:
    times = ["1600000000.5", "1600000000.123456789", "1600000000.000000001", "1.999999999"]
    data = tar(*(member(f"f{number}", b"x", pax={"mtime": time}) for number, time in enumerate(times)))
    layer = fs.fresh()
    apply(data, layer)
    found = [os.stat(layer / f"f{number}").st_mtime_ns for number in range(len(times))]
    assert found == [header.parse_time(time.encode()) for time in times]
