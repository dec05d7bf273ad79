"""Redirect files: what is stored, long chains, limits, compaction, damage."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.format import redirect
from cowfs.format.whiteout import choose_form
from cowfs.model import Limit
from cowfs.row import compact as row_compact, layer as row_layer, map as row_map
from cowfs.row.file import RowFile
from cowfs.row.redirects import Rows
from cowfs.row.view import View
from cowfs.sys import files, xattr
from cowfs.union import Options
from cowfs.union.paths import Paths
from cowfs.union.quota import measure

BLOCK = 4096
FORM = choose_form()


class Stack:
    """Layer directories as the row driver makes them, opened one above the other."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.trees: list[str] = []
        self.view: View | None = None

    def layer(self) -> Path:
        path = self.place / f"{len(self.trees):03}"
        (path / "fs").mkdir(parents=True)
        (path / "work").mkdir()
        self.trees.append(str(path / "fs"))
        return path / "fs"

    def open(self, **options: object) -> Paths:
        self.close()
        work = os.path.join(os.path.dirname(self.trees[-1]), "work")
        made = Options(**{"row": BLOCK, **options})  # type: ignore[arg-type]
        self.view = View(list(reversed(self.trees[:-1])), self.trees[-1], work, options=made)
        return Paths(self.view)

    def close(self) -> None:
        if self.view is not None:
            self.view.close()
            self.view = None

    def map_dir(self) -> Path:
        return Path(self.trees[-1]).parent / "map"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()


