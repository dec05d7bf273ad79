"""Apply: where an archive ends, and sparse files in all their forms."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from support.archives import OneByOne, apply, member, patched, tar

from cowfs.errors import InvalidArgument

# The end of the archive --------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), bytes(100), bytes(1024) + b"rubbish"])
def test_ends_that_are_accepted(space: Path, end: bytes) -> None:
    apply(member("f", b"data") + end, space / "layer")
    assert (space / "layer" / "f").read_bytes() == b"data"


def test_missing_padding_of_the_last_member_is_accepted(space: Path) -> None:
    apply(member("f", b"data")[:-508], space / "layer")
    assert (space / "layer" / "f").read_bytes() == b"data"


def test_a_truncated_archive_is_refused_wherever_it_is_cut(space: Path) -> None:
    whole = member("first", b"1" * 700) + member("second" * 30, b"2" * 600)
    good = set(range(1212, 1537)) | {0}  # the padding of first; nothing at all is an empty layer
    for length in range(0, len(whole) - 512, 37):
        target = space / f"cut{length}"
        if length in good:
            apply(whole[:length], target)
        else:
            with pytest.raises(InvalidArgument, match="truncated"):
                apply(whole[:length], target)


def test_a_lone_zero_block_inside_is_damage(space: Path) -> None:
    with pytest.raises(InvalidArgument, match="zero block"):
        apply(member("f") + bytes(512) + member("g"), space / "layer")


def test_a_slow_pipe_will_do(space: Path) -> None:
    from cowfs.archive import apply_layer

    (space / "layer").mkdir()
    done = apply_layer(OneByOne(tar(member("f", b"x" * 600))), str(space / "layer"))  # type: ignore[arg-type]
    assert done.entries == 1


# Sparse files ------------------------------------------------------------------------------------


def test_sparse_files_in_the_old_gnu_form(space: Path) -> None:
    pairs = [(4096 * 2 * n, 512) for n in range(30)] + [(1 << 20, 0)]

    def entry(pair: tuple[int, int]) -> bytes:
        return b"%011o\0%011o\0" % pair

    body = b"".join(bytes([65 + n % 26]) * 512 for n in range(30))
    info = tarfile.TarInfo("sparse")
    info.size, info.type = len(body), b"S"
    head = info.tobuf(tarfile.GNU_FORMAT)
    head = patched(head, (386, b"".join(map(entry, pairs[:4]))), (482, b"\1"), (483, b"%011o\0" % (1 << 20)))
    more = b"".join(map(entry, pairs[4:25])).ljust(504, b"\0") + b"\1" + bytes(7)
    last = b"".join(map(entry, pairs[25:])).ljust(512, b"\0")
    apply(head + more + last + body + bytes(1024), space / "layer")
    _check_sparse(space / "layer" / "sparse", pairs, 1 << 20)


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_files_in_the_pax_forms(space: Path, version: str) -> None:
    pairs = [(8192 * n, 512) for n in range(40)]
    body = b"".join(bytes([65 + n % 26]) * 512 for n in range(40))
    real = 8192 * 40
    pax: dict[str, str] = {}
    name = "sparse"
    if version == "0.0":
        # tarfile cannot repeat a key: the records are made by hand
        from cowfs.archive import header

        records = [(b"GNU.sparse.size", b"%d" % real), (b"GNU.sparse.numblocks", b"40")]
        for offset, length in pairs:
            records += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % length)]
        data = b"".join(header._pax_record(*record) for record in records)
        head = member("paxhdr", data, type=b"x", format=tarfile.USTAR_FORMAT)
        apply(head + member(name, body) + bytes(1024), space / "layer")
    else:
        if version == "0.1":
            pax = {"GNU.sparse.size": str(real), "GNU.sparse.name": name,
                   "GNU.sparse.map": ",".join(f"{o},{n}" for o, n in pairs)}  # fmt: skip
        else:
            pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
                   "GNU.sparse.realsize": str(real)}  # fmt: skip
            listed = b"%d\n" % len(pairs) + b"".join(b"%d\n%d\n" % pair for pair in pairs)
            body = listed + bytes(-len(listed) % 512) + body
        apply(tar(member("GNUSparseFile.0/sparse", body, pax=pax)), space / "layer")
    _check_sparse(space / "layer" / name, pairs, real)


def _check_sparse(path: Path, pairs: list[tuple[int, int]], size: int) -> None:
    data = path.read_bytes()
    assert len(data) == size
    expected = bytearray(size)
    for n, (offset, length) in enumerate(pairs):
        expected[offset : offset + length] = bytes([65 + n % 26]) * length
    assert data == bytes(expected)
    assert os.stat(path).st_blocks * 512 < size


@pytest.mark.parametrize(
    ("pairs", "stored", "real"),
    [
        ([(0, 512), (256, 512)], 1024, 4096),  # overlapping
        ([(4096, 512), (0, 512)], 1024, 8192),  # descending
        ([(0, 512), (8192, 512)], 1024, 8192),  # past the end
        ([(0, 512)], 1024, 8192),  # more data than the map says
        ([(0, 4096)], 512, 8192),  # less
    ],
)
def test_sparse_maps_that_do_not_fit_are_refused(
    space: Path, pairs: list[tuple[int, int]], stored: int, real: int
) -> None:
    pax = {"GNU.sparse.size": str(real), "GNU.sparse.map": ",".join(f"{o},{n}" for o, n in pairs)}
    with pytest.raises(InvalidArgument, match=r"'sparse'.*sparse map"):
        apply(tar(member("sparse", bytes(stored), pax=pax)), space / "layer")
