"""A disk that is written as qcow2 is read back the same, by a reader of our own that knows only the specification, and by qemu-img."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cowfs.format import qcow2
from cowfs.format.qcow2 import CLUSTER

MIB = 1 << 20


def read_back(image: bytes) -> tuple[int, dict[int, bytes]]:
    """(size of the disk, its clusters that hold data), checking each table and count on the way (QEMU's docs/interop/qcow2.txt)."""
    magic, version, backing, _, bits, size, crypt, entries, first, counts, heads, snapshots = struct.unpack_from(
        ">4sIQIIQIIQQII", image
    )
    incompatible, compatible, autoclear, order, length = struct.unpack_from(">QQQII", image, 72)
    assert (magic, version, backing, crypt, snapshots, incompatible, compatible, autoclear, order, length) == (
        b"QFI\xfb", 3, 0, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    cluster = 1 << bits
    assert len(image) % cluster == 0
    used = {0, *range(counts // cluster, counts // cluster + heads)}
    used |= set(range(first // cluster, first // cluster + max(1, -(-entries * 8 // cluster))))
    assert entries * cluster * (cluster // 8) >= size
    found = {}
    for number, entry in enumerate(struct.unpack_from(f">{entries}Q", image, first)):
        if not entry:
            continue
        assert entry >> 63
        at = entry & ~(1 << 63)
        assert at // cluster not in used
        used.add(at // cluster)
        for place, inner in enumerate(struct.unpack_from(f">{cluster // 8}Q", image, at)):
            if inner:
                assert inner >> 63
                where = inner & ~(1 << 63)
                assert where % cluster == 0
                assert where // cluster not in used
                used.add(where // cluster)
                found[number * (cluster // 8) + place] = image[where : where + cluster]
    blocks = [one for one in struct.unpack_from(f">{heads * cluster // 8}Q", image, counts) if one]
    used |= {one // cluster for one in blocks}
    counted = [
        count for block in blocks for count in struct.unpack_from(f">{cluster // 2}H", image, block)
    ]  # of 16 bits
    assert {number for number, count in enumerate(counted) if count} == used == set(range(len(image) // cluster))
    return size, found


def written(size: int, data: dict[int, bytes]) -> bytes:
    """An image of a disk that holds ``data`` at these offsets."""

    def read(start: int, count: int) -> bytes:
        piece = bytearray(count)
        for at, content in data.items():
            low, high = max(at, start), min(at + len(content), start + count)
            if low < high:
                piece[low - start : high - start] = content[low - at : high - at]
        return bytes(piece)

    out = io.BytesIO()
    ranges = sorted((at, at + len(content)) for at, content in data.items())
    assert qcow2.write(out, size, ranges, read) == len(out.getvalue())
    return out.getvalue()


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 3 * 1024 * MIB // 512).map(lambda count: count * 512),
    places=st.lists(st.integers(0, 2**32), max_size=8),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_back(size: int, places: list[int], seed: int) -> None:
    rng = random.Random(seed)
    data: dict[int, bytes] = {}
    end = 0
    for at in sorted(place % size for place in places):
        if at >= end:
            data[at] = (rng.randbytes(rng.randrange(1, 200_000)) if rng.random() < 0.8 else bytes(70_000))[: size - at]
            end = at + len(data[at])
    told, found = read_back(written(size, data))
    assert told == size
    expected: dict[int, bytearray] = {}
    for at, content in data.items():
        for offset in range(at, at + len(content)):
            if content[offset - at]:
                expected.setdefault(offset // CLUSTER, bytearray(CLUSTER))[offset % CLUSTER] = content[offset - at]
    assert found == {number: bytes(cluster) for number, cluster in expected.items()}


def test_an_empty_disk_is_a_few_clusters() -> None:
    image = written(64 << 30, {})
    assert len(image) == 4 * CLUSTER
    assert read_back(image) == (64 << 30, {})


def test_many_clusters_have_their_counts() -> None:
    """More than one block of reference counts has."""
    data = {number * CLUSTER: b"x" for number in range(33_000)}
    out = io.BytesIO()
    wanted = [(at, at + 1) for at in data]
    qcow2.write(out, 33_000 * CLUSTER, wanted, lambda start, count: b"x".ljust(count, b"\0"))
    size, found = read_back(out.getvalue())
    assert (size, len(found)) == (33_000 * CLUSTER, 33_000)


def test_qemu_reads_it(tmp_path: Path) -> None:
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed (apt-get install qemu-utils)")
    rng = random.Random(1)
    data = {rng.randrange(3 << 30): os.urandom(rng.randrange(1, 300_000)) for _ in range(20)}
    (tmp_path / "disk.qcow2").write_bytes(written(4 << 30, data))
    with (tmp_path / "disk.raw").open("wb") as file:
        for at, content in sorted(data.items()):
            file.seek(at)
            file.write(content)
        file.truncate(4 << 30)
    for words in (["check", "disk.qcow2"], ["compare", "-f", "raw", "-F", "qcow2", "disk.raw", "disk.qcow2"]):
        done = subprocess.run(["qemu-img", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