def fill(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_the_first_write_stores_one_block_whatever_the_size(stack: Stack) -> None:
    with (stack.layer() / "big").open("wb") as file:
        file.truncate(10 << 30)
    upper = stack.layer()
    paths = stack.open()
    paths.write_at("big", 5 << 30, b"here")
    st = os.stat(upper / "big")
    assert st.st_size == 10 << 30
    assert st.st_blocks * 512 <= 4 * BLOCK  # the host's own blocks for extents and xattrs included
    assert paths.read_bytes("big", 5 << 30, 6) == b"here\0\0"
    assert stack.view is not None
    assert stack.view.usage().bytes == BLOCK


def test_aligned_writes_are_amplified_by_the_map_only(stack: Stack) -> None:
    (stack.layer() / "big").write_bytes(fill(4 << 20))
    stack.layer()
    paths = stack.open()
    blocks = random.Random(2).sample(range(1024), 200)
    for block in blocks:
        paths.write_at("big", block * BLOCK, bytes(BLOCK))
    (log,) = stack.map_dir().iterdir()
    assert log.stat().st_size <= row_map.HEAD_SIZE + len(blocks) * row_map.RECORD_SIZE
    assert measure(stack.view.upper, FORM).bytes == len(blocks) * BLOCK  # type: ignore[union-attr,arg-type]


def test_chmod_copies_no_data_and_makes_no_map(stack: Stack) -> None:
    data = fill(1 << 20)
    (stack.layer() / "big").write_bytes(data)
    upper = stack.layer()
    paths = stack.open()
    paths.chmod("big", 0o600)
    assert paths.read_bytes("big") == data
    assert os.stat(upper / "big").st_blocks * 512 <= BLOCK  # at most the host's block of xattrs
    assert list(stack.map_dir().iterdir()) == []


def test_a_chain_of_128_reads_as_it_was_written(stack: Stack) -> None:
    model = bytearray(fill(1 << 20))
    (stack.layer() / "dir").mkdir()
    Path(stack.trees[0], "dir", "big").write_bytes(model)
    rnd = random.Random(3)
    for depth in range(128):
        stack.layer()
        paths = stack.open(limit=Limit(bytes=64 << 10))
        if depth % 16 == 5:
            paths.rename("dir", f"dir{depth}")
            paths.rename(f"dir{depth}", "dir")
        for _ in range(4):
            offset, length = rnd.randrange(1 << 20), rnd.randrange(1, 9000)
            piece = rnd.randbytes(length)
            paths.write_at("dir/big", offset, piece)
            model[offset : offset + length] = piece
        if depth % 10 == 9:
            size = rnd.randrange(900_000, 1 << 20)
            paths.truncate("dir/big", size)
            paths.truncate("dir/big", 1 << 20)
            model[size:] = bytes((1 << 20) - size)
    del model[1 << 20 :]
    paths.truncate("dir/big", 1 << 20)
    assert paths.read_bytes("dir/big") == bytes(model)
    paths = stack.open()
    assert paths.read_bytes("dir/big") == bytes(model)
    node = paths.node("dir/big")
    assert isinstance(node.data, RowFile)
    assert len(node.data.levels) == 128


def test_a_write_ends_at_the_limit_in_whole_blocks(stack: Stack) -> None:
    data = fill(1 << 20)
    (stack.layer() / "big").write_bytes(data)
    stack.layer()
    paths = stack.open(limit=Limit(bytes=4 * BLOCK))
    node, view = paths.node("big"), stack.view
    assert view is not None
    assert view.write(node, 100, b"x" * (10 * BLOCK)) == 4 * BLOCK - 100
    with pytest.raises(OSError) as caught:
        view.write(node, 512 << 10, b"x")
    assert caught.value.errno == errno.ENOSPC
    view.write(node, 200, b"over")  # what is there can be overwritten
    assert view.usage().bytes == 4 * BLOCK
    now = paths.read_bytes("big")
    assert now[4 * BLOCK :] == data[4 * BLOCK :]
    assert now[:100] == data[:100]


@pytest.mark.parametrize("block", [4096, 65536, 1 << 20])
def test_block_sizes(stack: Stack, block: int) -> None:
    data = bytearray(fill(3 << 20))
    (stack.layer() / "big").write_bytes(data)
    stack.layer()
    paths = stack.open(row=block)
    paths.write_at("big", 1_500_000, b"here")
    data[1_500_000:1_500_004] = b"here"
    assert paths.read_bytes("big") == bytes(data)
    assert stack.view is not None
    assert stack.view.usage().bytes == block


def test_a_compacted_file_is_a_plain_one(stack: Stack) -> None:
    data = bytearray(fill(1 << 20))
    (stack.layer() / "big").write_bytes(data)
    upper = stack.layer()
    paths = stack.open()
    for at in range(0, 800 << 10, 2 * BLOCK):
        paths.write_at("big", at, b"w" * BLOCK)
        data[at : at + BLOCK] = b"w" * BLOCK
    view = stack.view
    assert view is not None
    assert [told.files for told in row_compact.compact(view)][-1] == 0  # less than three quarters
    files = 0
    for told in row_compact.compact(view, share=0.3):
        assert paths.read_bytes("big") == bytes(data)
        files = told.files
    assert files == 1
    assert (upper / "big").read_bytes() == bytes(data)
    assert xattr.try_get(view.upper.root.fd, b"big", FORM.row) is None  # type: ignore[union-attr]
    assert list(stack.map_dir().iterdir()) == []
    paths.write_at("big", 0, b"again")
    assert paths.read_bytes("big", 0, 5) == b"again"


def test_a_file_that_was_forgotten_before_its_sync_goes_on_with_the_same_map(stack: Stack) -> None:
    """Two that append to one map would not know of each other's records, and the first wrong one ends the map."""
    (stack.layer() / "big").write_bytes(fill(1 << 20))
    stack.layer()
    paths = stack.open()
    view = stack.view
    assert view is not None
    assert isinstance(view.rows, Rows)
    for block in (3, 5, 7):
        paths.write_at("big", block * BLOCK, b"new")
        view.drop(paths.node("big"))
    view.rows.syncer.sync()
    paths.write_at("big", 9 * BLOCK, b"new")
    view.rows.syncer.sync()
    data = paths.node("big").data
    assert isinstance(data, RowFile) and data.ref is not None
    loaded = row_map.read(view.rows.map_dir(view.need_upper()), data.ref)
    assert loaded.ranges == [(3, 4), (5, 6), (7, 8), (9, 10)]
    assert loaded.synced == loaded.end


def test_compaction_gives_back_what_was_reserved_where_the_base_has_a_hole(stack: Stack) -> None:
    with (stack.layer() / "big").open("wb") as file:
        file.truncate(1 << 20)
    stack.layer()
    paths = stack.open(limit=Limit(bytes=1 << 20))
    view = stack.view
    assert view is not None
    view.fallocate(paths.node("big"), 0, 0, 4 * BLOCK)
    view.drop(paths.node("big"))
    for _ in row_compact.compact(view, share=0):
        pass
    assert view.usage() == measure(view.need_upper(), FORM)


@pytest.fixture
def scattered(stack: Stack) -> tuple[Paths, Path, bytearray]:
    """A file of which every tenth block was written, one by one."""
    data = bytearray(fill(4 << 20))
    (stack.layer() / "big").write_bytes(data)
    upper = stack.layer()
    paths = stack.open(limit=Limit(bytes=64 << 20))
    for at in range(0, 4 << 20, 10 * BLOCK):
        paths.write_at("big", at, b"w" * BLOCK)
        data[at : at + BLOCK] = b"w" * BLOCK
    with (upper / "big").open("rb") as file:
        if files.extents(file.fileno()) is None:
            pytest.skip("this host does not say how a file lies on it")
    return paths, upper, data


def test_a_scattered_file_is_written_anew_in_one_piece(stack: Stack, scattered: tuple[Paths, Path, bytearray]) -> None:
    paths, upper, data = scattered
    paths.setxattr("big", "user.note", b"kept")
    paths.chmod("big", 0o4751)
    paths.utime("big", atime_ns=1_000_000_007, mtime_ns=1_000_000_009)
    before, shown = os.stat(upper / "big"), paths.stat("big")
    pieces = (4 << 20) // (10 * BLOCK)  # at least so many: there are holes between them
    assert stack.view is not None
    assert [told.files for told in row_compact.compact(stack.view, share=0)][-1] == 1
    after = os.stat(upper / "big")
    assert after.st_ino != before.st_ino
    with (upper / "big").open("rb") as file:
        assert file.read() == data
        lies = files.extents(file.fileno(), sync=True)
    assert lies is not None
    assert len(lies) < pieces
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)
    assert paths.stat("big").ino == shown.ino
    assert paths.getxattr("big", "user.note") == b"kept"
    assert list(stack.map_dir().iterdir()) == []
    assert stack.view.usage() == measure(stack.view.need_upper(), FORM)


