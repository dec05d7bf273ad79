"""Streams: told apart by their first bytes, cut short never accepted, bounded in memory."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from support.archives import OneByOne

from cowfs.archive.compress import Packer, Unpacker
from cowfs.archive.decode import CHUNK
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded

zstandard = pytest.importorskip("zstandard")

BODY = random.Random(1).randbytes(300_000) + bytes(700_000) + b"tail"
WAYS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
}
PACKED = {name: way(BODY) for name, way in WAYS.items()}


def _all(stream: io.RawIOBase | io.BytesIO, **options: object) -> tuple[bytes, Unpacker]:
    source = Unpacker(stream, max_bytes=int(str(options.get("max_bytes", 1 << 40))))  # type: ignore[arg-type]
    try:
        data = b"".join(bytes(piece) for piece in source.pieces(1 << 62))
        source.finish()
    except BaseException:
        source.stop()
        raise
    return data, source


@pytest.mark.parametrize("way", WAYS)
def test_each_compression_is_recognised_and_undone(way: str) -> None:
    data, source = _all(io.BytesIO(PACKED[way]))
    assert data == BODY
    assert source.compression == way
    assert source.diff_id == "sha256:" + hashlib.sha256(BODY).hexdigest()
    assert source.blob_digest == "sha256:" + hashlib.sha256(PACKED[way]).hexdigest()
    assert (source.size, source.blob_size) == (len(BODY), len(PACKED[way]))


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_may_come_byte_by_byte(way: str) -> None:
    body = BODY[:3000]
    assert _all(OneByOne(WAYS[way](body)))[0] == body


@pytest.mark.parametrize("way", [way for way in WAYS if way != "none"])
def test_a_stream_cut_anywhere_is_refused(way: str) -> None:
    whole = WAYS[way](BODY[:2000])
    for length in range(7, len(whole), 13):
        with pytest.raises(InvalidArgument, match=r"truncated|damaged"):
            _all(io.BytesIO(whole[:length]))


@pytest.mark.parametrize("way", ["gzip", "zstd"])
def test_concatenated_frames_are_one_stream(way: str) -> None:
    parts = WAYS[way](BODY[:1000]) + WAYS[way](BODY[1000:2000])
    assert _all(io.BytesIO(parts))[0] == BODY[:2000]


def test_zstd_skippable_frames_are_passed_over() -> None:
    skippable = b"\x53\x2a\x4d\x18" + (10).to_bytes(4, "little") + b"0123456789"
    assert _all(io.BytesIO(skippable + PACKED["zstd"] + skippable))[0] == BODY
    with pytest.raises(InvalidArgument, match="truncated"):
        _all(io.BytesIO(PACKED["zstd"] + skippable[:-1]))


@pytest.mark.parametrize("level", [1, 3, 19])
@pytest.mark.parametrize("size", [0, 1, 1000, 131072, 1_000_004])
def test_the_frame_walk_agrees_with_every_kind_of_frame(level: int, size: int) -> None:
    for options in ({}, {"write_content_size": False}, {"write_checksum": True}):
        packed = zstandard.ZstdCompressor(level=level, **options).compress(BODY[-size:] if size else b"")
        assert _all(io.BytesIO(packed))[0] == (BODY[-size:] if size else b"")
        if len(packed) > 12:
            with pytest.raises(CowfsError):
                _all(io.BytesIO(packed[:-1]))


def test_zero_padding_behind_gzip_is_allowed_and_rubbish_is_not() -> None:
    assert _all(io.BytesIO(PACKED["gzip"] + bytes(1000)))[0] == BODY
    with pytest.raises(InvalidArgument):
        _all(io.BytesIO(PACKED["gzip"] + b"rubbish"))
    with pytest.raises(InvalidArgument):
        _all(io.BytesIO(PACKED["gzip"] + bytes(10) + b"rubbish"))


@pytest.mark.parametrize("way", ["gzip", "zstd", "xz", "bzip2"])
def test_a_bomb_costs_little_memory_and_stops_at_the_limit(way: str) -> None:
    if way == "gzip":
        engine = zlib.compressobj(9, zlib.DEFLATED, 31)
        bomb = b"".join(engine.compress(bytes(1 << 20)) for _ in range(300)) + engine.flush()
    else:
        bomb = WAYS[way](bytes(300 << 20)) if way != "bzip2" else bz2.compress(bytes(300 << 20), 9)
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded, match="--max-size"):
            _all_discarding(bomb, 200 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * CHUNK


def _all_discarding(data: bytes, limit: int) -> None:
    source = Unpacker(io.BytesIO(data), max_bytes=limit)
    try:
        source.skip(1 << 62)
        source.finish()
    finally:
        source.stop()


def test_a_zstd_window_that_wants_too_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=False)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packed.compress(random.Random(2).randbytes(1000)) + packed.flush()
    with pytest.raises(InvalidArgument, match="memory"):
        _all(io.BytesIO(data))


@pytest.mark.parametrize("way", ["none", "gzip", "zstd"])
def test_what_is_packed_is_unpacked_and_packed_the_same_again(way: str) -> None:
    outs = []
    for step in (1000, 77_777):
        out = io.BytesIO()
        packer = Packer(out, way)
        for start in range(0, len(BODY), step):
            packer.write(BODY[start : start + step])
        packer.close()
        assert packer.diff_id == "sha256:" + hashlib.sha256(BODY).hexdigest()
        assert packer.blob_digest == "sha256:" + hashlib.sha256(out.getvalue()).hexdigest()
        assert (packer.size, packer.blob_size) == (len(BODY), len(out.getvalue()))
        outs.append(out.getvalue())
    assert _all(io.BytesIO(outs[0]))[0] == BODY
    assert outs[0] == outs[1]


def test_an_error_of_the_target_reaches_the_writer() -> None:
    class Full(io.RawIOBase):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    packer = Packer(Full())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space"):
        for _ in range(100):
            packer.write(bytes(CHUNK))
    packer.abandon()


def test_an_error_of_the_stream_reaches_the_reader() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        _all(Broken())


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77])
def test_gzip_made_on_several_threads_is_one_member_that_gzip_reads(size: int) -> None:
    data = (b"some text that repeats itself " * (size // 30 + 1))[:size]
    outs = []
    for cpus in (1, 2, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cowfs.archive.compress.os.cpu_count", lambda cpus=cpus: cpus)
            out = io.BytesIO()
            packer = Packer(out, "gzip")
            packer.write(data)
            packer.close()
            outs.append(out.getvalue())
    assert len(set(outs)) == 1
    assert gzip.decompress(outs[0]) == data
    engine = zlib.decompressobj(31)
    assert engine.decompress(outs[0]) == data
    assert engine.eof
    assert engine.unused_data == b""
    assert len(outs[0]) <= len(gzip.compress(data, 6)) * 1.02 + 64


@pytest.mark.parametrize("package", ["zlib", "isal.isal_zlib"])
def test_both_inflaters_give_the_same_answers(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``isal`` is optional: what it refuses, zlib refuses, and the other way round."""
    module = pytest.importorskip(package)
    monkeypatch.setattr("cowfs.archive.decode._inflater", module.decompressobj)
    whole = WAYS["gzip"](BODY)
    assert _all(io.BytesIO(whole + WAYS["gzip"](b"more") + bytes(100)))[0] == BODY + b"more"
    choose = random.Random(5)
    for _ in range(40):
        bad = bytearray(WAYS["gzip"](BODY[:3000]))
        position = choose.randrange(3, len(bad))
        bad[position] ^= 1 << choose.randrange(8)
        try:
            assert _all(io.BytesIO(bytes(bad)))[0] == BODY[:3000]  # a field of the header that says nothing
        except InvalidArgument as error:
            assert "gzip" in str(error)
