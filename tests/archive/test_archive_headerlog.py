"""The header log: every archive comes back byte for byte, and a changed layer is noticed."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from support.archives import apply, directory, hardlink, member, symlink, tar

from cowfs.archive import Applied, read_trailer, rebuild
from cowfs.errors import Corrupt

SPARSE_MAP = b"2\n0\n3\n8192\n5\n".ljust(512, b"\0")
ARCHIVES = {
    "plain": tar(directory("d"), member("d/f", b"hello"), symlink("l", "d"), hardlink("h", "d/f")),
    "no end": member("f", b"x" * 700),
    "no padding": member("f", b"x" * 700)[:-324],
    "one end block": member("f", b"x") + bytes(512),
    "rubbish behind the end": tar(member("f", b"x")) + b"rubbish" * 1000,
    "rubbish in the padding": member("f", b"x")[:-511] + b"r" * 511 + member("g") + bytes(1024),
    "ten thousand end blocks": tar(member("f", b"x")) + bytes(512 * 10_000),
    "gnu names": tar(member("d/" * 60 + "f", b"x", format=tarfile.GNU_FORMAT)),
    "odd order and spelling": tar(member("./z", b"1"), member("/a//b", b"2"), member("z", b"3")),
    "twice": tar(member("f", b"first"), member("f", b"second"), member("f"), member("f", b"last")),
    "twice and linked": tar(member("f", b"first"), hardlink("h", "f"), member("f", b"second"), member("h", b"new h")),
    "a directory with files replaced": tar(member("d/a", b"1"), member("d/b", b"2"), member("d", b"3")),
    "whiteouts with contents": tar(member(".wh.x", b"why not"), member("d/.wh..wh..opq", b"so what"), member("e", b"1")),
    "the same whiteout twice": tar(member(".wh.x", b"one"), member(".wh.x", b"two")),
    "aufs book-keeping": tar(member(".wh..wh.plnk/1", b"data"), member("f", b"x")),
    "sparse": tar(
        member(
            "GNUSparseFile.0/s", SPARSE_MAP + b"abcdefgh",
            pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s", "GNU.sparse.realsize": "9000"},
        )
    ),
    "sparse, twice": tar(
        *[member("s", b"abc", pax={"GNU.sparse.size": "9000", "GNU.sparse.map": f"{at},3"}) for at in (0, 100)]
    ),
    "smuggled attributes": tar(member("f", b"x", pax={"SCHILY.xattr.trusted.overlay.opaque": "y"})),
    "global header": tar(tarfile.TarInfo.create_pax_global_header({"comment": "x"}), member("f", b"x")),
    "nothing": b"",
    "only an end": bytes(1024),
}  # fmt: skip


def _applied(data: bytes, target: Path, **options: object) -> tuple[io.BytesIO, Applied]:
    log = io.BytesIO()
    done = apply(data, target, log=log, **options)
    assert done.log_size == len(log.getvalue())
    return log, done


def _rebuilt(log: io.BytesIO, layer: Path, **options: str) -> bytes:
    out = io.BytesIO()
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        digest, size = rebuild(log, fd, out, **options)
    finally:
        os.close(fd)
    assert digest == "sha256:" + hashlib.sha256(out.getvalue()).hexdigest()
    assert size == len(out.getvalue())
    return out.getvalue()


@pytest.mark.parametrize("form", ["trusted", "plain"])
@pytest.mark.parametrize("case", ARCHIVES)
def test_every_archive_comes_back_byte_for_byte(space: Path, case: str, form: str) -> None:
    log, done = _applied(ARCHIVES[case], space / "layer", form=form)
    assert _rebuilt(log, space / "layer") == ARCHIVES[case]
    trailer = read_trailer(log)
    assert (trailer["diff_id"], trailer["size"], trailer["entries"]) == (done.diff_id, done.size, done.entries)


def test_a_tree_that_was_there_before_does_not_disturb(space: Path) -> None:
    layer = space / "layer"
    layer.mkdir()
    (layer / "f").write_bytes(b"old")
    (layer / "d").mkdir()
    (layer / "d" / "a").write_bytes(b"old")
    for case in ("twice", "a directory with files replaced", "plain"):
        log, _ = _applied(ARCHIVES[case], layer, form="plain")
        assert _rebuilt(log, layer) == ARCHIVES[case]


def test_a_compressed_archive_comes_back_uncompressed_or_compressed_anew(space: Path) -> None:
    log, _ = _applied(gzip.compress(ARCHIVES["plain"]), space / "layer")
    assert _rebuilt(log, space / "layer") == ARCHIVES["plain"]
    assert gzip.decompress(_rebuilt(log, space / "layer", compression="gzip")) == ARCHIVES["plain"]


def test_a_layer_that_changed_is_noticed(space: Path) -> None:
    layer = space / "layer"
    log, _ = _applied(ARCHIVES["plain"], layer)
    for change in (
        lambda: (layer / "d" / "f").write_bytes(b"HELLO"),
        lambda: (layer / "d" / "f").write_bytes(b"longer than before"),
        lambda: (layer / "d" / "f").unlink(),
        lambda: (layer / "d" / "f").symlink_to("/etc/passwd"),
        lambda: ((layer / "d" / "f").unlink(), os.mkfifo(layer / "d" / "f")),
    ):
        change()
        with pytest.raises(Corrupt, match=r"layer"):
            _rebuilt(log, layer)


def test_a_damaged_log_is_noticed_wherever_it_is_damaged(space: Path) -> None:
    log, _ = _applied(ARCHIVES["twice"], space / "layer")
    whole = log.getvalue()
    choose = random.Random(1)
    for _ in range(60):
        bad = bytearray(whole)
        bad[choose.randrange(len(bad))] ^= choose.randrange(1, 256)
        try:
            data = _rebuilt(io.BytesIO(bytes(bad)), space / "layer")
        except Corrupt:
            continue
        assert data == ARCHIVES["twice"]  # a byte that says nothing (gzip's header has some)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        with pytest.raises(Corrupt):
            _rebuilt(io.BytesIO(whole[:length]), space / "layer")


def test_an_archive_that_replaces_its_files_too_often_is_applied_but_not_kept(space: Path) -> None:
    data = tar(*(member("f", b"%d" % n) for n in range(10_050)))
    log, _ = _applied(data, space / "layer")
    assert len(log.getvalue()) < 600_000
    with pytest.raises(Corrupt, match="incomplete"):
        _rebuilt(log, space / "layer")


def test_the_log_is_small(space: Path) -> None:
    choose = random.Random(2)
    data = tar(
        *(member(f"usr/lib/package{n // 50}/module{n}.py", choose.randbytes(2000), mtime=1_700_000_000 + n)
          for n in range(2000))
    )  # fmt: skip
    log, _ = _applied(data, space / "layer")
    assert len(log.getvalue()) < 60 * 2000