def test_what_is_written_while_a_file_is_written_anew_is_in_it(
    stack: Stack, scattered: tuple[Paths, Path, bytearray]
) -> None:
    paths, upper, data = scattered
    rnd = random.Random(5)
    assert stack.view is not None
    before = os.stat(upper / "big").st_ino
    for step, _ in enumerate(row_compact.compact(stack.view, share=0)):
        if step < 5:
            offset, piece = rnd.randrange(4 << 20), rnd.randbytes(100)
            paths.write_at("big", offset, piece)
            data[offset : offset + 100] = piece
        assert paths.read_bytes("big") == bytes(data)
    assert os.stat(upper / "big").st_ino != before
    assert stack.open().read_bytes("big") == bytes(data)


@pytest.mark.parametrize("why", ["names", "room", "limit"])
def test_a_file_that_cannot_be_written_anew_is_compacted_where_it_stands(
    stack: Stack, scattered: tuple[Paths, Path, bytearray], why: str
) -> None:
    paths, upper, data = scattered
    view = stack.view
    assert view is not None
    if why == "names":
        paths.link("big", "other")
    elif why == "room":
        view.fallocate(paths.node("big"), 1, 8 << 20, BLOCK)
    else:
        view.set_limit(Limit(bytes=(4 << 20) + 25 * BLOCK))
    before = os.stat(upper / "big").st_ino
    assert [told.files for told in row_compact.compact(view, share=0)][-1] == 1
    assert os.stat(upper / "big").st_ino == before
    assert paths.read_bytes("big") == bytes(data)
    assert view.usage() == measure(view.need_upper(), FORM)


def test_compaction_that_was_killed_leaves_a_redirect_file_that_is_right(stack: Stack) -> None:
    data = bytearray(fill(4 << 20))
    (stack.layer() / "big").write_bytes(data)
    stack.layer()
    paths = stack.open()
    paths.write_at("big", 0, b"new")
    data[:3] = b"new"
    killed = stack.view
    assert killed is not None
    next(row_compact.compact(killed, share=0))
    stack.view = None
    assert stack.open().read_bytes("big") == bytes(data)
    killed.close()


def test_a_compacted_layer_does_not_disturb_who_reads_above_it(stack: Stack) -> None:
    data = fill(1 << 20)
    (stack.layer() / "big").write_bytes(data)
    stack.layer()
    stack.open().write_at("big", 0, b"one")
    stack.close()
    reader = View(list(reversed(stack.trees)), options=Options())
    node = reader.lookup(reader.root, b"big")  # its reference is known, its map is not read yet
    middle = stack.trees[-1]
    for _ in row_compact.compact_layer(stack.trees[:1], middle, os.path.dirname(middle) + "/work", share=0):
        pass
    buffer = bytearray(1 << 20)
    assert reader.pread(node, 0, memoryview(buffer)) == 1 << 20
    assert bytes(buffer) == b"one" + data[3:]
    reader.close()


def test_a_missing_map_is_an_error_and_not_old_data(stack: Stack) -> None:
    (stack.layer() / "big").write_bytes(fill(1 << 20))
    upper = stack.layer()
    stack.open().write_at("big", 0, b"new")
    stack.close()
    (log,) = stack.map_dir().iterdir()
    log.unlink()
    paths = stack.open()
    with pytest.raises(OSError) as caught:
        paths.read_bytes("big")
    assert caught.value.errno == errno.EIO
    damage, spare = row_layer.inspect(str(upper), FORM)
    assert len(damage) == 1
    assert "big" in damage[0]
    assert spare == []


def test_a_map_without_its_file_is_garbage(stack: Stack) -> None:
    (stack.layer() / "big").write_bytes(fill(1 << 20))
    upper = stack.layer()
    stack.open().write_at("big", 0, b"new")
    stack.close()
    (upper / "big").unlink()
    assert len(row_layer.inspect(str(upper), FORM)[1]) == 1
    assert row_layer.collect(str(upper), FORM) == 1
    assert list(stack.map_dir().iterdir()) == []


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
@pytest.mark.parametrize("remounted", [False, True])
def test_a_redirect_file_that_goes_takes_its_map_along(stack: Stack, how: str, remounted: bool) -> None:
    (stack.layer() / "big").write_bytes(fill(1 << 20))
    stack.layer()
    paths = stack.open()
    paths.write_at("big", 0, b"new")
    if remounted:
        paths = stack.open()
    if how == "unlinked":
        paths.unlink("big")
    else:
        paths.write_bytes("other", b"")
        paths.rename("other", "big")
    assert list(stack.map_dir().iterdir()) == []


@pytest.mark.parametrize(
    "value", [b"", b"\x01", b"\x02" + bytes(40), bytes(28) + b"x", b"\x01\x0c" + bytes(26) + b"../x"]
)
def test_a_damaged_reference_is_an_error(value: bytes) -> None:
    with pytest.raises(OSError) as caught:
        redirect.Ref.unpack(value)
    assert caught.value.errno == errno.EIO


def test_the_records_round_trip() -> None:
    ref = redirect.Ref.make(65536, 123_456, 248, b"a/b", has_map=True)
    assert redirect.Ref.unpack(ref.pack()) == ref
    assert redirect.Ref.unpack(ref.ending(7).pack()).base_end == 7
    with pytest.raises(ValueError, match="power of two"):
        redirect.check_block(5000)


@pytest.mark.parametrize("cut", range(1, row_map.RECORD_SIZE))
def test_a_torn_record_ends_the_map_and_is_overwritten(tmp_path: Path, cut: int) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ref = redirect.Ref.make(4096, 1 << 20, 0, b"x", has_map=True)
        log = row_map.Log.create(fd, ref)
        log.append(3, 5)
        log.append(9, 10)
        log.close()
        path = tmp_path / ref.map_name.decode()
        os.truncate(path, path.stat().st_size - cut)
        loaded = row_map.read(fd, ref)
        assert loaded.ranges == [(3, 5)]
        again = row_map.Log.open(fd, ref, loaded, durable=False)
        again.append(100, 101)
        again.close()
        assert row_map.read(fd, ref).ranges == [(3, 5), (100, 101)]
    finally:
        os.close(fd)
